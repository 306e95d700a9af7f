"""IU-Xray (Open-i) on disk, in the three forms it is passed around in; each yields the rows that data.py reads.

- `r2gen`: R2Gen's `annotation.json` = {"train": [{"id", "report", "image_path": ["x/0.png", ...]}], ...} beside
  `images/`; R2Gen's MIMIC-CXR file has the same form. The order of `image_path` is taken as it is. A `truth.jsonl`
  beside it ({"id", "labels"}) gives exact labels.
- `openi`: Open-i's `ecgen-radiology/<uid>.xml` beside `images/`. Images are linked by `images/pairs.jsonl`
  ({"uid", "file", "view_seen"}) where it exists, else by uid and the XML's parentImage ids; the frontal view comes
  first, as said by the Kaggle `indiana_projections.csv` where it exists, else the first image whose view is not known.
- `kaggle`: `indiana_reports.csv` + `indiana_projections.csv` beside `images/` or `images/images_normalized/`. With
  R2Gen's `annotation.json` in the folder its split is used, else every split is all the studies.

A row is (id, report text or {"findings", "impression"}, image files with the frontal first, why there is no image or
"", exact labels or None).
"""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from formats.files import frontal_first, pick_split, read_csv, read_jsonl, read_text

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm"}
Row = tuple[str, str | dict[str, str] | None, list[Path], str, list[str] | None]


def read_annotation(path: Path) -> dict[str, list[dict]]:
    """R2Gen's {split: [record, ...]}; ValueError when the file has another form or a record lacks its id."""
    try:
        annotation = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(annotation, dict):
        raise ValueError(f"{path}: must be an object of splits")
    for split, rows in annotation.items():
        if not isinstance(rows, list):
            raise ValueError(f"{path}: split '{split}' must be a list of records")
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or "id" not in row:
                raise ValueError(f"{path}: {split}[{number}]: no 'id'")
    return annotation


def r2gen_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an R2Gen folder's split, in the file's order."""
    path, truth = folder / "annotation.json", folder / "truth.jsonl"
    annotation = read_annotation(path)
    name = pick_split(path, annotation, split)
    labels = {str(row.get("id")): row.get("labels") for row in read_jsonl(truth)} if truth.exists() else None
    for number, row in enumerate(annotation[name]):
        absent = [key for key in ("report", "image_path") if key not in row]
        if absent:
            raise ValueError(f"{path}: {name}[{number}]: no '{absent[0]}'")
        study_id, images = str(row["id"]), row["image_path"]
        texts = [row["report"], *images] if isinstance(images, list) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {name}[{number}] ({study_id}): 'report' must be a text, 'image_path' a list")
        if labels is not None and labels.get(study_id) is None:
            raise ValueError(f"{truth}: no labels for study {study_id}")
        paths = [folder / "images" / image for image in images]
        yield study_id, row["report"], paths, "" if images else "no image file", labels and labels[study_id]


def openi_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an Open-i folder, ordered by uid: all of them, whatever the split."""
    files = sorted(folder.glob("ecgen-radiology/*.xml"), key=lambda p: (len(p.stem), p.stem))
    if not files:
        raise ValueError(f"data: {folder}: no ecgen-radiology/*.xml; unpack Open-i's NLMCXR_reports.tgz there")
    images, views = _images(folder), _views(folder)
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: broken XML ({error})") from error
        texts = {node.get("Label", "").lower(): "".join(node.itertext()) for node in root.iter("AbstractText")}
        order = [_image_key(node.get("id", ""))[1] for node in root.iter("parentImage")]
        found = images.get(path.stem, {})
        names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
        chosen, reason = frontal_first([(found[name], views.get((path.stem, name))) for name in names])
        yield path.stem, _sections(texts), chosen, reason, None


def kaggle_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of the Kaggle CSV pair in the order of indiana_reports.csv, split by annotation.json where it is."""
    annotation, home = folder / "annotation.json", {}
    if annotation.exists():
        splits = read_annotation(annotation)
        split = pick_split(annotation, splits, split)
        home = {_image_key(str(row["id"]))[0]: name for name, rows in splits.items() for row in rows}
    images, views = _images(folder), _views(folder, needed=True)
    for row in read_csv(folder / "indiana_reports.csv", ("uid", "findings", "impression")):
        uid = row["uid"]
        if home.get(uid, split) != split:
            continue
        chosen, reason = frontal_first([(path, views.get((uid, name))) for name, path in images.get(uid, {}).items()])
        if home and uid not in home:
            reason = "in no split of annotation.json"
        yield uid, _sections(row), chosen, reason, None


def _sections(texts: dict[str, str]) -> dict[str, str]:
    return {name: " ".join(texts.get(name, "").split()) for name in ("findings", "impression")}


def _image_key(name: str) -> tuple[str, str]:
    """("7", "IM-2263-1001") for CXR7_IM-2263-1001.png, 7_IM-2263-1001.dcm.png and CXR7_1_IM-2263-1001 alike."""
    stem = re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)
    match = re.match(r"(?:CXR)?(\d+)(?:.*?(IM-[\d-]+))?", stem)
    return (match[1], match[2] or stem) if match else ("", stem)


def _images(folder: Path) -> dict[str, dict[str, Path]]:
    """{uid: {image name: path}}: from images/pairs.jsonl where it exists, else from the file names."""
    pairs = folder / "images" / "pairs.jsonl"
    images: dict[str, dict[str, Path]] = {}
    if pairs.exists():
        for row in read_jsonl(pairs):
            if "uid" not in row or "file" not in row:
                raise ValueError(f"{pairs}: a row without 'uid' or 'file'")
            images.setdefault(str(row["uid"]), {})[_image_key(row["file"])[1]] = folder / "images" / row["file"]
        return images
    home = folder / "images" / "images_normalized"
    for path in sorted((home if home.is_dir() else folder / "images").glob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            uid, name = _image_key(path.name)
            images.setdefault(uid, {})[name] = path
    return images


def _views(folder: Path, needed: bool = False) -> dict[tuple[str, str], str]:
    """{(uid, image name): "frontal" or "lateral"}: pairs.jsonl's view_seen, overruled by indiana_projections.csv."""
    views, pairs, table = {}, folder / "images" / "pairs.jsonl", folder / "indiana_projections.csv"
    for row in read_jsonl(pairs) if pairs.exists() else []:
        if row.get("view_seen"):
            views[str(row["uid"]), _image_key(row["file"])[1]] = row["view_seen"].lower()
    if needed or table.exists():
        for row in read_csv(table, ("uid", "filename", "projection")):
            views[row["uid"], _image_key(row["filename"])[1]] = row["projection"].lower()
    return views
