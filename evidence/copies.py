"""Rows beside the policies: reports of other studies, chosen from the training split by pixels or by the expert."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config
from data import Study, load_studies
from formats.images import read_image
from rewards import wrap
from scorers.expert import load_expert

SIDE = 32  # pixels at which films are compared
AT_ONCE = 32  # studies that the expert judges together


def nearest(cfg: Config, studies: list[Study]) -> list[list[str]]:
    """[study][1]: the report of the training film whose pixels are the nearest."""
    known = load_studies(cfg.data, cfg.data.rl_split)
    ours, theirs = (torch.from_numpy(np.stack([small(s.image) for s in of])) for of in (studies, known))
    return [[wrap(known[i].report)] for i in torch.cdist(ours, theirs).argmin(dim=1).tolist()]


def small(path: Path) -> np.ndarray:
    """A film in SIDE x SIDE grey values of mean 0 and deviation 1, flat, so that exposure does not count."""
    grey = np.array(read_image(path).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
    return (grey - grey.mean()) / max(grey.std(), 1.0)


def retrieved(cfg: Config, studies: list[Study]) -> list[list[str]]:
    """[study][1]: the training report that the frozen expert finds the most similar to the image."""
    reports = list(dict.fromkeys(study.report for study in load_studies(cfg.data, cfg.data.rl_split)))
    expert, found = load_expert(cfg.scorers.expert), []
    for start in range(0, len(studies), AT_ONCE):
        some = studies[start : start + AT_ONCE]
        images, ids = [read_image(study.image) for study in some], [study.id for study in some]
        found += expert.similarity(images, ids, [reports] * len(some)).argmax(dim=1).tolist()
    return [[wrap(reports[i])] for i in found]


COPIES = {"nearest": nearest, "retrieved": retrieved}  # names for evaluate.py --policy
