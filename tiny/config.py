"""The settings of the small models that are built from a data set's own training split (build.py)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

Updates = Annotated[int, Field(ge=1, lt=2**31)]


@dataclass
class TinyConfig:
    """How large `tiny:base`, `tiny:expert` and `tiny:labeller` are, and how long they are trained."""

    image_size: Annotated[int, Field(ge=32, le=512, multiple_of=16)] = 64  # pixels along each side [ours]
    vocabulary: Annotated[int, Field(ge=400, le=50_000)] = 1200  # tokens of the policy, about [ours]
    max_tokens: Annotated[int, Field(ge=8, le=1000)] = 160  # of a report on which the base is trained [ours]
    vision_steps: Updates = 1200  # updates of the vision tower as a multi-label classifier, 64 images each [ours]
    base_steps: Updates = 800  # updates of projection and language model on reports, 48 each [ours]
    folds: Annotated[int, Field(ge=2, le=9)] = 3  # experts: each never sees the studies of its fold [ours]
    expert_steps: Updates = 600  # updates of each of them, 128 image-report pairs each [ours]
    labeller_steps: Updates = 1000  # updates of the CheXbert-format labeller, 16 reports each [ours]
