"""IU-Xray (Open-i's chest X-rays) in the three forms it comes in; each yields the rows that data.py reads.

- `r2gen`: R2Gen's `annotation.json` = {"train": [{"id", "report", "image_path": ["x/0.png", ...]}], ...} beside
  `images/`; R2Gen's MIMIC-CXR file has the same form. The order of `image_path` is taken as it is. A `truth.jsonl`
  beside it ({"id", "labels"}) gives exact labels.
- `openi`: Open-i's `ecgen-radiology/<uid>.xml` beside `images/`. Images are linked by `images/pairs.jsonl`
  ({"uid", "file", "view_seen"}) where it exists, else by uid and the XML's parentImage ids; the frontal view comes
  first, as said by the Kaggle `indiana_projections.csv` where it exists, else the first image whose view is not known.
- `kaggle`: `indiana_reports.csv` + `indiana_projections.csv` beside `images/` or `images/images_normalized/`. With
  R2Gen's `annotation.json` in the folder its split is used, else every split is all the studies.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from formats.files import Row, frontal_first, pick_split, read_csv, read_json, read_jsonl

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm"}


def read_annotation(path: Path) -> dict[str, list[dict]]:
    """R2Gen's {split: [{"id", ...}, ...]}; ValueError when the file has another form."""
    annotation = read_json(path)
    for split, rows in annotation.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
            raise ValueError(f"{path}: split '{split}' must be a list of records, each with an 'id'")
    return annotation


def r2gen_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an R2Gen folder's split, in the file's order."""
    path, truth = folder / "annotation.json", folder / "truth.jsonl"
    annotation = read_annotation(path)
    name = pick_split(path, annotation, split)
    labels = {str(row.get("id")): row.get("labels") for row in read_jsonl(truth)} if truth.exists() else None
    for number, row in enumerate(annotation[name]):
        study_id, report, images = str(row["id"]), row.get("report"), row.get("image_path")
        if not isinstance(images, list) or not all(isinstance(text, str) for text in (report, *images)):
            raise ValueError(f"{path}: {name}[{number}] ({study_id}): needs a text 'report', a list 'image_path'")
        if labels is not None and labels.get(study_id) is None:
            raise ValueError(f"{truth}: no labels for study {study_id}")
        paths = [folder / "images" / image for image in images]
        yield Row(study_id, report, paths, "" if images else "no image file", labels and labels[study_id])


def openi_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of an Open-i folder, ordered by uid: all of them, whatever the split."""
    files = sorted(folder.glob("ecgen-radiology/*.xml"), key=lambda p: (len(p.stem), p.stem))
    if not files:
        raise ValueError(f"data: {folder}: no ecgen-radiology/*.xml; unpack Open-i's NLMCXR_reports.tgz there")
    images = _images(folder)
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(f"{path}: broken XML ({error})") from error
        texts = {node.get("Label", "").lower(): "".join(node.itertext()) for node in root.iter("AbstractText")}
        order = [_image_key(node.get("id", ""))[1] for node in root.iter("parentImage")]
        found = images.get(path.stem, {})
        names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
        yield Row(path.stem, _sections(texts), *frontal_first(found[name] for name in names))


def kaggle_rows(folder: Path, split: str) -> Iterator[Row]:
    """The rows of the Kaggle CSV pair in the order of indiana_reports.csv, split by annotation.json where it is."""
    annotation, home = folder / "annotation.json", {}
    if annotation.exists():
        splits = read_annotation(annotation)
        split = pick_split(annotation, splits, split)
        home = {_image_key(str(row["id"]))[0]: name for name, rows in splits.items() for row in rows}
    images = _images(folder, table_needed=True)
    for row in read_csv(folder / "indiana_reports.csv", ("uid", "findings", "impression")):
        uid = row["uid"]
        if home.get(uid, split) != split:
            continue
        chosen, fault = frontal_first(images.get(uid, {}).values())
        if home and uid not in home:
            fault = "in no split of annotation.json"
        yield Row(uid, _sections(row), chosen, fault)


def _sections(texts: dict[str, str]) -> dict[str, str]:
    return {name: " ".join(texts.get(name, "").split()) for name in ("findings", "impression")}


def _image_key(name: str) -> tuple[str, str]:
    """("7", "IM-2263-1001") for CXR7_IM-2263-1001.png, 7_IM-2263-1001.dcm.png and CXR7_1_IM-2263-1001 alike."""
    stem = re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)
    match = re.match(r"(?:CXR)?(\d+)(?:.*?(IM-[\d-]+))?", stem)
    return (match[1], match[2] or stem) if match else ("", stem)


def _images(folder: Path, table_needed: bool = False) -> dict[str, dict[str, tuple[Path, str | None]]]:
    """{uid: {image name: (file, "frontal", "lateral" or None)}}.

    Files and views are those of images/pairs.jsonl, else all in the folder with views that are not known;
    indiana_projections.csv overrules the views.
    """
    images, pairs, table = {}, folder / "images" / "pairs.jsonl", folder / "indiana_projections.csv"
    if pairs.exists():
        for row in read_jsonl(pairs):
            if "uid" not in row or "file" not in row:
                raise ValueError(f"{pairs}: a row without 'uid' or 'file'")
            image = folder / "images" / row["file"], (row.get("view_seen") or "").lower() or None
            images.setdefault(str(row["uid"]), {})[_image_key(row["file"])[1]] = image
    else:
        home = folder / "images" / "images_normalized"
        for path in sorted((home if home.is_dir() else folder / "images").glob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                uid, name = _image_key(path.name)
                images.setdefault(uid, {})[name] = path, None
    for row in read_csv(table, ("uid", "filename", "projection")) if table_needed or table.exists() else []:
        found, name = images.get(row["uid"], {}), _image_key(row["filename"])[1]
        if name in found:
            found[name] = found[name][0], row["projection"].lower()
    return images
