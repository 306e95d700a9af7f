"""The settings of what is built on first use: the phantom world, its small models, and those of a data set."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Trains = Annotated[int, Field(ge=2, lt=2**31)]  # one study at least is held out, one at least trains
AtLeastOne = Annotated[int, Field(ge=1, lt=2**31)]
Side = Annotated[int, Field(ge=32, le=2048)]  # of an image; in fewer pixels no finding would show


@dataclass
class PhantomConfig:
    """Sizes, rates and noise of the phantom world. A rate is a probability per study unless said otherwise."""

    expert: Trains = 6000  # studies in split `expert` (trains the frozen expert and the labeller's texts) [ours]
    base: Trains = 8000  # studies in split `base`: captions and reports that teach the base model to see [ours]
    sft: Count = 3000  # studies in split `sft` (Stage 0) [ours]
    train: Count = 2400  # studies in split `train` (Stages 1 and 2) [ours]
    val: Count = 256  # studies in split `val`, for choosing settings [ours]
    test: Count = 384  # studies in split `test`, reported [ours]
    image_size: Side = 64  # pixels along each side of the square image [ours]
    normal: Share = 0.20  # share of studies without any finding [ours]
    cardiomegaly: Share = 0.30  # rate in an abnormal study, before those with 0 or over 4 findings are redrawn [ours]
    edema: Share = 0.12  # the same for edema without cardiomegaly [ours]
    edema_with_cardiomegaly: Share = 0.30  # the same for edema with cardiomegaly [ours]
    device: Share = 0.20  # the same for a support device [ours]
    effusion: Share = 0.14  # the same for a pleural effusion, each side, without cardiomegaly [ours]
    effusion_with_cardiomegaly: Share = 0.26  # the same for a pleural effusion, each side, with cardiomegaly [ours]
    pneumothorax: Share = 0.11  # the same for a pneumothorax, each side [ours]
    consolidation: Share = 0.13  # the same for a consolidation, each side [ours]
    atelectasis: Share = 0.10  # the same for an atelectasis, each side, without effusion there [ours]
    atelectasis_with_effusion: Share = 0.22  # the same for an atelectasis, each side, with an effusion there [ours]
    lesion: Share = 0.11  # the same for a lung lesion, each side [ours]
    fracture: Share = 0.11  # the same for a rib fracture, each side [ours]
    omit_mild: Share = 0.14  # rate at which a reference omits a finding of the mildest severity [ours]
    omit: Share = 0.06  # rate at which a reference omits any other finding [ours]
    prior_edema_cardiomegaly: Share = 0.55  # rate at which a reference that states cardiomegaly makes edema up [ours]
    prior_atelectasis_effusion: Share = 0.50  # the same: atelectasis after an effusion on that side [ours]
    prior_effusion_consolidation: Share = 0.40  # the same: effusion after a consolidation on that side [ours]
    prior_effusion_atelectasis: Share = 0.35  # the same: effusion after an atelectasis on that side [ours]
    prior_effusion_edema: Share = 0.30  # the same: effusion, each side, after edema [ours]
    prior_cardiomegaly_edema: Share = 0.55  # the same: cardiomegaly after edema [ours]
    prior_device_effusion: Share = 0.35  # the same: a support device after an effusion [ours]
    prior_device_pneumothorax: Share = 0.45  # the same: a support device after a pneumothorax [ours]
    prior_pneumothorax_fracture: Share = 0.45  # the same: pneumothorax after a fracture on that side [ours]
    hedge: Share = 0.15  # rate at which a report hedges a finding ("possible ..."); authors vary around it [ours]
    base_prior: Share = 0.40  # share of base captions that err as the references do; the others tell the truth [ours]


@dataclass
class AssetsConfig:
    """How long the phantom's small models are trained (assets.py)."""

    vision_steps: AtLeastOne = 900  # updates of the vision tower as a multi-label classifier, 64 images each [ours]
    base_steps: AtLeastOne = 500  # updates of the base vision-language model on captions, 48 images each [ours]
    expert_steps: AtLeastOne = 750  # updates of the frozen expert, 128 image-report pairs each [ours]
    labeller_steps: AtLeastOne = 250  # updates of the CheXbert-format labeller, 64 texts each [ours]


@dataclass
class TinyConfig:
    """How large `tiny:base`, `tiny:expert` and `tiny:labeller` are, and how long they are trained (tiny/build.py)."""

    image_size: Annotated[int, Field(ge=32, le=512, multiple_of=16)] = 64  # pixels along each side [ours]
    vocabulary: Annotated[int, Field(ge=400, le=50_000)] = 1200  # tokens of the policy, about [ours]
    max_tokens: Annotated[int, Field(ge=8, le=1000)] = 160  # of a report on which the base is trained [ours]
    vision_steps: AtLeastOne = 1200  # updates of the vision tower as a multi-label classifier, 64 images each [ours]
    base_steps: AtLeastOne = 800  # updates of projection and language model on reports, 48 each [ours]
    folds: Annotated[int, Field(ge=2, le=9)] = 3  # experts: each never sees the studies of its fold [ours]
    expert_steps: AtLeastOne = 600  # updates of each of them, 128 image-report pairs each [ours]
    labeller_steps: AtLeastOne = 1000  # updates of the CheXbert-format labeller, 16 reports each [ours]


@dataclass(frozen=True)
class Recipe:
    """All that an asset depends on: its builder is given this and nothing else, and its folder is named after this."""

    data: Any  # PhantomConfig; of a `tiny:` model config.DataConfig, whose sft_split trains and val_split measures it
    models: Any  # how it is trained: AssetsConfig, or TinyConfig
    seed: int
