"""A stand-in for the frozen expert that cannot err, as it knows what each image shows: an upper bound for Eq. 6."""

from collections.abc import Callable

import torch

from config import Config
from data import load_studies
from evidence.reader import truth_counts


def oracle_similarity(labels: dict[str, list[str]]) -> Callable:
    """Eq. 6's function (images, ids, groups [B][G]) -> (B, G): sided F1 in [0, 1] of each candidate against the exact
    `labels` {id: labels}. No method, as it reads with the very rules that the evaluation reads with."""

    def similarity(images, ids, groups):
        counts = [[truth_counts(text, labels[key]) for text in g] for key, g in zip(ids, groups, strict=True)]
        return torch.tensor([[(2 * c["correct"] + 1e-6) / (c["stated"] + c["true"] + 1e-6) for c in g] for g in counts])

    return similarity


def exact_labels(cfg: Config) -> dict[str, list[str]]:
    """{id: labels} of the RL split; ValueError for a data set without a truth.jsonl."""
    studies = load_studies(cfg.data, cfg.data.rl_split)
    if studies[0].labels is None:
        raise ValueError(f"scorers.expert oracle: {cfg.data.path} has no truth.jsonl, so no exact labels")
    return {study.id: study.labels for study in studies}
