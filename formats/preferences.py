"""Preference pairs: which of two reports of a study is preferred. `train.py --stage dpo` reads them.

A row of a .jsonl, or of one JSON list: {"id", "chosen", "rejected"}, the study's id and two reports without tags, and
where there are such "weight", a number from 0 on, and "rejected_image": the rejected side of a visual pair sees this
file, which lies beside the pairs' or below, in the frontal view's place. MMedPO's rows load as they are: {"id",
"image", "conversations", "rejected_conversations", "weighted_score"}, the reports in their last turns; prompt and
images are the data set's. `python -m evidence.pairs` makes such a file.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

from data import Study, describe_skips
from formats.files import inside, json_value, read_jsonl, read_text
from formats.images import check_image


class Pair(NamedTuple):
    """Two reports of a study, the first preferred."""

    id: str  # of the study
    chosen: str
    rejected: str
    weight: float | None = None
    rejected_image: Path | None = None  # what the rejected side sees for images[0]; None: both sides see the same
    images: list[Path] | tuple = ()  # the study's views


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file, in its order; ValueError, one line with file, row and key, for what is not as said above."""
    if not str(path):
        raise ValueError("dpo.pairs is empty: name a file of preference pairs; `python -m evidence.pairs` makes one")
    path, text = Path(path), read_text(Path(path))
    rows = json_value(text, path, list) if text.lstrip().startswith("[") else read_jsonl(path)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return [read_row(row, f"{path}: row {number}", path.parent) for number, row in enumerate(rows, 1)]


def read_row(row, where: str, folder: Path) -> Pair:
    """One row as a Pair, its rejected_image in `folder`; ValueError, beginning with `where`."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object")
    theirs = "conversations" in row
    keys = ("conversations", "rejected_conversations") if theirs else ("chosen", "rejected")
    texts = [last_turn(row.get(key)) if theirs else row.get(key) for key in keys]
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: {key!r} holds no report")
    if type(row.get("id")) not in (str, int) or row["id"] == "":
        raise ValueError(f"{where}: 'id' is {row.get('id')!r}, no study's id")
    key = "weight" if "weight" in row else "weighted_score"
    weight, image = row.get(key), row.get("rejected_image")
    if weight is not None and (type(weight) not in (int, float) or not 0 <= weight < 1e6):
        raise ValueError(f"{where}: {key!r} is {str(weight)[:60]}, no number from 0 on")
    if image is not None:
        image = inside(folder, image, f"{where}: 'rejected_image'") if isinstance(image, str) else Path("?")
        if reason := check_image(image):
            raise ValueError(f"{where}: 'rejected_image' {image}: {reason}")
    return Pair(str(row["id"]), *(text.strip() for text in texts), weight, image)


def last_turn(turns) -> str | None:
    """The text of the last turn of LLaVA's [{"from", "value"}, ...]; None where there is none."""
    return turns[-1].get("value") if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else None


def normal_weights(raw: list[float]) -> list[float]:
    """Weights of mean 1 and variance 0.1, then clipped to [0.75, 1.25]; equal ones become 1 [MMedPO's paper, as we read
    it: its printed formula, taken literally, is another, and its released trainer takes the weights as they are]."""
    mean, spread = statistics.fmean(raw), statistics.pstdev(raw)
    return [min(1.25, max(0.75, 1 + 0.1**0.5 * (w - mean) / spread)) if spread > 1e-9 else 1.0 for w in raw]


def load_pairs(path: str, studies: list[Study], weighted: bool, wanted: str = "both") -> list[Pair]:
    """The pairs of `studies`, those of one image first; a line says which are left out and why.

    wanted: `text`, those of one image alone, or `visual`, the others. weighted: by `normal_weights` of the text and of
    the visual pairs, each kind for itself; else each weight is 1.
    ValueError for a file that cannot be read, for none that is left, and where a weight is wanted and not there.
    """
    pairs, known, skips, kinds = read_pairs(path), {study.id: study for study in studies}, {}, ([], [])
    for pair in pairs:
        visual = pair.rejected_image is not None
        if pair.id not in known:
            skips.setdefault("of no study of the split", []).append(pair.id)
        elif pair.chosen == pair.rejected and not visual:
            skips.setdefault("one report twice", []).append(pair.id)
        elif wanted == ("text" if visual else "visual"):
            skips.setdefault(f"not {wanted}", []).append(pair.id)
        else:
            kinds[visual].append(pair._replace(images=known[pair.id].images))
    said = f"{path}: {len(pairs)} pairs" + (f", left out {describe_skips(skips)}" if skips else "")
    if not any(kinds):
        raise ValueError(f"{said}: none is left; a study of the split is {next(iter(known))}")
    print(said)
    for pair in (pair for kind in kinds for pair in kind if weighted and pair.weight is None):
        raise ValueError(f"{path}: the pair of study {pair.id} has no 'weight': give one, or set dpo.weighted = false")
    weights = [normal_weights([pair.weight if weighted else 1.0 for pair in kind]) for kind in kinds if kind]
    return [pair._replace(weight=w) for pair, w in zip(sum(kinds, []), sum(weights, []), strict=True)]
