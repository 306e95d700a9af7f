"""What iu_xray.py and mimic.py share: a study's row, text files and tables, the name of a split, the order of views.

Each unusable file is a ValueError of one line: the file, the place in it, what to do.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from phantom.findings import LABELS

VIEW_RANK = {"frontal": 0, None: 1}  # anything else (lateral, oblique) comes after a view that is not known


class Row(NamedTuple):
    """A study as its data set tells it."""

    id: str
    report: str | dict[str, str] | None  # a text, or its {"findings", "impression"}; None without a report file
    images: list[Path]  # frontal first
    fault: str  # why there is no image that can be used, else ""
    labels: list[str] | None = None  # exact labels, where truth.jsonl gives them


def exact_labels(value, where: str) -> list[str] | None:
    """The exact labels that a row's field `labels` holds, None where it holds none.

    ValueError, beginning with `where`, unless they are the phantom's ("effusion_left"): no other labels are compared
    with a report, so CheXpert's names, 14 numbers or a bare text would be taken for a truth that all reports miss.
    """
    if value is None:
        return None
    foreign = [label for label in value if label not in LABELS] if isinstance(value, list) else [value]
    if foreign:
        raise ValueError(f"{where}: labels {str(foreign[0])[:40]!r}: only a list of the phantom's findings can be exact, "
                         f"e.g. {[LABELS[0], LABELS[-1]]}; leave other labels out")  # fmt: skip
    return value


def read_text(path: Path) -> str:
    """A UTF-8 file; ValueError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is it there, whole, and UTF-8 text?") from error


def read_json(path: Path) -> dict:
    """The JSON object that a file holds; ValueError when it holds none."""
    return _json_object(read_text(path), str(path))


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, blank lines left out; ValueError names file and line."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [_json_object(line, f"{path}: line {number}") for number, line in lines if line.strip()]


def _json_object(text: str, place: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place}: not a JSON object")
    return value


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a .csv or .csv.gz file, {column: text}; ValueError names file and absent column or line."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            absent = [column for column in columns if column not in names]
            if absent:
                raise ValueError(f"{path}: no column '{absent[0]}'; it has {', '.join(names)}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"{path}: line {reader.line_num}: not {len(names)} fields as in line 1")
                yield row
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is it there, whole, and UTF-8 text?") from error


def pick_split(path: Path, known: Iterable[str], split: str) -> str:
    """`split` as the file `path` calls it (R2Gen says val, PhysioNet validate); ValueError when it has none such."""
    for name in (split, {"val": "validate", "validate": "val"}.get(split)):
        if name in known:
            return name
    raise ValueError(f"{path}: no split '{split}'; it has {', '.join(known)}")


def frontal_first(views: Iterable[tuple[Path, str | None]]) -> tuple[list[Path], str]:
    """(image files, frontal views first, then views not known, then the others; "") or ([], why there is none).

    views: (file, "frontal", "lateral" or None) in the order to keep among equals. Only lateral views is a fault.
    """
    ordered = sorted(views, key=lambda pair: VIEW_RANK.get(pair[1], 2))
    if not ordered:
        return [], "no image file"
    return ([path for path, _ in ordered], "") if ordered[0][1] in VIEW_RANK else ([], "lateral view only")
