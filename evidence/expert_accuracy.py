"""How often a frozen expert orders a policy's own candidates as the exact truth does: how good the judge of Eq. 6 is.

    python -m evidence.expert_accuracy --run R --experts phantom:expert phantom:expert_100 phantom:expert+0.05

The candidates: a group of rollout.group_size that the policy (Stage 1's) samples for each study of a split. Held-out
probes with true reports flatter an expert; these are the texts that it will be asked about. NAME+0.05 is that expert
with scorers.expert_noise 0.05. Each leaves a file in `<run>/eval/<split>/<policy>/accuracy/`, which the sweep reads.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config import Config
from data import Study, load_studies
from evidence.generate import batches, generate_split
from evidence.inputs import begin, one_policy
from evidence.metrics import divide, measured, resample
from evidence.reader import truth_counts
from evidence.tables import write_json
from formats.images import read_image
from model import load_policy
from phantom.assets import resolve
from rewards import strip_tags
from running import parallel
from scorers.expert import load_expert, with_errors


@dataclass
class AccuracyConfig(Config):
    experts: tuple[str, ...] = ("phantom:expert",)  # as scorers.expert [ours]
    policy: str = "stage1"  # whose candidates [ours]
    split: str = "val"  # of whose studies [ours]


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
    scores, pairs = [], [*zip(studies, groups, strict=True)]
    for some in batches(pairs, 32, "similarities", delay=5, leave=False):
        images, ids = [read_image(study.image) for study, _ in some], [study.id for study, _ in some]
        scores.append(similarity(images, ids, [group for _, group in some]).numpy())
    truth = np.array([[f1(truth_counts(text, study.labels)) for text in group] for study, group in pairs])
    found = ordered_pairs(np.concatenate(scores), truth)  # (n, 2)
    drawn = resample({"": found}, 1000, np.random.default_rng(0))[""]
    return measured(lambda sums: divide(sums[..., 0], sums[..., 1]), found.sum(0), drawn)


def accuracy_file(run: Path, expert: str, policy: str = "stage1", split: str = "val") -> Path:
    """Where the accuracy of `expert`, as --experts names it, is kept."""
    return run / "eval" / split / policy / "accuracy" / (re.sub(r"[^\w+.]+", "_", expert) + ".json")


@parallel.script("expert_accuracy")
def main() -> None:
    cfg = begin(AccuracyConfig(), __doc__)
    policy, adapter = one_policy(Path(cfg.run), cfg.policy)
    one = resolve(cfg, ("data", "base"))
    studies = load_studies(one.data, cfg.split)
    if studies[0].labels is None:
        raise ValueError(f"{one.data.path} has no exact labels, by which candidates could be ordered")
    model, processor = load_policy(one, adapter)
    outputs = generate_split(model, processor, studies, one, cfg.rollout.group_size, f"{policy}: candidates")
    groups = [[strip_tags(text) for text in group] for group in outputs]
    for key in cfg.experts:
        name, _, noise = key.partition("+")
        one = resolve(replace(cfg, scorers=replace(cfg.scorers, expert=name)), ("data", "expert"))
        similarity = with_errors(load_expert(one.scorers.expert).similarity, float(noise or 0))
        found = accuracy(similarity, studies, groups)
        write_json(accuracy_file(Path(cfg.run), key, policy, cfg.split), found)
        print(f"{key}: {found['value']:.3f} [{found['lo']:.3f}, {found['hi']:.3f}] of the pairs in order")


if __name__ == "__main__":
    main()
