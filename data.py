"""Data sets on disk: a folder becomes a list of `Study`; the order in which training sees them.

The layouts (`data.format`) are told in iu_xray.py (`r2gen`, `openi`, `kaggle`) and mimic.py (`mimic`).

What cannot be used is skipped, counted by reason and printed; `data.strict` makes a skip an error. `python data.py
--config C` prints a card of a data set: studies per split, skips, report lengths in words and in the policy's tokens.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.files import read_jsonl as read_jsonl  # the loader's users read their files here
from formats.images import check_image
from formats.images import read_image as read_image
from formats.iu_xray import kaggle_rows, openi_rows, r2gen_rows
from formats.mimic import chexpert_line, mimic_rows

SECTIONS = ("findings", "impression")
ROWS = {"r2gen": r2gen_rows, "openi": openi_rows, "kaggle": kaggle_rows, "mimic": mimic_rows}


@dataclass
class Study:
    id: str
    images: list[Path]
    """the views that the policy sees, frontal first; never empty"""
    report: str
    """the target text, without <report> tags"""
    split: str
    labels: list[str] | None = None
    """what the image really shows ("<finding>_<side>"), where truth.jsonl says so"""

    @property
    def image(self) -> Path:
        """The frontal view: what the expert sees."""
        return self.images[0]


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


def _missing(report: str | dict[str, str] | None, target: str) -> str:
    """Why there is no target text: the reason under which the study is counted as skipped."""
    if report is None:
        return "no report file"
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
    if not has_splits(cfg):
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
    rows = ROWS[cfg.format](folder, split)
    rows = tqdm(rows, desc=f"reading {split}", unit="study", delay=5, mininterval=5, leave=False)
    for study_id, report, images, reason, labels in rows:
        if cfg.limit and len(studies) == cfg.limit:
            break
        if study_id in seen:
            raise ValueError(f"data: {folder} [{split}]: id {study_id} occurs twice")
        seen.add(study_id)
        text, views = "" if report is None else target_text(report, cfg.target), images[: cfg.views]
        reason = (_missing(report, cfg.target) if not text else "") or reason
        reason = reason or next(filter(None, map(check_image, views)), "")
        if reason:
            skips.setdefault(reason, []).append(study_id)
        else:
            studies.append(Study(study_id, views, text, split, labels))
    if skips and (cfg.strict or not studies):
        why = "data.strict forbids skips" if studies else f"no usable study among {len(seen)}"
        raise ValueError(f"data: {folder} [{split}]: {why}: {describe_skips(skips)}")
    if not studies:
        raise ValueError(f"data: {folder} [{split}]: the split is empty")
    return studies, skips


def has_splits(cfg) -> bool:
    """Whether the data set says which study is in which split; Open-i's own release does not."""
    return cfg.format in ("r2gen", "mimic") or cfg.format == "kaggle" and (Path(cfg.path) / "annotation.json").exists()


def read_views(study: Study) -> list[Image.Image]:
    """The study's views as PIL "RGB" images, frontal first: what the policy's prompt shows."""
    return [read_image(path) for path in study.images]


def describe_skips(skips: dict[str, list[str]]) -> str:
    """One line, e.g. `3: no findings 2 (7, 22), no image file 1 (9)`; at most three ids of each reason."""
    parts = [f"{why} {len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" for why, ids in skips.items()]
    return f"{sum(map(len, skips.values()))}: {', '.join(parts)}"


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


def card(cfg, tokenizer=None) -> str:
    """A data set in a few lines: per split the studies, the skips and the report lengths (5%, 50%, 95%, maximum).

    cfg: a config.DataConfig. Lengths are in words and, with the policy's tokenizer, in its tokens, tags not counted.
    """
    lines = [f"{cfg.path} (format {cfg.format}, target {cfg.target}, at most {cfg.views} view(s) a study)"]
    lines.append("split     studies  words of a report 5% / 50% / 95% / max" + ", tokens likewise" * bool(tokenizer))
    splits = (cfg.sft_split, cfg.rl_split, cfg.val_split, cfg.test_split) if has_splits(cfg) else ("all",)
    for split in dict.fromkeys(splits):
        studies, skips = read_split(cfg, split)
        reports = [study.report for study in studies]
        line = f"{split:<10}{len(studies):>7}  {_percentiles([len(report.split()) for report in reports])}"
        if tokenizer:
            tokens = tokenizer(reports, add_special_tokens=False, verbose=False)["input_ids"]
            line += f"  tokens {_percentiles([len(ids) for ids in tokens])}"
        if cfg.views > 1:
            line += f"  {np.mean([len(study.images) for study in studies]):.2f} views a study"
        lines.append(line + ("" if studies[0].labels is None else "  with exact labels"))
        if skips:
            lines.append(f"{'':10}skipped {describe_skips(skips)}")
        labels = chexpert_line(Path(cfg.path), {study.id for study in studies}) if cfg.format == "mimic" else ""
        lines += [f"{'':10}{labels}"] if labels else []
    return "\n".join(lines)


def _percentiles(lengths: list[int]) -> str:
    return " / ".join(f"{value:.0f}" for value in (*np.percentile(lengths, (5, 50, 95)), max(lengths)))


def load_tokenizer(path: str):
    """The tokenizer of a model folder (or of a hub name in the local cache); None, said on one line, without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:  # ImportError: sentencepiece is not there
        reason = str(error).split("\n")[0] if Path(path).is_dir() else "no such folder, nor is it in the hub's cache"
        print(f"lengths in words only: the tokenizer of model.path {path} cannot be loaded ({reason})")


def main() -> None:
    from config import parse
    from phantom.assets import resolve  # here, because assets.py itself reads studies through this module

    try:
        cfg = resolve(parse(description="Print a card of a data set."), ("data",))
        print(card(cfg.data, load_tokenizer(cfg.model.path)))
    except ValueError as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
