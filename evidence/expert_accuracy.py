"""How often a frozen expert orders a policy's own candidates as the exact truth does: how good the judge of Eq. 6 is.

    python -m evidence.expert_accuracy --run R --experts phantom:expert phantom:expert_100

The candidates are the samples in `<run>/eval/<split>/stage1/reports.jsonl`, which `evaluate.py --run R --policy stage1
--split val --eval.samples 8` writes. Held-out probes with true reports flatter an expert; these are the texts that it
will be asked about. `--scorers.expert-noise` applies. Writes expert_accuracy.json beside that file.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import Config
from data import Study, load_studies
from evidence.inputs import settings
from evidence.metrics import divide, interval, resample
from evidence.reader import truth_counts
from evidence.tables import write_json
from formats.files import read_jsonl
from formats.images import read_image
from phantom.assets import resolve
from scorers.expert import load_expert, with_errors


@dataclass
class AccuracyConfig(Config):
    experts: tuple[str, ...] = ("phantom:expert",)  # as scorers.expert [ours]
    split: str = "val"  # split whose candidates were evaluated [ours]


def ordered_pairs(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, K) scores and truths of n groups of K candidates -> (n, 2): pairs ordered as the truth orders them, a tie
    counting half, and pairs whose truth differs."""
    first, second = np.triu_indices(truth.shape[1], 1)
    said, true = (np.sign(x[:, first] - x[:, second]) for x in (scores, truth))  # (n, pairs)
    return np.stack([((1 + said * true) / 2 * (true != 0)).sum(1), (true != 0).sum(1)], axis=-1)


def f1(counts: dict[str, int]) -> float:
    """Sided F1 of one report; 1 where nothing is stated and nothing is there. Rounded, so that equal ones are equal."""
    both = counts["stated"] + counts["true"]
    return round(2 * counts["correct"] / both, 9) if both else 1.0


def accuracy(similarity, studies: list[Study], groups: list[list[str]]) -> dict[str, float]:
    """{"value", "lo", "hi"}: share of pairs ordered as by sided F1, with a 95% bootstrap interval over studies."""
    scores, size = [], 32
    for i in tqdm(range(0, len(studies), size), "similarities", delay=5, leave=False):
        some = studies[i : i + size]
        images, ids = [read_image(s.image) for s in some], [s.id for s in some]
        scores.append(similarity(images, ids, groups[i : i + size]).numpy())
    pairs = zip(groups, studies, strict=True)
    truth = np.array([[f1(truth_counts(text, study.labels)) for text in group] for group, study in pairs])
    found = ordered_pairs(np.concatenate(scores), truth)  # (n, 2)
    drawn = resample({"": found}, 1000, np.random.default_rng(0))[""]
    lo, hi = interval(divide(drawn[:, 0], drawn[:, 1]))
    return {"value": float(divide(*found.sum(0))), "lo": lo, "hi": hi}


def main() -> None:
    cfg = settings(AccuracyConfig(), sys.argv[1:], __doc__)
    try:
        path = Path(cfg.run) / "eval" / cfg.split / "stage1" / "reports.jsonl"
        studies = load_studies(resolve(cfg, ("data",)).data, cfg.split)
        rows = {row["id"]: row.get("samples") for row in read_jsonl(path)} if path.exists() else {}
        if lost := [s.id for s in studies if not rows.get(s.id)]:
            raise ValueError(f"{path}: no samples of study {lost[0]}: first evaluate.py --run {cfg.run} --policy stage1"
                             f" --split {cfg.split} --eval.samples 8")  # fmt: skip
        results = {}
        for name in cfg.experts:
            one = resolve(replace(cfg, scorers=replace(cfg.scorers, expert=name)), ("data", "expert"))
            similarity = with_errors(load_expert(one.scorers.expert).similarity, cfg.scorers.expert_noise)
            key = name + f" + noise {cfg.scorers.expert_noise:g}" * bool(cfg.scorers.expert_noise)
            results[key] = found = accuracy(similarity, studies, [rows[s.id] for s in studies])
            print(f"{key}: {found['value']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}] of the pairs in order")
        write_json(path.with_name("expert_accuracy.json"), results)
    except (ValueError, OSError) as error:
        sys.exit(f"expert_accuracy: {error!s:.1500}")


if __name__ == "__main__":
    main()
