"""MIMIC-CXR(-JPG) in PhysioNet's layout: the rows that data.py reads, and the sections of its reports.

    <folder>/mimic-cxr-2.0.0-split.csv.gz        dicom_id, study_id, subject_id, split (train, validate, test)
    <folder>/mimic-cxr-2.0.0-metadata.csv.gz     dicom_id, ViewPosition, ... (both come with MIMIC-CXR-JPG)
    <folder>/mimic-cxr-2.0.0-chexpert.csv.gz     optional: subject_id, study_id, 14 labels; for the card alone
    <folder>/files/p10/p10000032/s50414267.txt   the report; mimic-cxr-reports/files/... is looked at first
    <folder>/files/p10/p10000032/s50414267/<dicom_id>.jpg, .png or .dcm

A study is one row, its id the study_id. Among its images PA comes before AP, then views that are not known; a study
with none of these is "lateral view only". Section headers are read as in MIT-LCP's section_parser.py, with three
differences: misspelt headers are recognised by likeness instead of a list, only the text below the last FINAL REPORT
counts (an addendum or a wet read stands above it), and a header that names a view ("PA AND LATERAL CHEST:") gives the
findings only where no header says FINDINGS.
"""

import difflib
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from formats.files import Row, frontal_first, pick_split, read_csv, read_text

HEADER = re.compile(r"^[ \t]*([A-Z][A-Z ()/,&-]*|Findings|Impression)[ \t]*:(?=\s)", re.MULTILINE)
RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)  # the line of underscores between a report and its addendum
OTHER_HEADERS = ("indication", "reason", "history", "comparison", "technique", "exam", "addendum",
                 "wet read", "recommendation", "notification", "clinical", "pfi")  # fmt: skip
VIEW_HEADERS = ("chest", "portable", "view", "ap and lat", "pa and lat", "frontal", "lateral and", "ribs")


def mimic_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of one split's studies, in the order of the split's table."""
    table, views = _table(folder, "split"), _views(folder)
    studies = {}  # {(split, subject, study): [dicom_id, ...]}
    for row in read_csv(table, ("dicom_id", "study_id", "subject_id", "split")):
        images = studies.setdefault((row["split"], row["subject_id"], row["study_id"]), [])
        if row["dicom_id"] in images:
            raise ValueError(f"{table}: dicom_id {row['dicom_id']} of study {row['study_id']} occurs twice")
        images.append(row["dicom_id"])
    split = pick_split(table, dict.fromkeys(key[0] for key in studies), split)
    reports = folder / "mimic-cxr-reports" / "files"
    reports = reports if reports.is_dir() else folder / "files"
    for (its_split, subject, study), dicoms in studies.items():
        if its_split != split:
            continue
        place, found = Path(f"p{subject[:2]}") / f"p{subject}" / f"s{study}", []
        for dicom in sorted(dicoms, key=lambda dicom: not views.get(dicom, "").startswith("PA")):
            files = (folder / "files" / place / f"{dicom}{suffix}" for suffix in (".jpg", ".png", ".dcm"))
            found += [(path, view_kind(views.get(dicom, ""))) for path in files if path.is_file()][:1]
        path = reports / place.with_suffix(".txt")
        sections = report_sections(read_text(path)) if path.is_file() else None
        yield Row(study, sections, *frontal_first(found))


def view_kind(view: str) -> str | None:
    """"frontal" for PA, AP, "AP AXIAL", "postero-anterior" and the like, None for "", else "lateral"."""
    if not view:
        return None
    return "frontal" if re.match(r"(PA|AP|POSTERO-?ANTERIOR|ANTERO-?POSTERIOR)\b", view) else "lateral"


def _views(folder: Path) -> dict[str, str]:
    """{dicom_id: view in capitals}: ViewPosition, or where that is empty the meaning of the view code, or ""."""
    rows = read_csv(_table(folder, "metadata"), ("dicom_id", "ViewPosition"))
    return {r["dicom_id"]: (r["ViewPosition"] or r.get("ViewCodeSequence_CodeMeaning", "")).upper() for r in rows}


def _table(folder: Path, name: str) -> Path:
    found = [p for suffix in (".csv.gz", ".csv") for p in sorted(folder.glob(f"mimic-cxr-*-{name}{suffix}"))]
    if found:
        return found[0]
    raise ValueError(f"{folder}: no mimic-cxr-2.0.0-{name}.csv.gz; copy it from MIMIC-CXR-JPG "
                     "(physionet.org/content/mimic-cxr-jpg), which holds it for the DICOM release too")  # fmt: skip


def report_sections(text: str) -> dict[str, str]:
    """{"findings": str, "impression": str} of a MIMIC-CXR report file, white space collapsed, "" for what is not there.

    The last section of a name that holds any text counts. A merged "FINDINGS AND IMPRESSION:" is the impression, as in
    MIT-LCP's parser, and CONCLUSION is another word for it.
    """
    text = RULE.sub("ADDENDUM: ", text.rpartition("FINAL REPORT")[2])
    parts = HEADER.split(text)  # [before the first header, header, body, header, body, ...]
    found = {}
    for header, body in zip(parts[1::2], parts[2::2], strict=True):
        if body.strip():
            found[section_name(header)] = " ".join(body.split())
    return {"findings": found.get("findings") or found.get("view", ""), "impression": found.get("impression", "")}


@functools.cache
def section_name(header: str) -> str:
    """"findings", "impression", "view" (a header that names the views: findings follow) or "other"."""
    name = " ".join(header.lower().split())
    if "provisional" in name:  # PROVISIONAL FINDINGS IMPRESSION (PFI), a resident's first reading
        return "other"
    for section, words in (("impression", ("impression", "conclusion")), ("findings", ("findings",))):
        if any(word in name for word in words) or difflib.get_close_matches(name, words, cutoff=0.8):
            return section
    named_view = any(word in name for word in VIEW_HEADERS) and not any(word in name for word in OTHER_HEADERS)
    return "view" if named_view else "other"


def chexpert_lines(folder: Path, ids: set[str]) -> list[str]:
    """["CheXpert positive %: Atelectasis 33, ..."] over the studies `ids`; [] where the folder has no such table."""
    if not any(folder.glob("mimic-cxr-*-chexpert.csv*")):
        return []
    rows = [row for row in read_csv(_table(folder, "chexpert"), ("subject_id", "study_id")) if row["study_id"] in ids]
    labels = [column for column in (rows[0] if rows else ()) if column not in ("subject_id", "study_id")]
    counts = {label: sum(row[label] in ("1", "1.0") for row in rows) for label in labels}
    shares = ", ".join(f"{label} {100 * count / len(rows):.0f}" for label, count in counts.items())
    return [f"CheXpert positive % ({len(rows)} of {len(ids)} studies labelled): {shares}"]
