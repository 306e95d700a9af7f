"""IU-Xray (Open-i's chest X-rays) in the three forms it comes in; each yields the rows that data.py reads.

- `r2gen`: R2Gen's `annotation.json` = {"train": [{"id", "report", "image_path": ["x/0.png", ...]}], ...} beside
  `images/`, the frontal view first. A `truth.jsonl` beside it ({"id", "labels"}) gives exact labels.
- `openi`: Open-i's `ecgen-radiology/<uid>.xml` beside `images/`, linked by `images/pairs.jsonl` ({"uid", "file",
  "view_seen"}) where it exists, else by uid and the XML's parentImage ids. Only the Kaggle `indiana_projections.csv`
  tells all views: put it into the folder.
- `kaggle`: `indiana_reports.csv` + `indiana_projections.csv` beside `images/` or `images/images_normalized/`; the split
  is that of R2Gen's `annotation.json` where it lies in the folder, else every split is all the studies.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from defusedxml import ElementTree

from formats.files import Row, exact_labels, frontal_first, inside, pick_split, read_csv, read_json, read_jsonl


def read_annotation(path: Path) -> dict[str, list[dict]]:
    """R2Gen's {split: [{"id", ...}, ...]}, ids as texts, "" in a record without; ValueError for another form."""
    annotation = read_json(path)
    for split, rows in annotation.items():
        if not isinstance(rows, list):
            raise ValueError(f"{path}: split {split!r} must be a list of records")
        known = [isinstance(row, dict) and type(row.get("id")) in (str, int) for row in rows]
        annotation[split] = [r | {"id": str(r["id"])} if ok else {"id": ""} for r, ok in zip(rows, known, strict=True)]
    return annotation


def r2gen_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an R2Gen folder's split, in the file's order."""
    path, truth, labels = folder / "annotation.json", folder / "truth.jsonl", {}
    annotation = read_annotation(path)
    name = pick_split(path, annotation, split)
    for number, row in enumerate(read_jsonl(truth) if truth.exists() else (), 1):
        labels[str(row.get("id"))] = exact_labels(row.get("labels"), f"{truth}: row {number}")
    if labels and not any(labels.values()):
        raise ValueError(f"{truth}: no study shows a finding: is this the exact truth of images? else take it away")
    for number, row in enumerate(annotation[name]):
        study_id, report, images = row["id"] or f"{name}[{number}]", row.get("report"), row.get("image_path")
        if not row["id"] or not isinstance(report, str):
            yield Row(study_id, None, fault="report is no text" if row["id"] else "no id")
        elif not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            yield Row(study_id, report, fault="image_path is no list of names")
        elif truth.exists() and labels.get(study_id) is None:
            raise ValueError(f"{truth}: no labels for study {study_id}")
        else:
            paths = [inside(folder / "images", image, f"{path}: {name}[{number}] ({study_id})") for image in images]
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
        except (OSError, SyntaxError, ValueError, LookupError):  # the last: an encoding that Python does not know
            yield Row(path.stem, None, fault="unreadable XML")
            continue
        said = {node.get("Label", "").lower(): "".join(node.itertext()) for node in root.iter("AbstractText")}
        sections = {name: said.get(name, "") for name in ("findings", "impression")}
        order = [_image_key(node.get("id", ""))[1] for node in root.iter("parentImage")]
        found = images.get(path.stem, {})
        names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
        yield Row(path.stem, sections, *frontal_first(found[name] for name in names))


def kaggle_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of the Kaggle CSV pair in the order of indiana_reports.csv, split by annotation.json where it is."""
    annotation, images, damaged = folder / "annotation.json", _images(folder, table_needed=True), []
    splits = read_annotation(annotation) if annotation.exists() else {split: []}
    split = pick_split(annotation, splits, split)
    home = {_image_key(row["id"])[0]: name for name, rows in splits.items() for row in rows}
    for row in read_csv(folder / "indiana_reports.csv", ("uid", "findings", "impression"), damaged):
        if home and row["uid"] not in home:
            yield Row(row["uid"], None, fault="in no split of annotation.json")
        elif home.get(row["uid"], split) == split:
            sections = {name: row[name] for name in ("findings", "impression")}
            yield Row(row["uid"], sections, *frontal_first(images.get(row["uid"], {}).values()))
    yield from (Row(f"line {line}", None, fault="row of another length") for line in damaged)


def _image_key(name: str) -> tuple[str, str]:
    """("7", "IM-2263-1001") for CXR7_IM-2263-1001.png, 7_IM-2263-1001.dcm.png and CXR7_1_IM-2263-1001 alike."""
    stem = re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)
    match = re.match(r"(?:CXR)?(\d+)(?:.*?(IM-[\d-]+))?", stem)
    return (match[1], match[2] or stem) if match else ("", stem)


def _images(folder: Path, table_needed: bool = False) -> dict[str, dict[str, tuple[Path, str]]]:
    """{uid: {image name: (file, its view's name or "")}} by pairs.jsonl, else of all files in the folder."""
    images, pairs, table = {}, folder / "images" / "pairs.jsonl", folder / "indiana_projections.csv"
    home = folder / "images" / "images_normalized"
    home = home if home.is_dir() and not pairs.exists() else home.parent
    files = sorted(p.name for p in home.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".dcm"))
    rows = read_jsonl(pairs) if pairs.exists() else [{"uid": _image_key(file)[0], "file": file} for file in files]
    for number, row in enumerate(rows, 1):
        if "uid" not in row or not isinstance(row.get("file"), str):
            raise ValueError(f"{pairs}: row {number} needs a 'uid' and, as a text, a 'file'")
        file = inside(home, row["file"], f"{pairs}: row {number}")
        images.setdefault(str(row["uid"]), {})[_image_key(row["file"])[1]] = file, str(row.get("view_seen") or "")
    for row in read_csv(table, ("uid", "filename", "projection")) if table_needed or table.exists() else ():
        found, name = images.get(row["uid"], {}), _image_key(row["filename"])[1]
        if name in found:  # the table overrules pairs.jsonl
            found[name] = found[name][0], row["projection"]
    return images
