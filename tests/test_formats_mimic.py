"""mimic.py and the card: PhysioNet's layout, view choice, report sections, and what a broken table says."""

import gzip
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from test_data import config, picture
from test_formats_images import write_dicom

import data
from config import DataConfig
from formats import mimic

SHARED = Path(os.environ.get("VALOR_SHARED", Path(__file__).parents[2] / "shared" / "data"))
XRV = SHARED / "mimic_format" / "xrv_gen_mimic"
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with findings: cough  // pneumonia?

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation, pleural effusion or
 pneumothorax.  Size ___ cm.

 IMPRESSION:

 No acute process.
"""


def mimic_cfg(folder, **changes):
    return config(folder, format="mimic", **changes)


def gz(path: Path, lines: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def mimic_folder(folder: Path, studies: list[tuple]) -> Path:
    """studies: (subject, study, split, report or None, [(dicom id, ViewPosition, suffix or "" for no file), ...])."""
    split, metadata = ["dicom_id,study_id,subject_id,split"], ["dicom_id,subject_id,study_id,ViewPosition,Rows"]
    for subject, study, its_split, report, views in studies:
        home = folder / "files" / f"p{subject[:2]}" / f"p{subject}"
        (home / f"s{study}").mkdir(parents=True, exist_ok=True)
        if report is not None:
            (home / f"s{study}.txt").write_text(report)
        for dicom, view, suffix in views:
            split.append(f"{dicom},{study},{subject},{its_split}")
            metadata.append(f"{dicom},{subject},{study},{view},2544")
            if suffix == ".dcm":
                write_dicom(home / f"s{study}" / f"{dicom}.dcm", np.linspace(0, 4000, 256).reshape(16, 16))
            elif suffix:
                picture(home / f"s{study}" / f"{dicom}{suffix}")
    gz(folder / "mimic-cxr-2.0.0-split.csv.gz", split)
    gz(folder / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    return folder


STUDIES = [
    ("10000032", "50414267", "train", REPORT,
     [("a-lat", "LATERAL", ".jpg"), ("a-ap", "AP", ".jpg"), ("a-pa", "PA", ".jpg"), ("a-none", "", ".jpg")]),
    ("10000032", "01234567", "train", REPORT, [("b-ll", "LL", ".jpg")]),
    ("10000764", "53", "train", REPORT, [("c-ap", "AP", "")]),
    ("10000764", "54", "train", None, [("d-ap", "AP", ".jpg")]),
    ("10000764", "55", "train", " FINAL REPORT\n IMPRESSION: Clear.\n", [("e-ap", "AP", ".jpg")]),
    ("10000764", "56", "train", " \n", [("f-ap", "AP", ".jpg")]),
    ("11", "57", "train", REPORT, [("g-none", "", ".dcm"), ("g-ll", "LL", ".jpg")]),
    ("12", "58", "validate", REPORT, [("h-pa", "PA", ".png")]),
    ("13", "59", "test", REPORT, [("i-axial", "AP AXIAL", ".jpg")]),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- layout


def test_studies_ids_views_and_skips(tmp_path, capsys):
    folder = mimic_folder(tmp_path, STUDIES)
    first, second = data.load_studies(mimic_cfg(folder), "train")
    assert (first.id, first.image) == ("50414267", folder / "files/p10/p10000032/s50414267/a-pa.jpg")
    assert first.report == ("FINDINGS: There is no focal consolidation, pleural effusion or pneumothorax. Size ___ cm. "
                            "IMPRESSION: No acute process.")  # fmt: skip
    assert first.labels is None and first.images == [first.image]
    assert (second.id, second.image.name) == ("57", "g-none.dcm")
    line = capsys.readouterr().out
    for part in ("skipped 5: ", "lateral view only 1 (01234567)", "no image file 1 (53)", "no report file 1 (54)",
                 "no findings 1 (55)", "empty report 1 (56)"):  # fmt: skip
        assert part in line
    with pytest.raises(ValueError, match="data.strict forbids skips: 5: "):
        data.load_studies(mimic_cfg(folder, strict=True), "train")
    studies = data.load_studies(mimic_cfg(folder, views=3, target="impression"), "train")
    assert [[p.stem for p in s.images] for s in studies] == [["a-pa", "a-ap", "a-none"], ["e-ap"], ["g-none", "g-ll"]]


def test_val_and_validate_are_one_split(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES)
    for name in ("val", "validate"):
        [study] = data.load_studies(mimic_cfg(folder), name)
        assert (study.id, study.split) == ("58", name)
    assert data.load_studies(mimic_cfg(folder), "test")[0].id == "59"
    with pytest.raises(ValueError, match=r"split.csv.gz: no split 'sft'; it has train, validate, test"):
        data.load_studies(mimic_cfg(folder), "sft")


def test_reports_unpacked_beside_the_images_and_plain_csv(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    (folder / "mimic-cxr-reports/files/p13/p13").mkdir(parents=True)
    (folder / "files/p13/p13/s59.txt").rename(folder / "mimic-cxr-reports/files/p13/p13/s59.txt")
    for path in folder.glob("*.csv.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert data.load_studies(mimic_cfg(folder), "test")[0].image.stem == "i-axial"


def test_view_kinds():
    kinds = {"PA": "frontal", "AP": "frontal", "PA LLD": "frontal", "ANTERO-POSTERIOR": "frontal", "": None}
    kinds |= dict.fromkeys(("LATERAL", "LL", "LAO", "RAO", "XTABLE LATERAL", "SWIMMERS", "PALM"), "lateral")
    assert {view: mimic.view_kind(view) for view in kinds} == kinds


def test_the_view_code_stands_in_for_an_empty_view_position(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    gz(folder / "mimic-cxr-2.0.0-metadata.csv.gz",
       ["dicom_id,ViewPosition,ViewCodeSequence_CodeMeaning", "i-axial,,left lateral"])  # fmt: skip
    with pytest.raises(ValueError, match="no usable study among 1: 1: lateral view only 1"):
        data.load_studies(mimic_cfg(folder), "test")


# ------------------------------------------------------------------------------------------------------- sections


@pytest.mark.parametrize(
    ("text", "findings", "impression"),
    [
        (REPORT, "There is no focal consolidation, pleural effusion or pneumothorax. Size ___ cm.",
         "No acute process."),
        (" FINDINGS: a\n b: c\n NOTIFICATION: d\n CONCLUSION: e\n", "a b: c", "e"),  # only capitals start a section
        (" FINIDNGS: a\n IMPRSSION: b\n", "a", "b"),
        (" Findings:  a.\n findings: b\n Impression: c\n", "a. findings: b", "c"),
        (" FINDINGS AND IMPRESSION: a\n", "", "a"),
        (" PROVISIONAL FINDINGS IMPRESSION (PFI): a\n", "", ""),
        (" PA AND LATERAL CHEST: a\n IMPRESSION: b\n", "a", "b"),
        (" CHEST, TWO VIEWS: a\n FINDINGS: b\n PORTABLE CHEST: c\n", "b", ""),
        (" REASON FOR CHEST X-RAY: a\n", "", ""),
        (" FINDINGS: a\n IMPRESSION: b\n IMPRESSION:\n", "a", "b"),  # an empty repetition changes nothing
        (" FINDINGS: a\n IMPRESSION: b\n IMPRESSION: c\n", "a", "c"),
        (" WET READ: x\n ADDENDUM  IMPRESSION: y\n " + 40 * "_" + "\n    FINAL REPORT\n FINDINGS: a\n IMPRESSION: b\n",
         "a", "b"),
        (" FINDINGS: a\n " + 40 * "_" + "\n dictated by ___\n", "a", ""),
        ("no header at all", "", ""),
    ],
)  # fmt: skip
def test_report_sections(text, findings, impression):
    assert mimic.report_sections(text) == {"findings": findings, "impression": impression}


def test_section_names():
    names = {"findings": "FINDING FINDINS FINDINDGS FINDNGS FINIDNGS FIDINGS FINDING(S)",
             "impression": "IMPRESSIONS IMPRESSON IMORESSION IMPRESSOIN MPRESSION IMPESSION CONCLUSION CONCUSION",
             "other": "INDICATION NDICATION COMPARISON COMPARISION EXAMINATION TECHNIQUE ADDENDUM HISTORY"}  # fmt: skip
    for name, headers in names.items():
        assert {mimic.section_name(header) for header in headers.split()} == {name}


# ----------------------------------------------------------------------------------------------------- bad tables


def test_broken_tables_are_one_line(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    split, metadata = (folder / f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("split", "metadata"))
    good = split.read_bytes()

    def message() -> str:
        with pytest.raises(ValueError) as error:
            data.load_studies(mimic_cfg(folder), "test")
        assert "\n" not in str(error.value)
        return str(error.value)

    gz(split, ["dicom_id,study_id,split", "a,b,test"])
    assert re.search(r"split.csv.gz: no column 'subject_id'; it has dicom_id, study_id, split", message())
    gz(split, ["dicom_id,study_id,subject_id,split", "a,b,c,test", "a,b"])
    assert "line 3: not 4 fields" in message()
    gz(split, ["dicom_id,study_id,subject_id,split", "a,b,c,test", "a,b,c,test"])
    assert "dicom_id a of study b occurs twice" in message()
    for broken in (good[:-12], b"dicom_id,study_id,subject_id,split\n"):
        split.write_bytes(broken)
        assert "split.csv.gz: cannot be read" in message() and "is it there, whole" in message()
    split.write_bytes(gzip.compress(b"dicom_id,study_id,subject_id,split\n\xff,1,1,test\n"))
    assert "split.csv.gz: cannot be read ('utf-8' codec" in message()
    split.unlink()
    assert "no mimic-cxr-2.0.0-split.csv.gz; copy it from MIMIC-CXR-JPG" in message()
    split.write_bytes(good)
    (folder / "files/p13/p13/s59.txt").write_bytes(b" FINDINGS: \xff")
    assert re.search(r"s59.txt: cannot be read .*in position 11", message())
    metadata.unlink()
    assert "no mimic-cxr-2.0.0-metadata.csv.gz; copy it" in message()


def test_unreadable_and_tiny_images_are_counted(tmp_path):
    views = [(f"{name}-pa", "PA", ".jpg") for name in "abc"]
    folder = mimic_folder(tmp_path, [("10", str(i), "test", REPORT, [view]) for i, view in enumerate(views)])
    home = folder / "files/p10/p10"
    whole = (home / "s0/a-pa.jpg").read_bytes()
    (home / "s0/a-pa.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    picture(home / "s1/b-pa.jpg", side=1)
    (home / "s2/c-pa.jpg").unlink()
    write_dicom(home / "s2/c-pa.dcm")
    with pytest.raises(ValueError, match=r"unreadable image 2 \(0, 2\), image too small 1 \(1\)"):
        data.load_studies(mimic_cfg(folder), "test")


# -------------------------------------------------------------------------------------- the card, R2Gen's MIMIC file


def test_card_counts_labels_and_tokens(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES)
    gz(folder / "mimic-cxr-2.0.0-chexpert.csv.gz",
       ["subject_id,study_id,Edema,Fracture", "1,50414267,1.0,-1.0", "11,57,0.0,", "13,59,1.0,1.0"])  # fmt: skip
    text = data.card(mimic_cfg(folder), lambda texts, **_: {"input_ids": [list(text) for text in texts]})
    lines = text.splitlines()
    words, letters = 17, len(data.load_studies(mimic_cfg(folder), "val")[0].report)
    assert f"train           2  {' / '.join(4 * [str(words)])}  tokens {' / '.join(4 * [str(letters)])}" in lines
    assert "no report file 1 (54)" in lines[3]
    assert lines[4].strip() == "CheXpert positive % (2 of 2 studies labelled): Edema 50, Fracture 0"
    assert sum(line.startswith("val ") for line in lines) == 1


def test_the_card_goes_on_without_a_tokenizer(tmp_path, capsys):
    assert data.load_tokenizer(str(tmp_path)) is None
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("lengths in words only: the tokenizer of model.path")


def test_r2gens_mimic_json(tmp_path):
    record = {"id": "02aa-1", "study_id": 50414267, "subject_id": 10000032, "report": "Clear lungs .", "split": "train",
              "image_path": ["p10/p10000032/s50414267/02aa-1.jpg"]}  # fmt: skip
    (tmp_path / "annotation.json").write_text(json.dumps({"train": [record], "val": [], "test": []}))
    picture(tmp_path / "images" / record["image_path"][0])
    [study] = data.load_studies(config(tmp_path, target="findings"), "train")
    assert (study.id, study.report, study.image.name) == ("02aa-1", "Clear lungs .", "02aa-1.jpg")


def test_the_config_offers_every_layout():
    assert DataConfig().views == 1
    assert set(DataConfig.__dataclass_fields__["format"].type.__args__) == set(data.ROWS)


# ---------------------------------------------------------------------------------------------- --- real files


@pytest.mark.skipif(not XRV.exists(), reason=f"no random data in MIMIC's layout at {XRV}")
def test_torchxrayvisions_random_mimic(tmp_path):
    """Its metadata, labels and images as they are; the split and the reports, which it lacks, are made here."""
    with tarfile.open(XRV / "images-224.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "gen_mimic" / "images-224"
    shutil.copy(XRV / "mimic-cxr-2.0.0-metadata.csv.gz", folder)
    shutil.copy(XRV / "mimic-cxr-2.0.0-negbio.csv.gz", folder / "mimic-cxr-2.0.0-chexpert.csv.gz")
    rows = list(mimic.read_csv(folder / "mimic-cxr-2.0.0-metadata.csv.gz", ("dicom_id",)))
    gz(folder / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id,study_id,subject_id,split",
       *(f"{r['dicom_id']},{r['study_id']},{r['subject_id']},train" for r in rows)])  # fmt: skip
    for r in rows:
        (folder / f"files/p{r['subject_id'][:2]}/p{r['subject_id']}/s{r['study_id']}.txt").write_text(REPORT)
    studies, skips = data.read_split(mimic_cfg(folder), "train")
    frontal = {r["study_id"] for r in rows if r["ViewPosition"] in ("PA", "AP")}
    assert {study.id for study in studies} == frontal and sum(map(len, skips.values())) == len(rows) - len(frontal)
    assert data.read_views(studies[0])[0].size == (224, 224)
    assert f"({len(studies)} of {len(studies)} studies labelled)" in mimic.chexpert_lines(folder, frontal)[0]
