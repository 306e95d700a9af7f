"""Data sets on disk: a folder becomes a list of `Study`; the order in which training sees them.

Layouts: formats/iu_xray.py, formats/mimic.py. What cannot be used is skipped, counted by reason and printed; an error
under `data.strict`. `python data.py --config C` prints a card of a data set: studies per split, skips, report lengths.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.gold import Gold
from formats.images import check_image, read_image
from formats.iu_xray import kaggle_rows, openi_rows, r2gen_rows
from formats.mimic import chexpert_lines, mimic_rows
from running import parallel
from running.weights import load_tokenizer

# A header stands in capitals at the start of any word, with one capital at the start of a line, else only where a
# sentence begins: "no acute findings: ..." is none.
HEADER = r"(?m:(?<!\w)(?=[A-Z]{8})|^[ \t]*(?=[A-Z])|(?:\A|(?<=[.!?:;]))\s*)(?i:(findings|impression))\s*[:\uff1a]"
ROWS = {"r2gen": r2gen_rows, "openi": openi_rows, "kaggle": kaggle_rows, "mimic": mimic_rows}


@dataclass
class Study:
    id: str
    images: list[Path]  # the views that the policy sees, frontal first; never empty
    report: str  # the target text, without <report> tags
    split: str
    labels: list[str] | None = None  # what the image shows ("<finding>_<side>"): truth.jsonl's, or gold labels
    view_known: bool = True  # False: the first image may be a lateral one

    @property
    def image(self) -> Path:
        """The frontal view: what the expert sees."""
        return self.images[0]


def read_views(study: Study) -> list[Image.Image]:
    """The study's views as PIL "RGB" images, frontal first: what the policy's prompt shows."""
    return [read_image(path) for path in study.images]


def split_sections(text: str) -> dict[str, str]:
    """{"findings": str, "impression": str} of a report, white space collapsed, "" for what is not there.

    A repeated header's texts are joined, text before the first belongs to neither. Without any: {"findings": text}.
    """
    # a byte-order mark that was pasted along, this project's own tags, Markdown's bold titles
    before, *parts = re.split(HEADER, re.sub(r"\ufeff|</?report>|\*\*", "", text))
    if not parts:
        return {"findings": " ".join(before.split())}
    found = {"findings": "", "impression": ""}
    for header, body in zip(parts[::2], parts[1::2], strict=True):
        found[header.lower()] += f" {body}"
    return {name: " ".join(body.split()) for name, body in found.items()}


def target_text(report: str | dict[str, str], target: str) -> tuple[str, str]:
    """(the text a model shall write for `report`, a text or its sections; "") or ("", why there is none).

    target "both" gives "FINDINGS: f IMPRESSION: i" and needs both, except that a text without headers stays as it is.
    """
    if isinstance(report, str):
        sections = split_sections(report)
    else:  # what follows a header inside a section is a second report
        firsts = {name: next(filter(str.strip, re.split(HEADER, text)[::2]), "") for name, text in report.items()}
        sections = {name: " ".join(text.split()) for name, text in firsts.items()}
    sections = {name: text if any(map(str.isalnum, text)) else "" for name, text in sections.items()}
    if not any(sections.values()):
        return "", "empty report" if sections else "no FINDINGS or IMPRESSION header"
    wanted = list(sections) if target == "both" else [target]
    absent = [name for name in wanted if not sections.get(name)]
    if absent:
        return "", f"no {absent[0]}"
    return " ".join(f"{name.upper()}: " * (len(wanted) > 1) + sections[name] for name in wanted), ""


def load_studies(cfg, split: str) -> list[Study]:
    """The usable studies of one split of a data set; `cfg` is a config.DataConfig. Prints what was skipped and why.

    The first process of a torchrun job reads, the others receive its list or its error: all of them must call this.
    Raises ValueError: missing or broken files, unknown split, duplicate ids, no usable study, a skip under cfg.strict.
    """
    studies, skips = parallel.broadcast(lambda: read_split(cfg, split))
    if not has_splits(cfg):
        print(f"data: {cfg.path} has no split of its own: {split!r} is all its studies, as is every other split")
    if said := remarks(cfg, studies, skips):
        print(f"data: {cfg.path} [{split}]: {len(studies)} studies, {'; '.join(said)}")
    return studies


def read_split(cfg, split: str) -> tuple[list[Study], dict[str, list[str]]]:
    """load_studies by this process alone, not printing: the studies, and {reason: [ids]} of those that were skipped."""
    folder = Path(cfg.path)
    if not folder.is_dir():
        raise ValueError(f"data.path: {folder} is no folder")
    studies, skips, seen, gold = [], {}, set(), Gold(folder, cfg.labels) if cfg.labels else None
    for row in tqdm(ROWS[cfg.format](folder, split), f"reading {split}", delay=5, mininterval=5, leave=False):
        if cfg.limit and len(studies) == cfg.limit:
            break
        if row.id in seen:
            raise ValueError(f"data: {folder} [{split}]: id {row.id} occurs twice")
        seen.add(row.id)
        views = row.images[: cfg.views]
        text, reason = ("", row.fault) if row.report is None else target_text(row.report, cfg.target)
        reason = reason or row.fault or next(filter(None, map(check_image, views)), "")
        if reason:
            skips.setdefault(reason, []).append(row.id)
        else:
            labels = gold.coded(row.id, "findings") if gold else row.labels
            studies.append(Study(row.id, views, text, split, labels, row.view_known))
    if not studies or skips and cfg.strict:
        why = "data.strict forbids skips" if studies else f"no usable study among {len(seen)}"
        why = why if seen else "the split holds no study"
        raise ValueError(f"data: {folder} [{split}]: {why}: {describe_skips(skips)}")
    return studies, skips


def has_splits(cfg) -> bool:
    """Whether the data set says which study is in which split; Open-i's own release does not."""
    return cfg.format in ("r2gen", "mimic") or cfg.format == "kaggle" and (Path(cfg.path) / "annotation.json").exists()


def remarks(cfg, studies: list[Study], skips: dict[str, list[str]]) -> list[str]:
    """What to know of a split that was read: what was skipped, and in how many studies the views are not known."""
    unknown = sum(not study.view_known for study in studies)
    table = "ViewPosition in the metadata table" if cfg.format == "mimic" else "indiana_projections.csv"
    views = f"views not known: {unknown} studies, whose first image may be a lateral one; {table} would tell"
    return ([f"skipped {describe_skips(skips)}"] if skips else []) + ([views] if unknown else [])


def describe_skips(skips: dict[str, list[str]]) -> str:
    """One line, e.g. `3: no findings 2 (7, 22), no image file 1 (9)`; at most three ids of each reason."""
    parts = [f"{why} {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" for why, ids in skips.items()]
    return f"{sum(map(len, skips.values()))}: {', '.join(parts)}"


def batch_ids(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Indexes (of n studies) in update `step`, from 0: whole passes back to back, each shuffled by seed and pass."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in {place // n for place in places}}
    return [int(orders[place // n][place % n]) for place in places]


def card(cfg, tokenizer=None) -> str:
    """A data set in a few lines: per split the studies, the skips and the reports' lengths without tags, in words and,
    with the policy's tokenizer, in its tokens."""
    lines = [f"{cfg.path} (format {cfg.format}, target {cfg.target}, at most {cfg.views} view(s) a study)"]
    lines.append("split     studies  words of a report 5% / 50% / 95% / max" + ", tokens likewise" * bool(tokenizer))
    splits = (cfg.sft_split, cfg.rl_split, cfg.val_split, cfg.test_split) if has_splits(cfg) else ("all",)
    for split in dict.fromkeys(splits):
        studies, skips = read_split(cfg, split)
        line = f"{split:<10}{len(studies):>7}  {_percentiles([len(study.report.split()) for study in studies])}"
        if tokenizer:
            tokens = tokenizer([study.report for study in studies], add_special_tokens=False, verbose=False)
            line += f"  tokens {_percentiles([len(ids) for ids in tokens['input_ids']])}"
        line += f"  {np.mean([len(study.images) for study in studies]):.2f} views a study" if cfg.views > 1 else ""
        lines.append(line + ("" if studies[0].labels is None else f"  with {'gold' if cfg.labels else 'exact'} labels"))
        notes = remarks(cfg, studies, skips) + chexpert_lines(Path(cfg.path), {study.id for study in studies})
        lines += [f"{'':10}{note}" for note in notes]
    return "\n".join(lines)


def _percentiles(lengths: list[int]) -> str:
    return " / ".join(f"{value:.0f}" for value in (*np.percentile(lengths, (5, 50, 95)), max(lengths)))


@parallel.script("data.py")
def main() -> None:
    from config import parse
    from phantom.cache import resolve
    from phantom.world import build

    cfg = resolve(parse(description="Print a card of a data set."), ("data",), {"data": build})
    try:
        tokenizer = load_tokenizer(cfg.model.path, local_files_only=True)
    except ValueError as error:
        tokenizer = None
        print(f"lengths in words only: {error}")
    print(card(cfg.data, tokenizer))


if __name__ == "__main__":
    main()
