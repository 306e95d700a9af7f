"""What iu_xray.py and mimic.py share: a study's row, text files and tables, exact labels, names of splits and views.

Each unusable file is a ValueError of one line: the file, the place in it, what to do.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from phantom.findings import LABELS

# the order of a study's images: PA, other frontal views, views that are not known, all others
VIEWS = (r"(PA|POSTERO-?ANTERIOR)\b", r"(AP|ANTERO-?POSTERIOR|FRONTAL)\b", r"(UNKNOWN|NONE|NAN)?$", "")


class Row(NamedTuple):
    """A study as its data set tells it."""

    id: str
    report: str | dict[str, str] | None  # a text, or its {"findings", "impression"}; None: `fault` says why
    images: Iterable[Path] = ()  # frontal first
    fault: str = ""  # why there is no report or no image that can be used, else ""
    view_known: bool = True  # False: the first image may be a lateral one
    labels: list[str] | None = None  # exact labels, where truth.jsonl gives them


def exact_labels(value, where: str) -> list[str] | None:
    """A row's field `labels`; ValueError, beginning with `where`, unless it is None or a list of the phantom's labels:
    CheXpert's names or 14 numbers would be a truth that every report misses."""
    if value is None or isinstance(value, list) and all(label in LABELS for label in value):
        return value
    raise ValueError(f"{where}: labels {str(value)[:60]!r} are not a list of the phantom's, such as {LABELS[-1]!r}")


def require_regular(path: Path) -> None:
    """OSError for what is there and is no regular file: a pipe would be waited for without end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not a regular file")


def read_text(path: Path) -> str:
    """A text file, .gz unpacked, UTF-8 or what its byte-order mark says; ValueError when it cannot be read."""
    try:
        require_regular(path)
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return io.TextIOWrapper(io.BytesIO(content), json.detect_encoding(content)).read()
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is it there, whole, and UTF-8 text?") from error


def read_json(path: Path) -> dict:
    """The JSON object that a file holds; ValueError when it holds none."""
    return json_value(read_text(path), path)


def read_jsonl(path: Path, whole: bool = True) -> list[dict]:
    """The objects of a JSON-lines file, blank lines left out; ValueError names file and line. Not `whole`: without what
    follows the last line's end, the half of a row that a kill cut short."""
    lines = enumerate(read_text(path).split("\n")[: None if whole else -1], 1)
    return [json_value(line, f"{path}: line {number}") for number, line in lines if line.strip()]


def json_value(text: str, place: str | Path, kind: type = dict):
    """The JSON object, or list, that a text holds; ValueError, beginning with `place`, when it holds none."""
    try:
        value = json.loads(text)
        if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):  # half a character, which no file can hold, becomes "?"
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, brackets a thousand deep
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{place}: not a JSON {'object' if kind is dict else kind.__name__}")
    return value


def read_csv(path: Path, columns: Iterable[str], damaged: list[int] | None = None) -> Iterator[dict[str, str]]:
    """Yield the rows of a .csv or .csv.gz file, {column: text}; ValueError names file and absent column or line.
    damaged: takes the line numbers of rows with too many or too few fields, which are an error without it."""
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)  # a quote that never ends is an error
    try:
        names = reader.fieldnames or []
        for column in columns:
            if column not in names:
                raise ValueError(f"{path}: no column {column!r}; it has {', '.join(map(repr, names))}")
        for row in reader:
            if None not in row and None not in row.values():
                yield row
            elif damaged is None:
                raise ValueError(f"{path}: line {reader.line_num}: not {len(names)} fields as in line 1")
            else:
                damaged.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from error


def inside(folder: Path, name: str, where: str) -> Path:
    """folder / name; ValueError, beginning with `where`, for one elsewhere: a shared table reads no other files."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} leads out of {folder}")
    return folder / name


def pick_split(path: Path, known: Iterable[str], split: str) -> str:
    """`split` as the file `path` calls it (R2Gen says val, PhysioNet validate); ValueError when it has none such."""
    for name in (split, {"val": "validate", "validate": "val"}.get(split)):
        if name in known:
            return name
    raise ValueError(f"{path}: no split {split!r}; it has {', '.join(map(repr, known))}; see data.*_split")


def frontal_first(views: Iterable[tuple[Path, str]]) -> tuple[list[Path], str, bool]:
    """(image files in the order of VIEWS, why none can be used or "", whether the first one's view is known).
    views: (file, its view's name or "") in the order to keep among equals."""
    ranks = {path: next(i for i, x in enumerate(VIEWS) if re.match(x, view.strip().upper())) for path, view in views}
    best = min(ranks.values(), default=None)
    fault = {None: "no image file", 3: "lateral view only"}.get(best, "")
    return sorted(ranks, key=ranks.get), fault, best != 2
