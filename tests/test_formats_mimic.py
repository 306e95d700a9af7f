"""mimic.py and the card: PhysioNet's layout, view choice, report sections, and what a broken table says."""

import gzip
import json
import os
import re
import shutil
import tarfile
import time
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
    with pytest.raises(ValueError, match=r"split.csv.gz: no split 'sft'; it has 'train', 'validate', 'test'"):
        data.load_studies(mimic_cfg(folder), "sft")


def test_reports_unpacked_beside_the_images_and_plain_csv(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    (folder / "mimic-cxr-reports/files/p13/p13").mkdir(parents=True)
    (folder / "files/p13/p13/s59.txt").rename(folder / "mimic-cxr-reports/files/p13/p13/s59.txt")
    for path in folder.glob("*.csv.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert data.load_studies(mimic_cfg(folder), "test")[0].image.stem == "i-axial"


def test_the_view_code_stands_in_for_an_empty_view_position(tmp_path):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    gz(folder / "mimic-cxr-2.0.0-metadata.csv.gz",
       ["dicom_id,ViewPosition,ViewCodeSequence_CodeMeaning", "i-axial,,left lateral"])  # fmt: skip
    with pytest.raises(ValueError, match="no usable study among 1: 1: lateral view only 1"):
        data.load_studies(mimic_cfg(folder), "test")


# ------------------------------------------------------------------------------------------------------- sections


# (report below its line FINAL REPORT, (findings, impression), what MIT-LCP's section_parser.py, run on the same text,
# made of it, why we differ): the last two only where we do
HEADER_FORMS = [
    ("EXAMINATION: CHEST (PA AND LAT)\n INDICATION: Cough.\n FINDINGS: Clear.\n IMPRESSION: Normal.",
     ("Clear.", "Normal.")),
    ("TECHNIQUE: Two views.\n FINDINGS:\n\n Clear lungs.\n No effusion.\n\n IMPRESSION:\n\n 1. Normal.\n 2. No change.",
     ("Clear lungs. No effusion.", "1. Normal. 2. No change.")),
    ("FINDINGS: Clear.\n RECOMMENDATION(S): Repeat.\n IMPRESSION: Normal.\n NOTIFICATION: Told Dr. ___.",
     ("Clear.", "Normal.")),
    ("FINDINGS: Clear.\n IMPRESSION: Normal.\n COMMENT: Motion.", ("Clear.", "Normal.")),
    ("IMPRESSION: Normal.\n FINDINGS: Clear.", ("Clear.", "Normal.")),
    ("FINDINGS: Clear.\n CONCLUSION: Normal.", ("Clear.", "Normal.")),
    ("INDICATION: Fever.\n FINDINGS AND IMPRESSION: Clear.", ("", "Clear.")),
    ("FINDINGS/IMPRESSION: Clear.", ("", "Clear.")),
    ("FINDINGS/ IMPRESSION: Clear.", ("", "Clear.")),
    ("IMPRESSION AND RECOMMENDATION(S): Repeat the film.", ("", "Repeat the film.")),
    ("FINAL IMPRESSION: Normal.", ("", "Normal.")),
    ("FINDINGS: Old text.\n FINDINGS: New text.", ("New text.", "")),
    ("FINDINGS: Clear.\n IMPRESSION: Normal.\n IMPRESSION:\n", ("Clear.", "Normal.")),
    ("FINDING: Clear.\n IMPRESSIONS: Normal.", ("Clear.", "Normal.")),
    ("INDICATION: Findings of pneumonia: cough.\n FINDINGS: Clear.", ("Clear.", "")),
    ("FINDINGS: Clear at 10:30. No: effusion.\n a: b", ("Clear at 10:30. No: effusion. a: b", "")),
    ("HISTORY: Fever.\n REASON FOR EXAM: Cough.\n FINDINGS: Clear.", ("Clear.", "")),
    ("PA AND LATERAL CHEST: Clear.\n IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("CHEST, TWO VIEWS: Clear.", ("Clear.", "")),
    ("INDICATION: Cough.\n PA AND LATERAL CHEST: Clear.\n IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("IMPRESSION: Normal.\n PORTABLE CHEST: Clear.", ("Clear.", "Normal.")),
    ("PORTABLE CHEST EXAM: Clear.\n IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("PORTABLE AP CHEST RADIOGRAPH: Clear.", ("Clear.", "")),
    ("FRONTAL AND LATERAL VIEWS OF THE CHEST: Clear.", ("Clear.", "")),
    ("SINGLE FRONTAL VIEW: Clear.", ("Clear.", "")),
    ("AP UPRIGHT CHEST: Clear.", ("Clear.", "")),
    ("LATERAL AND PA: Clear.", ("Clear.", "")),
    ("RIBS, FOUR VIEWS: No fracture.", ("No fracture.", "")),
    ("CHEST, PA LATERAL:\n\n INDICATION: Cough.\n FINDINGS: Clear.", ("Clear.", "")),
    ("FINDINGS:\n PA AND LATERAL CHEST: Clear.\n IMPRESSION: Normal.",
     ("Clear.", "Normal."), ("PA AND LATERAL CHEST: Clear.", "Normal."),
     "the line below a header may hold a header, too"),
    ("CHEST, 2 VIEWS: Clear.", ("Clear.", ""), ("", ""), "digits belong to a header"),
    ("CHEST RADIOGRAPH, ___: Clear.", ("Clear.", ""), ("", ""), "so does the mark of a removed date"),
    ("PA/LATERAL: Clear.", ("Clear.", ""), ("", ""), "another way to write PA and lateral"),
    ("CXR: Clear.", ("Clear.", ""), ("", ""), "another word for a chest radiograph"),
    ("VIEWS: PA and lateral.\n FINDINGS: Clear.", ("Clear.", "")),
    ("NUMBER OF VIEWS: Two.\n IMPRESSION: Normal.", ("", "Normal.")),
    ("REASON FOR CHEST X-RAY: Cough.\n IMPRESSION: Normal.",
     ("", "Normal."), ("Cough.", "Normal."), "a reason is no finding"),
    ("COMPARISON CHEST RADIOGRAPH: ___.\n FINDINGS: Clear.", ("Clear.", "")),
    ("FINDINGS: Clear.\n PORTABLE CHEST: No change.",
     ("Clear. PORTABLE CHEST: No change.", ""), ("No change.", ""), "a view inside the findings is a sub-heading"),
    ("CHEST: Clear.\n RIBS: No fracture.\n IMPRESSION: Normal.",
     ("Clear. RIBS: No fracture.", "Normal."), ("No fracture.", "Normal."),
     "a view inside the findings is a sub-heading"),
    ("FINDINGS: Two views.\n LUNGS: Clear.\n HEART: Large.\n IMPRESSION: Cardiomegaly.",
     ("Two views. LUNGS: Clear. HEART: Large.", "Cardiomegaly."), ("Two views.", "Cardiomegaly."), "sub-headings"),
    ("FINDINGS:\n LINES AND TUBES: None.\n LUNGS: Clear.\n IMPRESSION: Normal.",
     ("LINES AND TUBES: None. LUNGS: Clear.", "Normal."), ("LINES AND TUBES: None.", "Normal."), "sub-headings"),
    ("FINDINGS: Tubes first.\n ETT: 4 cm above the carina.\n NG TUBE: In the stomach.\n IMPRESSION: Good.",
     ("Tubes first. ETT: 4 cm above the carina. NG TUBE: In the stomach.", "Good."), ("Tubes first.", "Good."),
     "sub-headings"),
    ("FINDINGS: Drains.\n CHEST TUBES: Two on the left.\n IMPRESSION: No pneumothorax.",
     ("Drains. CHEST TUBES: Two on the left.", "No pneumothorax."), ("Two on the left.", "No pneumothorax."),
     "sub-headings; MIT-LCP: a view"),
    ("IMPRESSION: Stable.\n CHEST WALL: Intact.\n LUNGS: Clear.",
     ("", "Stable. CHEST WALL: Intact. LUNGS: Clear."), ("Intact.", "Stable."), "sub-headings; MIT-LCP: a view"),
    ("FINDINGS: Spine.\n COMPRESSION: T8, old.\n IMPRESSION: No change.",
     ("Spine. COMPRESSION: T8, old.", "No change."), ("Spine.", "No change."), "a sub-heading, merely like IMPRESSION"),
    ("IMPRESSION: Stable.\n DEPRESSION: Of the sternum.",
     ("", "Stable. DEPRESSION: Of the sternum."), ("", "Stable."), "a sub-heading, merely like IMPRESSION"),
    ("FINDINGS: Left lung.\n CONTUSION: At the base.\n FUNDUS: Gas.",
     ("Left lung. CONTUSION: At the base. FUNDUS: Gas.", ""), ("Left lung.", ""),
     "sub-headings, merely like CONCLUSION and FINDINGS"),
    ("FINDINGS: Clear.\n Bones: intact.\n Heart: normal.\n IMPRESSION: Normal.",
     ("Clear. Bones: intact. Heart: normal.", "Normal.")),
    ("FINDINGS: Clear.\n INCIDENTAL FINDINGS: Gallstone.\n IMPRESSION: Normal.",
     ("Clear. Incidental findings: Gallstone.", "Normal."), ("Gallstone.", "Normal."),
     "findings with an adjective are a sub-heading"),
    ("RADIOGRAPHIC FINDINGS: Clear.", ("Clear.", "")),
    ("REFERENCE FINDINGS: Clear.", ("Clear.", "")),
    ("FINDINGS: Left pneumothorax.\n NOTIFICATION OF CRITICAL FINDINGS: Told Dr. ___.",
     ("Left pneumothorax.", ""), ("Told Dr. ___.", ""), "a message is no finding"),
    ("FINDINGS: Left pneumothorax.\n COMMUNICATION OF FINDINGS: By phone.\n IMPRESSION: Drain it.",
     ("Left pneumothorax.", "Drain it."), ("By phone.", "Drain it."), "a message is no finding"),
    ("CRITICAL FINDINGS: Phoned.\n IMPRESSION: Normal.",
     ("", "Normal."), ("Phoned.", "Normal."), "a message is no finding"),
    ("PROVISIONAL FINDINGS IMPRESSION (PFI): Clear.\n FINDINGS: Small effusion.\n IMPRESSION: Effusion.",
     ("Small effusion.", "Effusion.")),
    ("IMPRESSION: Effusion.\n PRELIMINARY IMPRESSION: Clear.",
     ("", "Effusion."), ("", "Clear."), "a resident's reading is not the report's"),
    ("PRELIMINARY FINDINGS: Clear.", ("", ""), ("Clear.", ""), "a resident's reading is not the report's"),
    ("IMPRESSION: Normal.\n ADDENDUM IMPRESSION: See above.",
     ("", "Normal."), ("", "See above."), "an addendum is not the report"),
    ("WET READ: Effusion.\n FINDINGS: Clear.", ("Clear.", "")),
    ("CLINICAL IMPRESSION: Pneumonia.\n FINDINGS: Clear.",
     ("Clear.", ""), ("Clear.", "Pneumonia."), "what the clinician suspects"),
    ("FINDINGS: Clear.\n PRIOR FINDINGS: Effusion.", ("Clear.", ""), ("Effusion.", ""), "of another study"),
    ("FINIDNGS: Clear.\n IMPRSSION: Normal.", ("Clear.", "Normal.")),
    ("FIDINGS: Clear.\n IMPRESSSION: Normal.",
     ("Clear.", "Normal."), ("", ""), "a misspelling that is not in MIT-LCP's list"),
    ("FINDINGS: Clear.\n COMPARISION: None.\n IMPRESSION: Normal.", ("Clear.", "Normal.")),
    ("NDICATION: Cough.\n FINDINGS: Clear.",
     ("Clear.", ""), ("Clear.", "Cough."), "MIT-LCP's list calls NDICATION the impression"),
    ("Findings: Clear.\n Impression: Normal.", ("Clear.", "Normal."), ("", ""), "Title case"),
    ("FINDINGS: Clear.\n Comparison: None.\n Impression: Normal.",
     ("Clear.", "Normal."), ("Clear. Comparison: None. Impression: Normal.", ""), "Title case"),
    ("FINDINGS: No acute\n findings: old scars.\n IMPRESSION: Normal.", ("No acute findings: old scars.", "Normal.")),
    ("FINDINGS : Clear.\n IMPRESSION : Normal.", ("Clear.", "Normal.")),
    ("FINDINGS:Clear.\n IMPRESSION:Normal.", ("Clear.", "Normal."), ("", ""), "no blank after the colon"),
    ("FINDINGS:\tClear.\r\n IMPRESSION:\r\n Normal.\r\n", ("Clear.", "Normal.")),
    ("FINDINGS: The FINAL REPORT will follow.\n IMPRESSION: Normal.", ("The FINAL REPORT will follow.", "Normal.")),
    ("FINDINGS: Clear.\n IMPRESSION: Normal.\n FINAL REPORT\n",
     ("Clear.", "Normal."), ("Clear.", "Normal. FINAL REPORT"), "a line that nothing follows is no start"),
    ("FINDINGS: Clear.\n ____________________\n Dictated by ___",
     ("Clear.", ""), ("Clear. ____________________ Dictated by ___", ""),
     "what stands below a line of underscores is an addendum"),
    ("Lungs are clear.", ("", "")),
]  # fmt: skip


@pytest.mark.parametrize("case", HEADER_FORMS, ids=lambda case: case[0][:40])
def test_header_forms(case):
    text, ours, *difference = case
    found = mimic.report_sections(f"{'FINAL REPORT':>45}\n {text}\n")
    assert (found.get("findings", ""), found.get("impression", "")) == ours
    assert not difference or difference[0] != ours and difference[1]


def test_only_the_last_report_of_a_file_counts():
    rule, sections = f"\n {40 * '_'}\n", {"findings": "a", "impression": "b"}
    for head in ("WET READ: x\n FINDINGS: y\n", f"ADDENDUM  IMPRESSION: y {rule}", f"IMPRESSION: y{rule}", ""):
        assert mimic.report_sections(f" {head}    FINAL REPORT\n FINDINGS: a\n IMPRESSION: b\n") == sections
        assert mimic.report_sections(f" {head}  FINAL REPORT:  \r\n FINDINGS: a\r\n IMPRESSION: b\r\n") == sections
    text = "FINDINGS: a\n IMPRESSION: b\n no FINAL REPORT yet\n"
    assert mimic.report_sections(text) == sections | {"impression": "b no FINAL REPORT yet"}
    assert mimic.report_sections("FINDINGS: a\nIMPRESSION: b\n FINAL REPORT\n \n") == sections
    assert mimic.report_sections(" \n") == {"findings": "", "impression": ""}
    assert mimic.report_sections("no header at all") == mimic.report_sections(" HISTORY: x\n TECHNIQUE: y\n") == {}


def test_section_names():
    names = {"findings": "FINDING FINDINS FINDINDGS FINDNGS FINIDNGS FIDINGS FINDING(S)",
             "impression": "IMPRESSIONS IMPRESSON IMORESSION IMPRESSOIN MPRESSION IMPESSION CONCLUSION CONCLUSIONS",
             "other": "INDICATION NDICATION COMPARISON COMPARISION EXAMINATION TECHNIQUE ADDENDUM HISTORY VIEWS EXAM",
             "": "COMPRESSION EXPRESSION REPRESSION CONTUSION CONCUSSION PERMISSION LUNGS ETT HEART BONES"}  # fmt: skip
    for name, headers in names.items():
        assert [header for header in headers.split() if mimic.section_name(header) != name] == []


def test_a_report_of_a_megabyte_takes_no_minute():
    started = time.process_time()
    for text in ("A: \n", "CHEST: x\n", "FINDINGS: a\n", "A" + 80 * " ", 9 * "_" + "\n", 1000 * "A", "Lung: x\n"):
        mimic.report_sections(text * (1_000_000 // len(text)))
        data.target_text({"findings": text * (1_000_000 // len(text)), "impression": "b"}, "both")
    assert time.process_time() - started < 20


# ------------------------------------------------------------------------------------------------ bad files, bad tables


def test_report_files_of_other_systems_and_broken_ones(tmp_path, capsys):
    names = ["mark", "utf16", "lines", "latin", "pipe", "headless", "blank"]
    studies = [("10", name, "test", REPORT, [(f"{name}-pa", "PA", ".jpg")]) for name in names]
    home = mimic_folder(tmp_path, studies) / "files/p10/p10"
    (home / "smark.txt").write_text(REPORT.partition("\n")[2].lstrip(), encoding="utf-8-sig")  # begins with a header
    (home / "sutf16.txt").write_text(REPORT, encoding="utf-16")
    (home / "slines.txt").write_text(REPORT, newline="\r\n")
    (home / "slatin.txt").write_bytes(f"{REPORT} caf\u00e9".encode("latin-1"))
    (home / "spipe.txt").unlink()
    os.mkfifo(home / "spipe.txt")
    (home / "sheadless.txt").write_text("FINAL REPORT\n The lungs are clear.\n")
    (home / "sblank.txt").write_text("FINAL REPORT\n FINDINGS:\n IMPRESSION:\n")
    found = data.load_studies(mimic_cfg(tmp_path), "test")
    assert [study.id for study in found] == names[:3] and len({study.report for study in found}) == 1
    assert ("skipped 4: unreadable report file 2 (latin, pipe), no FINDINGS or IMPRESSION header 1 (headless), "
            "empty report 1 (blank)") in capsys.readouterr().out  # fmt: skip


def test_views_that_the_table_does_not_tell_are_said(tmp_path, capsys):
    data.load_studies(mimic_cfg(mimic_folder(tmp_path, STUDIES)), "train")
    assert "views not known: 1 studies, whose first image may be a lateral one; ViewPosition" in capsys.readouterr().out
    data.load_studies(mimic_cfg(tmp_path), "val")
    assert "views" not in capsys.readouterr().out


@pytest.mark.parametrize("row", ["../../../x,1,10,test", "x,../../../1,10,test", "x,1,../../..,test"])
def test_ids_that_lead_out_of_the_folder_are_refused(tmp_path, row):
    folder = mimic_folder(tmp_path, STUDIES[-1:])
    gz(folder / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id,study_id,subject_id,split", row])
    with pytest.raises(ValueError, match=r"split.csv.gz: 'p.*' leads out of .*files"):
        data.load_studies(mimic_cfg(folder), "test")




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
    assert re.search(r"split.csv.gz: no column 'subject_id'; it has 'dicom_id', 'study_id', 'split'", message())
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
    assert "no mimic-cxr-2.0.0-split.csv.gz; copy it from physionet.org" in message()
    split.write_bytes(good)
    (folder / "files/p13/p13/s59.txt").write_bytes(b" FINDINGS: \xff")
    assert "no usable study among 1: 1: unreadable report file 1 (59)" in message()
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
    assert lines[4].strip().startswith("views not known: 1 studies")
    assert lines[5].strip() == "CheXpert positive % (2 of 2 studies labelled): Edema 50, Fracture 0"
    assert sum(line.startswith("val ") for line in lines) == 1


def test_the_card_goes_on_without_a_tokenizer(tmp_path, capsys, monkeypatch):
    folder = mimic_folder(tmp_path, STUDIES)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    for model in (tmp_path, tmp_path / "none"):
        flags = ["--data.path", str(folder), "--data.format", "mimic", "--data.sft-split", "train"]
        monkeypatch.setattr("sys.argv", ["data.py", *flags, "--model.path", str(model)])
        data.main()
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith("lengths in words only: ") and second.startswith(str(folder))


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


@pytest.mark.parametrize("header", [
    "ADDITIONAL FINDINGS", "SKELETAL FINDINGS", "SINCE PRIOR", "COMPARED WITH PREVIOUS", "HISTORY OF CABG",
    "PROCEDURE LINES", "CLINICAL CORRELATION", "EXAMINATION LIMITED BY ROTATION",
])  # fmt: skip
def test_a_sub_heading_inside_the_findings_keeps_its_text(header):
    text = f" FINAL REPORT\n FINDINGS: Clear.\n {header}: Large effusion.\n IMPRESSION: New.\n"
    sections = mimic.report_sections(text)
    target, fault = data.target_text(sections, "both")
    assert "Large effusion." in target and target.endswith("IMPRESSION: New.") and not fault
    assert target.count("FINDINGS:") == target.count("IMPRESSION:") == 1
