"""IU-Xray (Open-i's chest X-rays) in the three forms it comes in; each yields the rows that data.py reads.

- `r2gen`: R2Gen's `annotation.json` = {"train": [{"id", "report", "image_path": ["x/0.png", ...]}], ...} beside
  `images/`; so is its MIMIC-CXR file. The order of `image_path` is kept; `truth.jsonl` ({"id", "labels"}) is optional.
- `openi`: Open-i's `ecgen-radiology/<uid>.xml` beside `images/`, linked by `images/pairs.jsonl` ({"uid", "file",
  "view_seen"}) where it exists, else by uid and the XML's parentImage ids. Neither XML nor file names tell the views:
  put the Kaggle `indiana_projections.csv` into the folder.
- `kaggle`: `indiana_reports.csv` + `indiana_projections.csv` beside `images/` or `images/images_normalized/`; the split
  is that of R2Gen's `annotation.json` where it lies in the folder, else every split is all the studies.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import ParseError

from defusedxml import ElementTree

from formats.files import Row, exact_labels, frontal_first, inside, pick_split, read_csv, read_json, read_jsonl

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm"}


def read_annotation(path: Path) -> dict[str, list[dict]]:
    """R2Gen's {split: [{"id", ...}, ...]}, ids as texts, "" in a record without; ValueError for another form."""
    annotation = read_json(path)
    for split, rows in annotation.items():
        if not isinstance(rows, list):
            raise ValueError(f"{path}: split {split!r} must be a list of records")
        known = [isinstance(row, dict) and isinstance(row.get("id"), str | int) for row in rows]
        annotation[split] = [r | {"id": str(r["id"])} if ok else {"id": ""} for r, ok in zip(rows, known, strict=True)]
    return annotation


def r2gen_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an R2Gen folder's split, in the file's order."""
    path, truth = folder / "annotation.json", folder / "truth.jsonl"
    annotation = read_annotation(path)
    name, exact = pick_split(path, annotation, split), truth.exists()
    rows = enumerate(read_jsonl(truth) if exact else (), 1)
    labels = {str(row.get("id")): exact_labels(row.get("labels"), f"{truth}: row {number}") for number, row in rows}
    for number, row in enumerate(annotation[name]):
        study_id, report, images = row["id"], row.get("report"), row.get("image_path")
        place = f"{name}[{number}]"
        if not study_id or not isinstance(report, str):
            yield Row(study_id or place, None, fault="report is no text" if study_id else "no id")
        elif not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            yield Row(study_id, report, fault="image_path is no list of names")
        elif exact and labels.get(study_id) is None:
            raise ValueError(f"{truth}: no labels for study {study_id}")
        else:
            paths = [inside(folder / "images", image, f"{path}: {place} ({study_id})") for image in images]
            yield Row(study_id, report, paths, "" if paths else "no image file", labels=labels.get(study_id))


def openi_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an Open-i folder, ordered by uid: all of them, whatever the split."""
    files = sorted(folder.glob("ecgen-radiology/*.xml"), key=lambda p: (len(p.stem), p.stem))
    if not files:
        raise ValueError(f"data: {folder}: no ecgen-radiology/*.xml; unpack Open-i's NLMCXR_reports.tgz there")
    images = _images(folder)
    for path in files:
        try:
            if not path.is_file():
                raise OSError
            root = ElementTree.parse(path).getroot()
        except (OSError, ParseError, ValueError, LookupError):  # LookupError: an encoding that Python does not know
            yield Row(path.stem, None, fault="unreadable XML")
            continue
        texts = {node.get("Label", "").lower(): "".join(node.itertext()) for node in root.iter("AbstractText")}
        order = [_image_key(node.get("id", ""))[1] for node in root.iter("parentImage")]
        found = images.get(path.stem, {})
        names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
        yield Row(path.stem, _sections(texts), *frontal_first(found[name] for name in names))


def kaggle_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of the Kaggle CSV pair in the order of indiana_reports.csv, split by annotation.json where it is."""
    annotation, home, damaged = folder / "annotation.json", {}, []
    if annotation.exists():
        splits = read_annotation(annotation)
        split = pick_split(annotation, splits, split)
        home = {_image_key(row["id"])[0]: name for name, rows in splits.items() for row in rows}
    images = _images(folder, table_needed=True)
    for row in read_csv(folder / "indiana_reports.csv", ("uid", "findings", "impression"), damaged):
        chosen, fault, view_known = frontal_first(images.get(row["uid"], {}).values())
        if home and row["uid"] not in home:
            fault = "in no split of annotation.json"
        if home.get(row["uid"], split) == split:
            yield Row(row["uid"], _sections(row), chosen, fault, view_known)
    yield from (Row(f"line {line}", None, fault="row of another length") for line in damaged)


def _sections(texts: dict[str, str]) -> dict[str, str]:
    return {name: " ".join(texts.get(name, "").split()) for name in ("findings", "impression")}


def _image_key(name: str) -> tuple[str, str]:
    """("7", "IM-2263-1001") for CXR7_IM-2263-1001.png, 7_IM-2263-1001.dcm.png and CXR7_1_IM-2263-1001 alike."""
    stem = re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)
    match = re.match(r"(?:CXR)?(\d+)(?:.*?(IM-[\d-]+))?", stem)
    return (match[1], match[2] or stem) if match else ("", stem)


def _images(folder: Path, table_needed: bool = False) -> dict[str, dict[str, tuple[Path, str]]]:
    """{uid: {image name: (file, its view's name or "")}} of pairs.jsonl, else of all files in the folder.

    indiana_projections.csv overrules the views.
    """
    images, pairs, table = {}, folder / "images" / "pairs.jsonl", folder / "indiana_projections.csv"
    for number, row in enumerate(read_jsonl(pairs) if pairs.exists() else (), 1):
        if "uid" not in row or not isinstance(row.get("file"), str):
            raise ValueError(f"{pairs}: row {number} needs a 'uid' and, as a text, a 'file'")
        file = inside(pairs.parent, row["file"], f"{pairs}: row {number}")
        images.setdefault(str(row["uid"]), {})[_image_key(row["file"])[1]] = file, str(row.get("view_seen") or "")
    home = folder / "images" / "images_normalized"
    for path in [] if pairs.exists() else sorted((home if home.is_dir() else home.parent).glob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            uid, name = _image_key(path.name)
            images.setdefault(uid, {})[name] = path, ""
    for row in read_csv(table, ("uid", "filename", "projection")) if table_needed or table.exists() else ():
        found, name = images.get(row["uid"], {}), _image_key(row["filename"])[1]
        if name in found:
            found[name] = found[name][0], row["projection"]
    return images
