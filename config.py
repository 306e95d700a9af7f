"""Every knob of every script: one dataclass tree, TOML files, and a flag for each field.

`python train.py --help` prints the text below each field. Precedence: flag > `--config FILE.toml` > the default
here. The defaults are the phantom's (two CPU cores); `configs/*.toml` hold the others.

Where a default comes from is said in brackets: [paper] VALOR, arXiv 2512.16201v2; [ours] chosen by us, on the
phantom's validation split where it matters; [TRL], [DeepSeekMath], [LLaVA] the habits of those codes. The paper
gives only: LoRA, batch size 8, learning rate 1e-6, 3 epochs, lambda_vis 0.5, a "moderate" k_clin.
"""

import dataclasses
import json
import sys
import tomllib
import typing
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import tyro

from phantom.config import AssetsConfig, PhantomConfig


@dataclass
class DataConfig:
    path: str = "phantom:data"
    """folder of the data set; `phantom:data` is built on first use [ours]"""
    format: Literal["r2gen", "openi", "kaggle", "mimic"] = "r2gen"
    """r2gen: annotation.json + images/; openi: Open-i's ecgen-radiology/*.xml + images/; kaggle: indiana_reports.csv,
    indiana_projections.csv + images/; mimic: PhysioNet's files/ and tables (iu_xray.py, mimic.py) [R2Gen]"""
    views: int = 1
    """most images per study that the policy sees, frontal first; the expert sees the first alone [ours]"""
    target: Literal["findings", "impression", "both"] = "both"
    """which sections the model writes and is scored on [paper: both]"""
    prompt: str = "Write the report."
    """the instruction after the image; the paper's prompts are not published [ours]"""
    sft_split: str = "sft"
    """split that Stage 0 imitates [ours]"""
    rl_split: str = "train"
    """split that Stages 1 and 2 sample on [ours]"""
    val_split: str = "val"
    """split for choosing settings [R2Gen]"""
    test_split: str = "test"
    """split that is reported [R2Gen]"""
    limit: int = 0
    """use only the first N studies of each split; 0 = all [ours]"""
    strict: bool = False
    """an unusable study is an error instead of a counted skip [ours]"""


@dataclass
class ModelConfig:
    path: str = "phantom:base"
    """folder or hub name of the base vision-language model: LLaVA in Hugging Face layout, LLaVA-Med v1.5 in its
    original one, or Qwen2.5-VL [paper: LLaVA-Med v1.5]"""
    max_pixels: int = 0
    """Qwen2.5-VL: pixels to which larger images are scaled down, 784 of them a token; 0 = what the model's folder says,
    usually 12.8 million, so 401408 (512 tokens) is a better start for radiographs [ours]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of the frozen base; LoRA weights and log-probs are always float32 [ours]"""
    gradient_checkpointing: bool = False
    """keep one hidden state per layer and compute the rest again in the backward pass: a third more time, a fraction of
    the memory, the same gradient [TRL's flag]"""
    lora_r: int = 16
    """LoRA rank [ours; not in the paper]"""
    lora_alpha: int = 32
    """LoRA alpha, the update is scaled by alpha / r [ours; not in the paper]"""
    lora_dropout: float = 0.0
    """LoRA dropout probability, active in Stage 0 only: RL needs deterministic log-probs [ours]"""


@dataclass
class RolloutConfig:
    group_size: int = 8
    """G, candidate reports per study [TRL's default; not in the paper]"""
    temperature: float = 1.0
    """softmax temperature of sampling and of every log-prob in the loss [TRL; not in the paper]"""
    top_p: float = 1.0
    """nucleus mass kept when sampling, 1 = off [TRL; not in the paper]"""
    top_k: int = 0
    """number of most likely tokens kept when sampling, 0 = off [TRL; not in the paper]"""
    min_new_tokens: int = 4
    """tokens before the end-of-sequence token is allowed [ours; not in the paper]"""
    max_new_tokens: int = 96
    """tokens at which a report is cut off; it then stays in the loss [ours; not in the paper]"""


@dataclass
class RewardConfig:
    lambda_lex: float = 0.5
    """Eq. 3 weight of BLEU-4 + ROUGE-L; lambda_lex + lambda_sem must be 1 [ours; not in the paper]"""
    lambda_sem: float = 0.5
    """Eq. 3 weight of BERTScore [ours; not in the paper]"""
    lambda_clin: float = 1.0
    """Eq. 5 weight of the clinical reward [ours; not in the paper]"""
    lambda_cx: float = 0.5
    """Eq. 4 weight of CheXbert F1 [ours; not in the paper]"""
    lambda_rg: float = 0.5
    """Eq. 4 weight of RadGraph F1 [ours; not in the paper]"""
    k_clin: int = 4
    """Eq. 5: clinical reward every k_clin updates, 0 = never [paper: "moderate"; 4 is ours]"""
    lambda_vis: float = 0.5
    """Eq. 8 share of the visual reward in Stage 2, in [0, 1] [paper: 0.5]"""
    lambda_format: float = 0.5
    """weight of the format reward, added after Eq. 8's mix [ours; not in the paper]"""
    required_sections: tuple[str, ...] = ("FINDINGS", "IMPRESSION")
    """headers that must stand exactly once inside the tags for the format reward; empty = tags only [ours]"""
    rank: Literal["soft", "literal"] = "soft"
    """Eq. 7 as printed (literal) or softened (soft): why, see rewards.rank_reward [paper: literal]"""
    tau: float = 0.03
    """temperature of the soft rank, in cosine-similarity units [ours]"""
    mix: Literal["raw", "ranked"] = "raw"
    """Eq. 8 mixes R_text as it is (raw) or ranked to [0, 1] like r_vis (ranked) [paper: raw]"""


@dataclass
class ScorerConfig:
    expert: str = "phantom:expert"
    """the frozen expert of Eq. 6: folder or hf-hub: name of an open_clip model; phantom:expert_noisy learnt from
    reports as noisy as the references; `oracle` knows the exact labels (an upper bound) [paper: not named]"""
    chexbert: str = "phantom:labeller/chexbert.pth"
    """checkpoint in CheXbert's format: path, or hf-hub:StanfordAIMI/RRG_scorers/chexbert.pth [Smit et al. 2020]"""
    bert: str = "phantom:labeller"
    """folder or hub name of the BERT (config, tokenizer) that the CheXbert checkpoint sits on; of the published one
    bert-base-uncased [Smit et al. 2020]"""
    bertscore: str = "phantom:labeller"
    """folder or hub name of BERTScore's encoder [ours]"""
    bertscore_layer: int = 2
    """encoder layer whose states BERTScore compares [ours]"""
    bertscore_baseline: str = ""
    """rescales BERTScore to (F - b) / (1 - b), below 0 = 0: path of a baseline file, or `package` for the one that
    bert-score ships for a hub name; empty = no rescaling [bert-score]"""
    radgraph: Literal["rules", "radgraph", "radgraph-xl", "modern-radgraph-xl"] = "rules"
    """`rules`: the rule-based reader of radgraph_rules.py, enough for the phantom's English; else the model of the
    `radgraph` package [ours]"""
    radgraph_dir: str = ""
    """folder with the package's unpacked archive in <model type>/ (config.json, weights.th, vocabulary/); empty = the
    package's own cache, filled from the hub [radgraph]"""
    radgraph_level: Literal["simple", "partial", "complete"] = "partial"
    """what has to agree: entities, with whether they have a relation, or with the relations [ours; not in the paper]"""


@dataclass
class SFTConfig:
    steps: int = 220
    """optimizer updates; 0 = `epochs` passes over the split [ours]"""
    epochs: float = 3.0
    """passes over the split when steps = 0 [paper: 3]"""
    batch_size: int = 32
    """studies per update, over all processes [ours]"""
    micro_batch: int = 8
    """studies per forward/backward pass: the gradient stays the same; fewer need less memory [ours]"""
    lr: float = 4e-3
    """peak learning rate of AdamW; 3% warm-up, then linear decay to 0 [ours]"""
    max_grad_norm: float = 1.0
    """gradient norm above which gradients are scaled down [TRL]"""
    trainable: Literal["language", "projector", "language+projector"] = "language+projector"
    """whose LoRA weights Stage 0 trains [ours; not in the paper]"""


@dataclass
class GRPOConfig:
    batch_size: int = 8
    """studies per update, over all processes; each has G candidates [paper: 8]"""
    micro_batch: int = 2
    """studies per forward/backward pass: the gradient stays the same; fewer need less memory, and on a CPU stay in its
    cache [ours]"""
    micro_group: int = 0
    """candidates of a study per forward/backward pass, 0 = all of them: when one study is still too much [ours]"""
    lr: float = 1.5e-3
    """constant learning rate of AdamW; the tiny phantom needs far more than the paper's [paper: 1e-6]"""
    beta: float = 0.04
    """Eq. 10 weight of the KL to the SFT policy [DeepSeekMath; not in the paper]"""
    eps_low: float = 0.2
    """Eq. 10 lower clip range of the importance ratio [DeepSeekMath; not in the paper]"""
    eps_high: float = 0.2
    """Eq. 10 upper clip range of the importance ratio [DeepSeekMath; not in the paper]"""
    num_iterations: int = 1
    """optimizer updates per batch of rollouts, TRL's mu [TRL; not in the paper]"""
    advantage: Literal["rank", "zscore", "mean"] = "rank"
    """Eq. 9 RankNorm, GRPO's z-score, or reward minus group mean [paper: rank]"""
    max_grad_norm: float = 1.0
    """gradient norm above which gradients are scaled down [TRL]"""


@dataclass
class StageConfig:
    steps: int = 60
    """policy updates (rollout batches) in this stage; 0 = `epochs` passes over the split [ours]"""
    epochs: float = 3.0
    """passes over the split when steps = 0 [paper: 3]"""
    trainable: Literal["language", "projector", "language+projector"] = "language"
    """whose LoRA weights this stage trains [paper: Stage 1 language, Stage 2 vision projection]"""


@dataclass
class EvalConfig:
    batch_size: int = 64
    """studies decoded together [ours]"""
    samples: int = 4
    """sampled reports per study beside the greedy one, at rollout.temperature; 0 = greedy only [ours]"""
    val_studies: int = 128
    """studies of the validation split in the passes during training (val_every) [ours]"""
    bootstrap: int = 1000
    """resamples of the studies for the 95% intervals [ours]"""
    green: str = ""
    """folder or hub name of GREEN's judge, e.g. StanfordAIMI/GREEN-radllama2-7b; empty = no GREEN (green.py)
    [Ostmeier et al. 2024]"""
    ratescore: str = ""
    """Python interpreter of an environment with RaTEScore; empty = no RaTEScore (ratescore_runner.py)
    [Zhao et al. 2024]"""
    gate: float = 57.0
    """percent: sided F1 that the demo's SFT policy must reach on the validation split before RL starts, 0 = no gate;
    Stage 2 was seen to hurt a policy that hardly looks at the image [ours]"""


def _default_stage2() -> StageConfig:
    return StageConfig(steps=100, trainable="language+projector")


@dataclass
class Config:
    stage: Literal["0", "1", "2", "all"] = "all"
    """0 = SFT, 1 = text rewards, 2 = text + visual rewards; a missing predecessor is built first [paper, Alg. 1]"""
    run: Annotated[str, tyro.conf.arg(aliases=("--run-dir",))] = "runs/phantom"
    """the run folder: config, metrics, checkpoints, adapters; an interrupted run goes on from it. Under torchrun write
    --run-dir: torchrun takes --run for its own --run-path [ours]"""
    name: str = ""
    """folder of this stage inside the run; empty = sft, stage1 or stage2. For branches off one predecessor [ours]"""
    init_from: str = ""
    """start this stage from this adapter (or stage) folder instead of the predecessor's [ours]"""
    seed: int = 0
    """seed of everything: data order, sampling, initial LoRA weights [ours]"""
    assets_seed: int = 0
    """seed of the phantom's images, reports and small models, apart from `seed` so that runs share them [ours]"""
    assets_dir: str = "assets"
    """cache of the phantom's data set and models, one folder per setting [ours]"""
    device: str = "auto"
    """auto = cuda where there is one, else cpu [ours]"""
    fsdp: bool = False
    """spread the frozen base over the GPUs of torchrun (PyTorch's FSDP2), for one that does not fit on each [ours]"""
    threads: int = 1
    """CPU threads per process, 0 = torch's choice; for small models one thread and two processes win [ours]"""
    save_every: int = 20
    """updates between checkpoints [ours]"""
    sample_every: int = 20
    """updates between groups written to samples.jsonl with their rewards [ours]"""
    val_every: int = 0
    """updates between greedy passes over eval.val_studies of data.val_split, logged as val/*; 0 = never [ours]"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scorers: ScorerConfig = field(default_factory=ScorerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=_default_stage2)
    eval: EvalConfig = field(default_factory=EvalConfig)
    assets: AssetsConfig = field(default_factory=AssetsConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)


def merge(default, values: dict, where: str = ""):
    """Return a copy of dataclass `default` with `values` (a nested dict) laid over it.

    Raises ValueError naming the key when it is no field, or when a table stands where a value belongs.
    """
    names = {f.name: f for f in dataclasses.fields(default)}
    changes = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"unknown key '{where}{key}'; known here: {', '.join(names)}")
        old = getattr(default, key)
        if dataclasses.is_dataclass(old) != isinstance(value, dict):
            raise ValueError(f"'{where}{key}' must be {'a table' if dataclasses.is_dataclass(old) else 'a value'}")
        if isinstance(value, dict):
            value = merge(old, value, f"{where}{key}.")
        changes[key] = fitting(value, names[key].type, f"{where}{key}")
    return dataclasses.replace(default, **changes)


def fitting(value, kind, name: str):
    """`value` as a field of type `kind` takes it; ValueError naming the field where it is of another type."""
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        value = str(value) if type(value) is int else value  # `stage = 2` means "2"
        if value not in options:
            raise ValueError(f"'{name}' must be one of {', '.join(map(str, options))}, not {value!r}")
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, options[0]) for item in value):
            raise ValueError(f"'{name}' must be a list of {options[0].__name__}, not {value!r}")
        return tuple(value)
    elif kind is float and type(value) is int:
        return float(value)
    elif not dataclasses.is_dataclass(kind) and type(value) is not kind:
        raise ValueError(f"'{name}' must be {kind.__name__}, not {value!r}")
    return value


def load_toml(path: str, default: Config) -> Config:
    """`default` overlaid with a TOML file; ends the program with one line when the file is not usable."""
    try:
        return merge(default, tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        sys.exit(f"config: {path or '--config needs a file;'} does not exist")
    except OSError as error:
        sys.exit(f"config: {path or '--config needs a file'}: {error.strerror}")
    except (ValueError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        sys.exit(f"config: {path}: {error}")


def parse(cls=Config, description: str = "", argv: list[str] | None = None):
    """Read flags (and `--config FILE.toml` before them) into `cls`, Config or a subclass of it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls()
    for i, word in enumerate(argv):
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            del argv[i : i + (1 if "=" in word else 2)]
            default = load_toml(path, default)
            break
    description += "\n\n--config FILE.toml sets fields from a file; flags win over it."
    config = tyro.cli(cls, args=argv, default=default, description=description)
    check(config)
    return config


def check(config: Config) -> None:
    """End the program with one line when fields contradict each other."""
    r, problems = config.rewards, []
    if abs(r.lambda_lex + r.lambda_sem - 1) > 1e-6:
        problems.append(f"rewards.lambda_lex + rewards.lambda_sem must be 1, got {r.lambda_lex + r.lambda_sem:g}")
    for name in ("lambda_lex", "lambda_sem", "lambda_clin", "lambda_cx", "lambda_rg", "lambda_format"):
        if getattr(r, name) < 0:
            problems.append(f"rewards.{name} must not be negative")
    if not 0 <= r.lambda_vis <= 1:
        problems.append(f"rewards.lambda_vis must be in [0, 1], got {r.lambda_vis:g}")
    if config.data.views < 1:
        problems.append("data.views must be at least 1")
    if config.rollout.group_size < 2:
        problems.append("rollout.group_size must be at least 2: a rank within a group of one says nothing")
    if config.rollout.temperature <= 0:
        problems.append("rollout.temperature must be above 0")
    if not 0 < config.rollout.top_p <= 1:
        problems.append(f"rollout.top_p must be in (0, 1], got {config.rollout.top_p:g}")
    if not 0 <= config.rollout.min_new_tokens < config.rollout.max_new_tokens:
        problems.append("rollout.min_new_tokens must be at least 0 and below rollout.max_new_tokens")
    none_below_0 = "sft.steps stage1.steps stage2.steps val_every data.limit rewards.k_clin eval.samples"
    for name in (*none_below_0.split(), "grpo.micro_group"):
        if attrgetter(name)(config) < 0:
            problems.append(f"{name} must not be negative")
    counts = ("save_every", "sample_every", "sft.batch_size", "sft.micro_batch", "grpo.batch_size", "grpo.micro_batch",
              "eval.batch_size")  # fmt: skip
    for name in counts:
        if attrgetter(name)(config) < 1:
            problems.append(f"{name} must be at least 1")
    if problems:
        sys.exit("config: " + "; ".join(problems))


def to_dict(config) -> dict:
    """The resolved config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
