"""data.py and iu_xray.py: sections, R2Gen's, Open-i's and Kaggle's layouts, skips, the card, the order of studies."""

import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import rewards
from formats.files import read_jsonl
from running import parallel

SHARED = Path(os.environ.get("VALOR_SHARED", Path(__file__).parents[2] / "shared" / "data"))
REPORT = "FINDINGS: The heart is large. IMPRESSION: Cardiomegaly."


def config(path, **changes):
    base = {"path": str(path), "format": "r2gen", "target": "both", "limit": 0, "strict": False, "views": 1}
    splits = {"labels": "", "sft_split": "train", "rl_split": "train", "val_split": "val", "test_split": "test"}
    return SimpleNamespace(**(base | splits | changes))


def picture(path: Path, side: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side)).save(path)
    return path


def r2gen(folder: Path, rows: dict, truth: list | None = None) -> Path:
    for split in [split for split in rows.values() if isinstance(split, list)]:
        for row in split:
            for name in row["image_path"]:
                picture(folder / "images" / name)
    (folder / "annotation.json").write_text(json.dumps(rows))
    if truth is not None:
        (folder / "truth.jsonl").write_text("\n".join(map(json.dumps, truth)))
    return folder


def row(study_id, report=REPORT):
    return {"id": study_id, "report": report, "image_path": [f"{study_id}/0.png", f"{study_id}/1.png"]}


# ----------------------------------------------------------------------------------------------------------- text


def test_sections_at_word_boundaries_and_case_sensitive():
    text = "INDICATION: cough.\nFINDINGS: No\n findings: old. PREFINDINGS: x IMPRESSION: Clear. FINDINGS: More."
    assert data.split_sections(text) == {"findings": "No findings: old. PREFINDINGS: x More.", "impression": "Clear."}
    assert data.split_sections("The lungs\nare clear.") == {"findings": "The lungs are clear."}


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        ("Findings: Clear. Impression: Normal.", "Clear.", "Normal."),
        ("findings: clear. impression: normal.", "clear.", "normal."),
        ("FINDINGS: Clear Impression: Normal.", "Clear Impression: Normal.", ""),  # amid a sentence only in capitals
        ("FINDINGS: Clear IMPRESSION: Normal.", "Clear", "Normal."),
        ("Findings:\nClear\n  Impression:\nNormal", "Clear", "Normal"),
        ("INDICATION: cough.\r\n\r\nFindings: Clear.\r\nImpression: Normal.", "Clear.", "Normal."),
        ("Cough. Findings: Is it clear? Impression: Yes! findings: More.", "Is it clear? More.", "Yes!"),
        ("\ufeffFindings: Clear.", "Clear.", ""),
        ("No acute findings: the lungs are clear.", None, None),  # prose
        ("There are\nfindings: two nodules.", None, None),
        ("Two Findings: nodules. My Impression: benign.", None, None),
        ("Prefindings: a. Impressions: b. Findings a, impression b.", None, None),
    ],
)  # fmt: skip
def test_where_a_header_may_stand(text, findings, impression):
    whole = {"findings": " ".join(text.split())}
    assert data.split_sections(text) == (whole if findings is None else dict(findings=findings, impression=impression))


@pytest.mark.parametrize(
    "report",
    [
        {"findings": "Clear.", "impression": "Normal. FINDINGS: Second film. IMPRESSION: Worse."},
        {"findings": "Clear. IMPRESSION: See below.", "impression": "IMPRESSION: Normal."},
        {"findings": "Findings: Clear.\nImpression: Normal.", "impression": "Normal."},
        {"findings": "Clear.", "impression": "Normal. Findings: Second film."},
        "FINDINGS: Clear. IMPRESSION: Normal.",
        "Findings: Clear. FINDINGS: impression: Normal.",
    ],
)
def test_a_target_has_each_header_once_whatever_its_sections_hold(report):
    text, _ = data.target_text(report, "both")
    assert text == "FINDINGS: Clear. IMPRESSION: Normal."
    assert rewards.format_reward([rewards.wrap(text)], ("FINDINGS", "IMPRESSION")) == [1.0]


@pytest.mark.parametrize("text", [
    "Findings : The heart is large. Impression : Cardiomegaly.",
    "**Findings:** The heart is large. **Impression:** Cardiomegaly.",
    "FINDINGS\uff1a The heart is large. IMPRESSION\uff1a Cardiomegaly.",
    "Findings:The heart is large.;Impression:Cardiomegaly.",
    "<report> FINDINGS: The heart is large. IMPRESSION: Cardiomegaly. </report>",
])  # fmt: skip
def test_titles_as_people_write_them(text):
    assert data.target_text(text, "both")[0].replace(".;", ".") == REPORT
    assert data.target_text("FINDINGS: . IMPRESSION: -", "both") == ("", "empty report")


@pytest.mark.parametrize("part", ["\n", " ", ". ", "\n ", ".\n", "FINDINGS", "findings ", "FINDINGS: a. ", "*", "<x"])
def test_a_report_of_a_megabyte_takes_no_minute(part):
    began = time.process_time()
    data.target_text(part * (1_000_000 // len(part)), "both")
    assert time.process_time() - began < 5


def test_target_text():
    assert data.target_text(REPORT, "both") == (REPORT, "")
    assert data.target_text(REPORT, "findings") == ("The heart is large.", "")
    assert data.target_text(REPORT, "impression") == ("Cardiomegaly.", "")
    for target in ("both", "findings"):
        assert data.target_text("Clear\nlungs.", target) == ("Clear lungs.", "")
    assert data.target_text({"findings": "a", "impression": "b"}, "both") == ("FINDINGS: a IMPRESSION: b", "")


def test_why_there_is_no_target_text():
    assert data.target_text("Clear lungs.", "impression") == ("", "no impression")
    assert data.target_text({"findings": "a", "impression": ""}, "both") == ("", "no impression")
    assert data.target_text("IMPRESSION: Clear.", "both") == ("", "no findings")
    assert data.target_text(" ", "impression") == ("", "empty report")
    assert data.target_text({"findings": "", "impression": ""}, "both") == ("", "empty report")
    assert data.target_text({}, "both") == ("", "no FINDINGS or IMPRESSION header")


# --------------------------------------------------------------------------------------------------------- r2gen


def test_r2gen_first_image_labels_and_ids_as_strings(tmp_path):
    rows = {"train": [row(7)], "val": [row("8")]}
    folder = r2gen(tmp_path, rows, [{"id": 7, "labels": ["effusion_left"]}, {"id": "8", "labels": []}])
    [study] = data.load_studies(config(folder), "train")
    assert (study.id, study.image, study.report) == ("7", folder / "images/7/0.png", REPORT)
    assert study.labels == ["effusion_left"] and study.split == "train"
    assert study.images == [study.image] and [view.size for view in data.read_views(study)] == [(16, 16)]
    [study] = data.load_studies(config(folder, views=2), "train")
    assert [path.name for path in study.images] == ["0.png", "1.png"] and len(data.read_views(study)) == 2
    assert data.load_studies(config(folder), "val")[0].labels == []
    assert data.load_studies(config(folder), "validate")[0].id == "8"


def test_r2gen_skips_are_counted_with_three_examples(tmp_path, capsys):
    rows = [row("ok"), *(row(f"e{i}", " ") for i in range(4)), row("f", "IMPRESSION: x"), *map(row, "ghi")]
    folder = r2gen(tmp_path, {"test": rows})
    (folder / "images/g/0.png").unlink()
    (folder / "images/h/0.png").write_bytes((folder / "images/h/0.png").read_bytes()[:60])
    picture(folder / "images/i/0.png", side=1)
    assert [s.id for s in data.load_studies(config(folder), "test")] == ["ok"]
    line = capsys.readouterr().out
    for part in ("skipped 8: ", "empty report 4 (e0, e1, e2, ...)", "no findings 1 (f)", "no image file 1 (g)",
                 "unreadable image 1 (h)", "image too small 1 (i)"):  # fmt: skip
        assert part in line
    assert line.count("\n") == 1
    with pytest.raises(ValueError, match="data.strict forbids skips: 8"):
        data.load_studies(config(folder, strict=True), "test")
    assert len(data.load_studies(config(folder, limit=1, strict=True), "test")) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [row("a")]}, "no split 'test'; it has 'train'"),
        ({"test": [row("a"), row("a")]}, "id a occurs twice"),
        ({"test": [row("a", "")]}, "no usable study among 1: 1: empty report 1"),
        ({"test": []}, "the split holds no study"),
        ({"    ": [row("a")]}, "no split 'test'; it has '    '"),
        ({"test": {"a": 1}}, "split 'test' must be a list of records"),
    ],
)
def test_r2gen_errors(tmp_path, rows, message):
    folder = r2gen(tmp_path, rows)
    with pytest.raises(ValueError, match=message) as error:
        data.load_studies(config(folder), "test")
    assert "\n" not in str(error.value)


def test_files_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        data.load_studies(config(tmp_path / "none"), "test")
    with pytest.raises(ValueError, match="annotation.json: cannot be read .*No such file"):
        data.load_studies(config(tmp_path), "test")
    (tmp_path / "annotation.json").write_text("{")
    with pytest.raises(ValueError, match="annotation.json: not JSON"):
        data.load_studies(config(tmp_path), "test")
    (tmp_path / "annotation.json").write_bytes(b'{"test": "\xff"}')
    with pytest.raises(ValueError, match="annotation.json: cannot be read .*in position 10"):
        data.load_studies(config(tmp_path), "test")
    folder = r2gen(tmp_path, {"test": [row("a")]}, [{"id": "b", "labels": []}])
    with pytest.raises(ValueError, match="no study shows a finding"):
        data.load_studies(config(folder), "test")
    folder = r2gen(tmp_path, {"test": [row("a")]}, [{"id": "b", "labels": ["cardiomegaly"]}])
    with pytest.raises(ValueError, match="no labels for study a"):
        data.load_studies(config(folder), "test")


# --------------------------------------------------------------------------------------------------------- openi


def openi(folder: Path, uid: str, findings: str = "Clear.", impression: str = "Normal.", parents=("IM-1-1001",)):
    sections = {"FINDINGS": findings, "IMPRESSION": impression}
    texts = "".join(f'<AbstractText Label="{name}">{text}</AbstractText>' for name, text in sections.items())
    nodes = "".join(f'<parentImage id="CXR{uid}_{name}"/>' for name in parents)
    path = folder / "ecgen-radiology" / f"{uid}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<e><Abstract>{texts}</Abstract>{nodes}</e>")
    (folder / "images").mkdir(exist_ok=True)


def test_openi_links_by_parent_image_and_takes_the_frontal_view(tmp_path, capsys):
    openi(tmp_path, "10", parents=("IM-1-2001", "IM-1-1001"))
    openi(tmp_path, "9", parents=("IM-1-3001", "IM-1-4001"))
    openi(tmp_path, "11")
    openi(tmp_path, "12", findings="")
    picture(tmp_path / "images/10_IM-1-1001.dcm.png")
    picture(tmp_path / "images/CXR10_IM-1-2001.png")
    picture(tmp_path / "images/CXR9_IM-1-4001.png")
    picture(tmp_path / "images/CXR9_IM-1-3001.png")
    cfg = config(tmp_path, format="openi")
    studies = data.load_studies(cfg, "whatever")
    assert [(s.id, s.image.name) for s in studies] == [("9", "CXR9_IM-1-3001.png"), ("10", "CXR10_IM-1-2001.png")]
    assert not any(study.view_known for study in studies)
    assert studies[0].report == "FINDINGS: Clear. IMPRESSION: Normal."
    out = capsys.readouterr().out
    assert "no split of its own" in out and "no image file 1 (11)" in out and "no findings 1 (12)" in out
    assert "views not known: 2 studies" in out and "indiana_projections.csv" in out and "views not" in data.card(cfg)
    table = "uid,filename,projection\n10,10_IM-1-1001.dcm.png,Frontal\n10,10_IM-1-2001.dcm.png,Lateral\n"
    table += "9,9_IM-1-3001.dcm.png,Lateral\n9,9_IM-1-4001.dcm.png,Lateral\n"
    (tmp_path / "indiana_projections.csv").write_text(table)
    studies, skips = data.read_split(cfg, "test")
    assert [s.image.name for s in studies] == ["10_IM-1-1001.dcm.png"]
    assert skips["lateral view only"] == ["9"]
    [study] = data.load_studies(config(tmp_path, format="openi", views=9), "test")
    assert [path.name for path in study.images] == ["10_IM-1-1001.dcm.png", "CXR10_IM-1-2001.png"]
    (tmp_path / "indiana_projections.csv").write_text("uid,file\n1,2\n")
    with pytest.raises(ValueError, match="no column 'filename'; it has 'uid', 'file'"):
        data.load_studies(cfg, "test")


def test_openi_links_by_pairs(tmp_path):
    openi(tmp_path, "10")
    picture(tmp_path / "images/a.png")
    picture(tmp_path / "images/b.png")
    pairs = [{"uid": 10, "file": "a.png", "view_seen": "lateral"}, {"uid": 10, "file": "b.png", "view_seen": "frontal"}]
    (tmp_path / "images/pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "indiana_projections.csv").write_text("uid,filename,projection\n11,11_IM-1-1001.dcm.png,Frontal\n")
    assert data.load_studies(config(tmp_path, format="openi"), "test")[0].image.name == "b.png"
    (tmp_path / "images/pairs.jsonl").write_text('{"uid": 10}\n')
    with pytest.raises(ValueError, match="pairs.jsonl: row 1 needs a 'uid' and, as a text, a 'file'"):
        data.load_studies(config(tmp_path, format="openi"), "test")
    (tmp_path / "images/pairs.jsonl").unlink()
    (tmp_path / "ecgen-radiology/10.xml").write_text("<e>")
    with pytest.raises(ValueError, match=r"unreadable XML 1 \(10\)"):
        data.load_studies(config(tmp_path, format="openi"), "test")


def test_an_xml_without_sections_is_an_empty_report(tmp_path):
    openi(tmp_path, "1")
    (tmp_path / "ecgen-radiology/1.xml").write_text("<eCitation><uId id='CXR1'/></eCitation>")
    with pytest.raises(ValueError, match=r"no usable study among 1: 1: empty report 1 \(1\)"):
        data.load_studies(config(tmp_path, format="openi"), "test")
    (tmp_path / "ecgen-radiology/1.xml").write_bytes(b"<?xml version='1.0' encoding='utf-8'?><e>\xff</e>")
    with pytest.raises(ValueError, match=r"unreadable XML 1 \(1\)"):
        data.load_studies(config(tmp_path, format="openi"), "test")


# -------------------------------------------------------------------------------------------------------- kaggle


def kaggle(folder: Path, reports: str) -> Path:
    """Studies 1 (frontal, lateral), 2 (lateral), 3 (no file), 4 (two frontal) with images as Kaggle names them."""
    views = {"1_IM-1-2001": "Lateral", "1_IM-1-1001": "Frontal", "2_IM-2-1001": "Lateral", "3_IM-3-1001": "Frontal",
             "4_IM-4-1001": "Frontal", "4_IM-4-1002": "Frontal"}  # fmt: skip
    for name in views:
        picture(folder / "images/images_normalized" / f"{name}.dcm.png")
    (folder / "images/images_normalized/3_IM-3-1001.dcm.png").unlink()
    rows = [f"{name.split('_')[0]},{name}.dcm.png,{view}" for name, view in views.items()]
    (folder / "indiana_projections.csv").write_text("\n".join(["uid,filename,projection", *rows]))
    (folder / "indiana_reports.csv").write_text(reports, encoding="utf-8-sig")  # as a spreadsheet writes it
    return folder


KAGGLE = "uid,MeSH,findings,impression\n" + "".join(f'{i},x,"Clear,\n{i}.",Normal.\n' for i in (1, 2, 3, 4)) + "5,x,,\n"


def test_kaggle_csv_pair(tmp_path, capsys):
    cfg = config(kaggle(tmp_path, KAGGLE), format="kaggle", views=2)
    studies = data.load_studies(cfg, "test")
    assert [(s.id, [p.name[:11] for p in s.images]) for s in studies] == [
        ("1", ["1_IM-1-1001", "1_IM-1-2001"]), ("4", ["4_IM-4-1001", "4_IM-4-1002"])]  # fmt: skip
    assert studies[0].report == "FINDINGS: Clear, 1. IMPRESSION: Normal."
    out = capsys.readouterr().out
    assert "'test' is all its studies, as is every other split" in out
    assert "skipped 3: lateral view only 1 (2), no image file 1 (3), empty report 1 (5)" in out
    assert "all             2  5 / 5 / 5 / 5  2.00 views a study" in data.card(cfg)


def test_kaggle_takes_r2gens_split_where_it_lies_beside(tmp_path, capsys):
    cfg = config(kaggle(tmp_path, KAGGLE), format="kaggle")
    split = {"train": [{"id": "CXR1_1_IM-1"}], "val": [{"id": "CXR2_IM-2"}, {"id": 5}], "test": [{"id": "CXR3_IM-3"}]}
    (tmp_path / "annotation.json").write_text(json.dumps(split))
    assert [study.id for study in data.load_studies(cfg, "train")] == ["1"]
    assert capsys.readouterr().out.endswith("[train]: 1 studies, skipped 1: in no split of annotation.json 1 (4)\n")
    with pytest.raises(ValueError, match="no split 'sft'; it has 'train', 'val', 'test'"):
        data.load_studies(cfg, "sft")


def test_kaggle_errors(tmp_path):
    cases = {
        "uid,findings\n1,a\n": "indiana_reports.csv: no column 'impression'; it has 'uid', 'findings'",
        "": "indiana_reports.csv: no column 'uid'; it has ",
        KAGGLE + "1,x,again,\n": "id 1 occurs twice",
        KAGGLE + '6,x,"never closed\n7,x,a,b\n': "indiana_reports.csv: line 10: unexpected end of data",
        KAGGLE + f"6,x,{'a' * 131073},b\n": "indiana_reports.csv: line 10: field larger than field limit",
    }
    for text, message in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            data.load_studies(config(kaggle(tmp_path, text), format="kaggle"), "test")
        assert "\n" not in str(error.value)
    (tmp_path / "indiana_reports.csv").write_bytes(b"uid,findings,impression\n1,\xe9,x\n")
    with pytest.raises(ValueError, match="indiana_reports.csv: cannot be read .*'utf-8' codec"):
        data.load_studies(config(tmp_path, format="kaggle"), "test")
    (tmp_path / "indiana_projections.csv").unlink()
    with pytest.raises(ValueError, match="indiana_projections.csv: cannot be read .*No such file"):
        data.load_studies(config(tmp_path, format="kaggle"), "test")


def test_card(tmp_path):
    folder = r2gen(tmp_path, {"train": [row("a")], "val": [row("b")], "test": [row("c"), row("d", "")]})
    text = data.card(config(folder))
    assert "test            1  7 / 7 / 7 / 7" in text and "skipped 1: empty report 1 (d)" in text


# ------------------------------------------------------------------------------------------------------- processes


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """One process of a job of two: reads a split and one that is not there, and writes what came of both."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    parallel.start("cpu")
    read, asked = data.read_split, []
    data.read_split = lambda cfg, split: asked.append(split) or read(cfg, split)
    studies = [(s.id, str(s.image), s.report) for s in data.load_studies(config(folder), "train")]
    with pytest.raises(ValueError) as error:
        data.load_studies(config(folder), "none")
    (folder / f"rank{rank}.json").write_text(json.dumps([asked, studies, str(error.value)]))
    parallel.stop()


def test_the_first_process_reads_for_all_and_its_error_ends_all(tmp_path):
    folder = r2gen(tmp_path, {"train": [row("a"), row("b", ""), row("c")]})
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, folder), nprocs=2)
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == ["train", "none"] and second[0] == []
    assert first[1] == second[1] == [[i, str(folder / f"images/{i}/0.png"), REPORT] for i in "ac"]
    assert first[2] == second[2] == f"{folder / 'annotation.json'}: no split 'none'; it has 'train'; see data.*_split"


# ---------------------------------------------------------------------------------------------------- real files


@pytest.mark.skipif(not (SHARED / "openi").exists(), reason=f"no real X-rays at {SHARED}")
def test_real_r2gen(tmp_path):
    """The real annotation.json with the two images of one of its studies, under the names that R2Gen gives them."""
    home = tmp_path / "images" / "CXR7_IM-2263"
    home.mkdir(parents=True)
    (tmp_path / "annotation.json").symlink_to(SHARED / "openi" / "annotation.json")
    for number, name in enumerate(("1001", "2001")):
        (home / f"{number}.png").symlink_to(SHARED / "openi" / "images" / f"CXR7_IM-2263-{name}.png")
    [study], skips = data.read_split(config(tmp_path, views=2), "train")
    assert study.id == "CXR7_IM-2263" and len(data.read_views(study)) == 2
    assert len(skips["no image file"]) + 1 == len(json.loads((tmp_path / "annotation.json").read_text())["train"])


@pytest.mark.skipif(not (SHARED / "openi").exists(), reason=f"no real X-rays at {SHARED}")
def test_real_kaggle(tmp_path):
    for name in ("images", "indiana_reports.csv", "indiana_projections.csv"):
        (tmp_path / name).symlink_to(SHARED / "openi" / name)
    studies, skips = data.read_split(config(tmp_path, format="kaggle", views=3), "test")
    assert [(s.id, len(s.images)) for s in studies] == [("7", 2), ("1000", 3), ("1001", 1)]
    xml, _ = data.read_split(config(SHARED / "openi", format="openi"), "test")
    assert [(s.id, s.image.name, s.report) for s in studies] == [(s.id, s.image.name, s.report) for s in xml]
    assert len(studies) + sum(map(len, skips.values())) == 222


@pytest.mark.skipif(not (SHARED / "openi").exists(), reason=f"no real X-rays at {SHARED}")
def test_real_openi():
    studies, skips = data.read_split(config(SHARED / "openi", format="openi"), "test")
    names = ["CXR7_IM-2263-1001.png", "1000_IM-0003-1001.dcm.png", "1001_IM-0004-1001.dcm.png"]
    assert [s.image.name for s in studies] == names
    assert sum(map(len, skips.values())) + len(studies) == len(list((SHARED / "openi/ecgen-radiology").glob("*.xml")))
    _, skips = data.read_split(config(SHARED / "openi", format="openi", target="impression"), "test")
    assert skips["lateral view only"] == ["1164"]


# --------------------------------------------------------------------------------------------------------- order


def test_a_pass_is_a_permutation_that_depends_on_seed_and_pass():
    assert sorted(data.batch_ids(10, 10, seed=0, step=3)) == list(range(10))
    assert len({tuple(data.batch_ids(10, 10, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert data.batch_ids(10, 4, seed=0, step=1) == [3, 5, 9, 0]  # runs of any version see this order


def test_batches_run_through_the_epochs_without_dropping():
    seen = [i for step in range(10) for i in data.batch_ids(7, 3, seed=1, step=step)]
    assert seen == [i for epoch in range(5) for i in data.batch_ids(7, 7, 1, epoch)][:30]
    assert len(data.batch_ids(3, 8, 0, 0)) == 8


def test_a_unicode_line_break_inside_a_text_does_not_end_its_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "report": "one\u2028two"}\n\n{"id": "b"}\n', encoding="utf-8")
    assert [row["id"] for row in read_jsonl(tmp_path / "rows.jsonl")] == ["a", "b"]
