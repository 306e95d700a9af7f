"""What the layouts of iu_xray.py and mimic.py share: text files, the name of a split, the order of a study's views.

Each unusable file is a ValueError of one line: the file, the place in it, what to do.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

VIEW_RANK = {"frontal": 0, None: 1}  # anything else (lateral, oblique) comes after a view that is not known


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
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number}: not JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}: line {number}: not a JSON object")
    return rows


def read_csv(path: Path, columns: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a .csv or .csv.gz file, {column: text}; ValueError names file and absent column or line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
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
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; convert the file first") from error
    except (gzip.BadGzipFile, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: broken file ({error}); fetch it again") from error


def pick_split(path: Path, known: Iterable[str], split: str) -> str:
    """`split` as the file `path` calls it (R2Gen says val, PhysioNet validate); ValueError when it has none such."""
    for name in (split, {"val": "validate", "validate": "val"}.get(split)):
        if name in known:
            return name
    raise ValueError(f"{path}: no split '{split}'; it has {', '.join(known)}")


def frontal_first(views: list[tuple[Path, str | None]]) -> tuple[list[Path], str]:
    """(image files, frontal views first, then views not known, then the others; "") or ([], why there is none).

    views: (file, "frontal", "lateral" or None) in the order to keep among equals. Only lateral views is a reason.
    """
    ordered = sorted(views, key=lambda pair: VIEW_RANK.get(pair[1], 2))
    if not ordered:
        return [], "no image file"
    return ([path for path, _ in ordered], "") if ordered[0][1] in VIEW_RANK else ([], "lateral view only")
