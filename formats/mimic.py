"""MIMIC-CXR(-JPG) in PhysioNet's layout: the rows that data.py reads, and the sections of its reports.

    <folder>/mimic-cxr-2.0.0-split.csv.gz        dicom_id, study_id, subject_id, split (train, validate, test)
    <folder>/mimic-cxr-2.0.0-metadata.csv.gz     dicom_id, ViewPosition, ... (both come with MIMIC-CXR-JPG)
    <folder>/mimic-cxr-2.0.0-chexpert.csv.gz     optional: subject_id, study_id, 14 labels; for the card alone
    <folder>/files/p10/p10000032/s50414267.txt   the report; mimic-cxr-reports/files/... is looked at first
    <folder>/files/p10/p10000032/s50414267/<dicom_id>.jpg, .png or .dcm

The sections are those of MIT-LCP's mimic-cxr/txt/section_parser.py, except: a capital header that is not known (LUNGS:,
ETT:), or that names a view inside the findings, is a sub-heading and stays with its text in the section; a header of
another reading or a message (NOTIFICATION OF CRITICAL FINDINGS) is no section; misspelt headers are known by likeness.
"""

import difflib
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from formats.files import Row, frontal_first, inside, pick_split, read_csv, read_text

HEADER = re.compile(r"^[ \t]*([A-Z][A-Z0-9 ()/,&_-]{0,70}|[A-Z][a-z]+):(?!\d\d)", re.MULTILINE)
RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)  # the line of underscores between a report and its addendum
START = re.compile(r"^[ \t]*FINAL REPORT[ \t:]*$", re.MULTILINE)
HEADERS = tomllib.loads(Path(__file__).with_name("headers.toml").read_text(encoding="utf-8"))


def mimic_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of one split's studies, in the order of the split's table."""
    table, metadata = _table(folder, "split"), read_csv(_table(folder, "metadata"), ("dicom_id", "ViewPosition"))
    views = {r["dicom_id"]: r["ViewPosition"] or r.get("ViewCodeSequence_CodeMeaning", "") for r in metadata}
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
        home = f"p{subject[:2]}/p{subject}/s{study}"
        # of an image in several formats the JPG counts, as the last that is found
        found = {dicom: path for dicom in dicoms for suffix in (".dcm", ".png", ".jpg")
                 if (path := inside(folder / "files", f"{home}/{dicom}{suffix}", str(table))).is_file()}  # fmt: skip
        images, fault, view_known = frontal_first((path, views.get(dicom, "")) for dicom, path in found.items())
        report, path = None, reports / f"{home}.txt"
        try:
            report = report_sections(read_text(path))
        except ValueError:
            fault = "unreadable report file" if path.exists() else "no report file"
        yield Row(study, report, images, fault, view_known)


def _table(folder: Path, name: str) -> Path:
    found = [p for suffix in (".csv.gz", ".csv") for p in sorted(folder.glob(f"mimic-cxr-*-{name}{suffix}"))]
    if found:
        return found[0]
    raise ValueError(f"{folder}: no mimic-cxr-2.0.0-{name}.csv.gz; copy it from physionet.org/content/mimic-cxr-jpg")


def report_sections(text: str) -> dict[str, str]:
    """{"findings": str, "impression": str} of a report, white space collapsed; {} for a text with neither header.

    Only what stands below the last line FINAL REPORT counts, and of a section's name the last one that holds any text.
    """
    reports = [part for part in START.split(text) if part.strip()]
    parts = HEADER.split(RULE.sub("ADDENDUM: ", reports[-1] if reports else ""))  # [text before, header, body, ...]
    runs = [("other", parts[:1])]  # (section, its pieces of text)
    for header, body in zip(parts[1::2], parts[2::2], strict=True):
        name, (section, pieces) = section_name(header), runs[-1]
        if not name or name == "view" and section in ("findings", "view") and any(map(str.strip, pieces)):
            # ADDITIONAL FINDINGS becomes "Additional findings", as in capitals it would begin a second report
            pieces += [f"{header.capitalize() if re.search('FINDINGS|IMPRESSION', header) else header}:", body]
        else:
            runs.append((name, [body]))
    found = {name: " ".join(" ".join(pieces).split()) for name, pieces in runs if any(map(str.strip, pieces))}
    sections = {"findings": found.get("findings") or found.get("view", ""), "impression": found.get("impression", "")}
    return {} if reports and {name for name, _ in runs} <= {"other"} else sections


@functools.cache
def section_name(header: str) -> str:
    """The section that a header opens: "findings", "impression", "view", "other" or, for a sub-heading, ""."""
    words = re.findall("[a-z]+", header.lower())
    for i, word in enumerate(words):
        near = difflib.get_close_matches(word, HEADERS["spellings"], n=1, cutoff=0.85)
        if near and set(word) <= set(near[0] + "s"):  # COMPRESSION has a letter that IMPRESSION lacks
            words[i] = near[0]
    return next((section for section, pattern in HEADERS["patterns"] if re.search(pattern, " ".join(words))), "")


def chexpert_lines(folder: Path, ids: set[str]) -> list[str]:
    """["CheXpert positive %: Atelectasis 33, ..."] over the studies `ids`; [] where the folder has no such table."""
    if not any(folder.glob("mimic-cxr-*-chexpert.csv*")):
        return []
    rows = [row for row in read_csv(_table(folder, "chexpert"), ("subject_id", "study_id")) if row["study_id"] in ids]
    labels = [column for column in (rows[0] if rows else ()) if column not in ("subject_id", "study_id")]
    shares = [f"{label} {100 * sum(row[label] in ('1', '1.0') for row in rows) / len(rows):.0f}" for label in labels]
    return [f"CheXpert positive % ({len(rows)} of {len(ids)} studies labelled): {', '.join(shares)}"]
