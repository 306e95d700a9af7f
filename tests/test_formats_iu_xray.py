"""iu_xray.py on records, XML files and tables that are not as they should be."""

import json
import os

import pytest
from test_data import KAGGLE, config, kaggle, openi, picture, r2gen, row

import data


def skipped(folder, split="test", **changes) -> tuple[list[str], dict[str, list[str]]]:
    studies, skips = data.read_split(config(folder, **changes), split)
    return [study.id for study in studies], skips


# --------------------------------------------------------------------------------------------------------- r2gen


def test_one_bad_record_is_a_counted_skip(tmp_path):
    folder = r2gen(tmp_path, {"test": [row("ok"), row("v")]})
    rows = json.loads((folder / "annotation.json").read_text())
    rows["test"] += [row("null", None), row("number", 5), row("list", ["x"]), {"id": "none", "image_path": []}]
    rows["test"] += [{"id": "i", "report": "x"}, {"id": "j", "report": "x", "image_path": "ok/0.png"}]
    rows["test"] += [{"id": "k", "report": "x", "image_path": [1]}, {"report": "x"}, "no record", None]
    rows["test"] += [row(float("nan")), row(1e400), row(["a"]), row(""), row(7)]
    (folder / "annotation.json").write_text(json.dumps(rows))
    assert skipped(folder) == (
        ["ok", "v"],
        {
            "report is no text": ["null", "number", "list", "none"],
            "image_path is no list of names": ["i", "j", "k"],
            "no id": [f"test[{number}]" for number in range(9, 16)],
            "no image file": ["7"],
        },
    )


@pytest.mark.parametrize("name", ["../../secret.png", "a/../../secret.png", "/etc/passwd", ".."])
def test_an_image_outside_the_folder_is_refused_by_row(tmp_path, name):
    folder = r2gen(tmp_path / "data", {"test": [row("ok")]})
    picture(tmp_path / "secret.png")
    (folder / "annotation.json").write_text(json.dumps({"test": [row("ok"), {**row("b"), "image_path": [name]}]}))
    with pytest.raises(ValueError, match=rf"annotation.json: test\[1\] \(b\): '{name}' leads out of .*images"):
        skipped(folder)


@pytest.mark.parametrize("labels", [["Cardiomegaly"], "cardiomegaly", [1.0, 0.0], {"edema": 1}])
def test_a_truth_that_is_not_the_phantoms_is_refused_by_row(tmp_path, labels):
    truth = [{"id": "a", "labels": ["edema"]}, {"id": "b", "labels": labels}]
    folder = r2gen(tmp_path, {"test": [row("a"), row("b")]}, truth)
    with pytest.raises(ValueError, match="truth.jsonl: row 2: labels .* are not a list of the phantom's"):
        skipped(folder)
    (folder / "truth.jsonl").write_text('{"id": "a", "labels": ["edema"]}\n{"id": "b", "labels": null}\n')
    with pytest.raises(ValueError, match="no labels for study b"):
        skipped(folder)


def test_a_byte_order_mark_costs_nothing(tmp_path):
    folder = r2gen(tmp_path, {"test": [row("a"), row("b", "\ufeffFindings: One.\r\nImpression: Two.\r\n")]})
    text = (folder / "annotation.json").read_text()
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (folder / "annotation.json").write_text(text, encoding=encoding)
        studies, _ = data.read_split(config(folder), "test")
        assert [study.report for study in studies] == [row("a")["report"], "FINDINGS: One. IMPRESSION: Two."]


def test_half_a_character_can_be_written_later(tmp_path):
    folder = r2gen(tmp_path, {"test": [row("a"), row("b", "Clear \ud800 \udc00x."), row("c", "\U0001f600 \\ud800")]})
    studies, _ = data.read_split(config(folder), "test")
    assert [study.report for study in studies[1:]] == ["Clear ? ?x.", "\U0001f600 \\ud800"]
    assert all(study.report.encode() for study in studies)


# ---------------------------------------------------------------------------------------------------------- openi


def test_xml_that_cannot_be_read_is_a_counted_skip(tmp_path):
    for uid in "123456789":
        openi(tmp_path, uid)
    picture(tmp_path / "images/CXR1_IM-1-1001.png")
    home = tmp_path / "ecgen-radiology"
    bomb = '<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">'
    text = "<e><Abstract><AbstractText Label='FINDINGS'>&c;</AbstractText></Abstract></e>"
    (home / "2.xml").write_text(f"<!DOCTYPE e [{bomb}]>{text}")
    (home / "3.xml").write_text('<!DOCTYPE e [<!ENTITY a SYSTEM "file:///etc/passwd">]><e>&a;</e>')
    (home / "4.xml").write_text('<?xml version="1.0" encoding="klingon"?><e/>')
    (home / "5.xml").write_text('<?xml version="1.0" encoding="rot13"?><e/>')
    (home / "6.xml").write_text("<e>")
    for number, make in ((7, os.mkfifo), (8, os.mkdir), (9, lambda path: path.symlink_to(path.name))):
        (home / f"{number}.xml").unlink()
        make(home / f"{number}.xml")
    assert skipped(tmp_path, format="openi") == (["1"], {"unreadable XML": list("23456789")})


def test_other_encodings_of_xml_are_read(tmp_path):
    for uid, encoding in (("1", "utf-16"), ("2", "iso-8859-1"), ("3", "utf-8-sig")):
        openi(tmp_path, uid, findings="Clear, caf\u00e9.")
        picture(tmp_path / f"images/CXR{uid}_IM-1-1001.png")
        path, declared = tmp_path / f"ecgen-radiology/{uid}.xml", encoding.removesuffix("-sig")
        path.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>{path.read_text()}'.encode(encoding))
    studies, _ = data.read_split(config(tmp_path, format="openi", target="findings"), "test")
    assert [study.report for study in studies] == 3 * ["Clear, caf\u00e9."]


@pytest.mark.parametrize("file", [5, None, ["a.png"], {"a": 1}, True])
def test_a_link_that_names_no_file_is_refused_by_row(tmp_path, file):
    openi(tmp_path, "10")
    rows = {"uid": 1, "file": "a.png"}, {"uid": 10, "file": file}
    (tmp_path / "images/pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="pairs.jsonl: row 2 needs a 'uid' and, as a text, a 'file'"):
        skipped(tmp_path, format="openi")


def test_a_link_out_of_the_folder_is_refused_by_row(tmp_path):
    openi(tmp_path, "10")
    (tmp_path / "images/pairs.jsonl").write_text('{"uid": 10, "file": "../../a.png"}\n')
    with pytest.raises(ValueError, match="pairs.jsonl: row 1: '../../a.png' leads out of .*images"):
        skipped(tmp_path, format="openi")


def test_any_name_of_a_view_is_understood_and_an_unknown_one_is_said(tmp_path, capsys):
    views = {"1": "AP", "2": "PA", "3": "lateral", "4": None, "5": 7, "6": "unknown", "7": "Postero-anterior"}
    for uid in views:
        openi(tmp_path, uid)
        picture(tmp_path / f"images/{uid}.png")
    pairs = [{"uid": uid, "file": f"{uid}.png", "view_seen": view} for uid, view in views.items()]
    (tmp_path / "images/pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    cfg = config(tmp_path, format="openi")
    studies = data.load_studies(cfg, "test")
    assert [(study.id, study.view_known) for study in studies] == [
        ("1", True), ("2", True), ("4", False), ("6", False), ("7", True)]  # fmt: skip
    assert "skipped 2: lateral view only 2 (3, 5); views not known: 2 studies" in capsys.readouterr().out
    assert "views not known: 2 studies" in data.card(cfg)


# --------------------------------------------------------------------------------------------------------- kaggle


def test_one_row_of_another_length_is_a_counted_skip(tmp_path):
    folder = kaggle(tmp_path, KAGGLE + "6,x,a,b,c\n7,x\n")
    assert skipped(folder, format="kaggle")[1]["row of another length"] == ["line 11", "line 12"]
    (folder / "annotation.json").write_text(json.dumps({"test": [{"id": "CXR1_IM-1"}, 3, {"id": None}]}))
    assert skipped(folder, format="kaggle")[1]["row of another length"] == ["line 11", "line 12"]


def test_images_without_a_projection_are_said(tmp_path, capsys):
    folder = kaggle(tmp_path, KAGGLE)
    table = (folder / "indiana_projections.csv").read_text().splitlines()
    (folder / "indiana_projections.csv").write_text("\n".join(line for line in table if not line.startswith("4,")))
    assert [study.view_known for study in data.load_studies(config(folder, format="kaggle"), "test")] == [True, False]
    assert "views not known: 1 studies" in capsys.readouterr().out
    for encoding in ("utf-16", "utf-8"):  # a spreadsheet's "Unicode text", and line ends of other systems
        (folder / "indiana_reports.csv").write_text(KAGGLE.replace("\n", "\r\n"), encoding=encoding, newline="")
        assert skipped(folder, format="kaggle")[0] == ["1", "4"]
