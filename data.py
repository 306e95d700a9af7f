"""Data sets on disk: a folder becomes a list of `Study`; the order in which training sees them.

Two layouts (`data.format`):

- `r2gen`: R2Gen's `annotation.json` = {"train": [{"id", "report", "image_path": ["x/0.png", ...]}], ...} beside
  `images/`; the first image of a study is used. A `truth.jsonl` beside it ({"id", "labels"}) gives exact labels.
- `openi`: Open-i's `ecgen-radiology/<uid>.xml` beside `images/`. Images are linked by `images/pairs.jsonl`
  ({"uid", "file", "view_seen"}) where it exists, else by uid and the XML's parentImage ids; the frontal view is taken,
  as said by the Kaggle `indiana_projections.csv` where it exists, else the first image whose view is not known.

What cannot be used is skipped, counted by reason and printed; `data.strict` makes a skip an error. `python data.py
--config C` prints a card of a data set: studies per split, skips, report lengths.
"""

import csv
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from images import check_image
from images import read_image as read_image  # the loader's users read their images here

SECTIONS = ("findings", "impression")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm"}


@dataclass
class Study:
    id: str
    image: Path
    report: str
    """the target text, without <report> tags"""
    split: str
    labels: list[str] | None = None
    """what the image really shows ("<finding>_<side>"), where truth.jsonl says so"""


# ----------------------------------------------------------------------------------------------------------- text


def split_sections(text: str) -> dict[str, str]:
    """{"findings": str, "impression": str} of a report, white space collapsed, "" for what is not there.

    The headers are `FINDINGS:` and `IMPRESSION:`, in capitals at the start of a word; a repeated header's texts are
    joined. Text before the first header belongs to neither; without any header all the text is findings.
    """
    parts = re.split(r"(?<!\w)(FINDINGS|IMPRESSION):", text)
    if len(parts) == 1:
        return {"findings": " ".join(text.split()), "impression": ""}
    found = {name: [] for name in SECTIONS}
    for header, body in zip(parts[1::2], parts[2::2], strict=True):
        found[header.lower()] += body.split()
    return {name: " ".join(words) for name, words in found.items()}


def target_text(report: str | dict[str, str], target: str) -> str:
    """The text a model shall write for `report` (a text or its sections); "" when a wanted section is missing.

    target "both" gives "FINDINGS: f IMPRESSION: i" and needs both, except that a text without headers stays as it is.
    """
    sections = split_sections(report) if isinstance(report, str) else report
    if target in SECTIONS:
        return sections[target]
    if isinstance(report, str) and not re.search(r"(?<!\w)(FINDINGS|IMPRESSION):", report):
        return sections["findings"]
    if not all(sections[name] for name in SECTIONS):
        return ""
    return f"FINDINGS: {sections['findings']} IMPRESSION: {sections['impression']}"


def _missing(report: str | dict[str, str], target: str) -> str:
    """Why target_text gave "": the reason under which the study is counted as skipped."""
    sections = split_sections(report) if isinstance(report, str) else report
    if not any(sections.values()):
        return "empty report"
    return "no " + " and no ".join(s for s in SECTIONS if target in (s, "both") and not sections[s])


# ------------------------------------------------------------------------------------------------------ data sets


def load_studies(cfg, split: str) -> list[Study]:
    """The usable studies of one split of a data set; `cfg` is a config.DataConfig. Prints what was skipped and why.

    Raises ValueError: missing or broken files, unknown split, duplicate ids, no usable study, a skip under cfg.strict.
    """
    studies, skips = read_split(cfg, split)
    if cfg.format == "openi":
        print(f"data: {cfg.path} has no split of its own: '{split}' is all its studies, as is every other split")
    if skips:
        print(f"data: {cfg.path} [{split}]: {len(studies)} studies, skipped {describe_skips(skips)}")
    return studies


def read_split(cfg, split: str) -> tuple[list[Study], dict[str, list[str]]]:
    """load_studies without printing: the studies and {reason: [ids]} of those skipped before cfg.limit was reached."""
    folder = Path(cfg.path)
    if not folder.is_dir():
        raise ValueError(f"data.path: {folder} is no folder")
    studies, skips, seen = [], {}, set()
    rows = _openi_rows(folder) if cfg.format == "openi" else _r2gen_rows(folder, split)
    for study_id, report, image, reason, labels in rows:
        if cfg.limit and len(studies) == cfg.limit:
            break
        if study_id in seen:
            raise ValueError(f"data: {folder} [{split}]: id {study_id} occurs twice")
        seen.add(study_id)
        text = target_text(report, cfg.target)
        reason = (_missing(report, cfg.target) if not text else "") or reason or check_image(image)
        if reason:
            skips.setdefault(reason, []).append(study_id)
        else:
            studies.append(Study(study_id, image, text, split, labels))
    if skips and (cfg.strict or not studies):
        why = "data.strict forbids skips" if studies else f"no usable study among {len(seen)}"
        raise ValueError(f"data: {folder} [{split}]: {why}: {describe_skips(skips)}")
    if not studies:
        raise ValueError(f"data: {folder} [{split}]: the split is empty")
    return studies, skips


def describe_skips(skips: dict[str, list[str]]) -> str:
    """One line, e.g. `3: no findings 2 (7, 22), no image file 1 (9)`; at most three ids of each reason."""
    parts = [f"{why} {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" for why, ids in skips.items()]
    return f"{sum(map(len, skips.values()))}: {', '.join(parts)}"


def read_text(path: Path) -> str:
    """A UTF-8 file; ValueError with one line when it is missing or no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert the file first") from error


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, blank lines left out; ValueError names file and line."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: not JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}: line {number}: not a JSON object")
    return rows


def _r2gen_rows(folder: Path, split: str):
    """Yield (id, report, image path, skip reason, labels) of an R2Gen folder's split."""
    path = folder / "annotation.json"
    try:
        annotation = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(annotation, dict):
        raise ValueError(f"{path}: must be an object of splits")
    other = {"val": "validate", "validate": "val"}.get(split, split)
    name = split if split in annotation else other
    if name not in annotation:
        raise ValueError(f"{path}: no split '{split}'; it has {', '.join(annotation)}")
    truth = folder / "truth.jsonl"
    labels = {str(row.get("id")): row.get("labels") for row in read_jsonl(truth)} if truth.exists() else None
    for number, row in enumerate(annotation[name]):
        absent = [key for key in ("id", "report", "image_path") if key not in row]
        if absent:
            raise ValueError(f"{path}: {name}[{number}]: no '{absent[0]}'")
        study_id, images = str(row["id"]), row["image_path"]
        if not isinstance(row["report"], str) or not isinstance(images, list):
            raise ValueError(f"{path}: {name}[{number}] ({study_id}): 'report' must be a text, 'image_path' a list")
        if labels is not None and labels.get(study_id) is None:
            raise ValueError(f"{truth}: no labels for study {study_id}")
        image = folder / "images" / images[0] if images else Path()
        yield study_id, row["report"], image, "" if images else "no image file", labels and labels[study_id]


def _openi_rows(folder: Path):
    """Yield (uid, sections, image path, skip reason, None) of an Open-i folder, ordered by uid."""
    files = sorted(folder.glob("ecgen-radiology/*.xml"), key=lambda p: (len(p.stem), p.stem))
    if not files:
        raise ValueError(f"data: {folder}: no ecgen-radiology/*.xml")
    images, views = _openi_images(folder), _openi_views(folder)
    for path in files:
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: broken XML ({error})") from error
        texts = {node.get("Label", "").lower(): node.text or "" for node in root.iter("AbstractText")}
        order = [_image_key(node.get("id", ""))[1] for node in root.iter("parentImage")]
        found = images.get(path.stem, {})
        names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
        known = {name: views.get((path.stem, name)) for name in names}
        usable = [n for n in names if known[n] == "frontal"] or [n for n in names if known[n] is None]
        reason = "" if usable else "lateral view only" if names else "no image file"
        sections = {name: " ".join(texts.get(name, "").split()) for name in SECTIONS}
        yield path.stem, sections, found[usable[0]] if usable else Path(), reason, None


def _image_key(name: str) -> tuple[str, str]:
    """("7", "IM-2263-1001") for CXR7_IM-2263-1001.png, 7_IM-2263-1001.dcm.png and CXR7_1_IM-2263-1001 alike."""
    stem = re.sub(r"(\.dcm)?\.(png|jpe?g|dcm)$", "", name, flags=re.IGNORECASE)
    match = re.match(r"(?:CXR)?(\d+)(?:.*?(IM-[\d-]+))?", stem)
    return (match[1], match[2] or stem) if match else ("", stem)


def _openi_images(folder: Path) -> dict[str, dict[str, Path]]:
    """{uid: {image name: path}}: from images/pairs.jsonl where it exists, else from the file names."""
    pairs = folder / "images" / "pairs.jsonl"
    images: dict[str, dict[str, Path]] = {}
    if pairs.exists():
        for row in read_jsonl(pairs):
            if "uid" not in row or "file" not in row:
                raise ValueError(f"{pairs}: a row without 'uid' or 'file'")
            images.setdefault(str(row["uid"]), {})[_image_key(row["file"])[1]] = folder / "images" / row["file"]
    else:
        for path in sorted((folder / "images").glob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                uid, name = _image_key(path.name)
                images.setdefault(uid, {})[name] = path
    return images


def _openi_views(folder: Path) -> dict[tuple[str, str], str]:
    """{(uid, image name): "frontal" or "lateral"}: pairs.jsonl's view_seen, overruled by indiana_projections.csv."""
    views, pairs, table = {}, folder / "images" / "pairs.jsonl", folder / "indiana_projections.csv"
    for row in read_jsonl(pairs) if pairs.exists() else []:
        if row.get("view_seen"):
            views[str(row["uid"]), _image_key(row["file"])[1]] = row["view_seen"].lower()
    if table.exists():
        reader = csv.DictReader(read_text(table).splitlines())
        absent = {"uid", "filename", "projection"} - set(reader.fieldnames or ())
        if absent:
            raise ValueError(f"{table}: no column '{sorted(absent)[0]}'; it has {', '.join(reader.fieldnames or ())}")
        views |= {(row["uid"], _image_key(row["filename"])[1]): row["projection"].lower() for row in reader}
    return views


# --------------------------------------------------------------------------------------------- order, and the card


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of studies 0..n-1 in pass `epoch`: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def batch_ids(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indexes of the studies of update `step` (from 0): the passes back to back, so none is ever dropped."""
    if n < 1:
        raise ValueError(f"a batch of {batch_size} cannot be drawn from {n} studies")
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: epoch_order(n, seed, epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]


def card(cfg) -> str:
    """A data set in a few lines: per split the studies, the skips and the report length in words (percentiles)."""
    lines = [f"{cfg.path} (format {cfg.format}, target {cfg.target})"]
    lines.append("split     studies  words of a report 5% / 50% / 95% / max")
    splits = ("all",) if cfg.format == "openi" else (cfg.sft_split, cfg.rl_split, cfg.val_split, cfg.test_split)
    for split in dict.fromkeys(splits):
        studies, skips = read_split(cfg, split)
        words = [len(study.report.split()) for study in studies]
        numbers = " / ".join(f"{value:.0f}" for value in (*np.percentile(words, (5, 50, 95)), max(words)))
        known = "" if studies[0].labels is None else "  with exact labels"
        lines.append(f"{split:<10}{len(studies):>7}  {numbers}{known}")
        if skips:
            lines.append(f"{'':10}skipped {describe_skips(skips)}")
    return "\n".join(lines)


def main() -> None:
    # here, because assets.py itself reads studies through this module
    from assets import resolve
    from config import parse

    try:
        print(card(resolve(parse(description="Print a card of a data set."), ("data",)).data))
    except ValueError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
