"""Stand-ins for the frozen expert of Eq. 6: one that cannot err, an upper bound, and one that sees the wrong film."""

from collections.abc import Callable

import torch

from config import Config
from data import Study, load_studies
from evidence.findings import finding_counts
from evidence.reader import truth_counts
from formats.images import read_image
from scorers.expert import fold_of


def stand_in(cfg: Config, similarity: Callable | None) -> Callable:
    """What judges in Stage 2: the expert's `similarity`, or the oracle's, of the own or of another study's image.

    ValueError for an oracle of a data set without exact or gold labels.
    """
    oracle, other = cfg.scorers.expert == "oracle", cfg.scorers.expert_sees == "other"
    studies = load_studies(cfg.data, cfg.data.rl_split) if oracle or other else []
    if oracle and studies[0].labels is None:
        raise ValueError(f"scorers.expert oracle: {cfg.data.path} has no truth.jsonl, nor data.labels: no labels")
    if oracle:
        counts = finding_counts if cfg.data.labels else truth_counts
        similarity = oracle_similarity({study.id: study.labels for study in studies}, counts)
    return other_images(similarity, studies, cfg.tiny.folds) if other else similarity


def oracle_similarity(labels: dict[str, list[str]], counts: Callable = truth_counts) -> Callable:
    """Eq. 6's function (images, ids, groups [B][G]) -> (B, G): F1 in [0, 1] of each candidate against the exact or gold
    `labels` {id: labels}. No method, as it reads with the very rules that the evaluation reads with."""

    def similarity(images, ids, groups):
        found = [[counts(text, labels[key]) for text in g] for key, g in zip(ids, groups, strict=True)]
        return torch.tensor([[(2 * c["correct"] + 1e-6) / (c["stated"] + c["true"] + 1e-6) for c in g] for g in found])

    return similarity


def other_images(similarity: Callable, studies: list[Study], folds: int) -> Callable:
    """The same expert, shown for each study the image of the next one of its fold, always the same: what it then pays
    for is no sight. Of the fold: a cross-fitted expert judges what it never saw. ValueError for a fold of one study."""
    of_fold: dict[int, list[Study]] = {}
    for study in studies:
        of_fold.setdefault(fold_of(study.id, folds), []).append(study)
    other = {a.id: b for part in of_fold.values() for a, b in zip(part, part[1:] + part[:1], strict=True)}
    if alone := [key for key, study in other.items() if study.id == key]:
        raise ValueError(f"scorers.expert_sees other: study {alone[0]} is alone in its fold of {folds}: take more")

    def blind(images, ids, groups):
        shown = [other[key] for key in ids]
        return similarity([read_image(study.image) for study in shown], [study.id for study in shown], groups)

    return blind
