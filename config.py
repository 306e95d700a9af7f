"""Every knob of every script: one dataclass tree, TOML files, and a flag for each field.

`python train.py --help` prints the comment behind each field or above it. A flag wins over `--config FILE.toml`, that
over the default here. The defaults are the phantom's (two CPU cores); `configs/*.toml` hold the others.

Where a default comes from: [paper] VALOR, arXiv 2512.16201v2, which gives only LoRA, batch size 8, learning rate 1e-6,
3 epochs, lambda_vis 0.5, a "moderate" k_clin; [ours] on the phantom's validation split; [TRL], ...: their habits.
"""

import dataclasses
import json
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from phantom.config import AssetsConfig, AtLeastOne, Count, PhantomConfig, Share, TinyConfig

if sys.flags.optimize > 1:  # every script comes through here before it loads transformers
    sys.exit("python -OO and PYTHONOPTIMIZE=2 take away the docstrings that transformers reads: start without them")

# what a value may be; pydantic checks it wherever a config comes from (`check`)
Size = Annotated[int, Field(ge=1, le=2**16)]  # of what stands in memory at once
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Trainable = Literal["language", "projector", "language+projector"]


@dataclass
class DataConfig:
    path: str = "phantom:data"  # folder of the data set; `phantom:data` is built on first use [ours]
    # r2gen: annotation.json; openi: ecgen-radiology/*.xml; kaggle: indiana_reports.csv and indiana_projections.csv
    # (each with images/); mimic: PhysioNet's files/ and tables (formats/) [R2Gen]
    format: Literal["r2gen", "openi", "kaggle", "mimic"] = "r2gen"
    labels: str = ""  # table of gold labels in the folder, the truth of real images (formats/gold.py); "" = none [ours]
    views: Size = 1  # most images per study that the policy sees, frontal first; the expert sees one [ours]
    target: Literal["findings", "impression", "both"] = "both"  # sections written and scored [paper: both]
    prompt: str = "Write the report."  # the instruction after the image; the paper's prompts are not published [ours]
    sft_split: str = "sft"  # split that Stage 0 imitates [ours]
    rl_split: str = "train"  # split that Stages 1 and 2 sample on [ours]
    val_split: str = "val"  # split for choosing settings [R2Gen]
    test_split: str = "test"  # split that is reported [R2Gen]
    limit: Count = 0  # use only the first N studies of each split; 0 = all [ours]
    strict: bool = False  # an unusable study is an error instead of a counted skip [ours]


@dataclass
class ModelConfig:
    # base: folder or hub name of LLaVA, LLaVA-Med v1.5, Qwen2.5-VL; or tiny:base, tiny/build.py [paper: LLaVA-Med v1.5]
    path: str = "phantom:base"
    # Qwen2.5-VL: pixels to which larger images are scaled down, 784 a token; 0 = the folder's 12.8 million or so [ours]
    max_pixels: Count = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; LoRA and log-probs are float32 [ours]
    # compute each layer again in the backward pass: a third more time, far less memory, the same gradient [TRL's flag]
    gradient_checkpointing: bool = False
    lora_r: Size = 16  # LoRA rank [ours; not in the paper]
    lora_alpha: AtLeastOne = 32  # LoRA alpha, the update is scaled by alpha / r [ours; not in the paper]
    lora_dropout: Share = 0.0  # active in Stage 0 only: RL needs deterministic log-probs [ours]


@dataclass
class RolloutConfig:
    group_size: Annotated[Size, Field(ge=2)] = 8  # G, candidate reports per study [TRL's default; not in the paper]
    temperature: Positive = 1.0  # of sampling and of every log-prob in the loss [TRL; not in the paper]
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus mass kept when sampling, 1 = off [TRL; not in the paper]
    top_k: Count = 0  # number of most likely tokens kept when sampling, 0 = off [TRL; not in the paper]
    min_new_tokens: Count = 4  # tokens before the end-of-sequence token is allowed [ours; not in the paper]
    compile: bool = False  # torch.compile the decoding step (vlm/static_decoding.py): for a GPU [gpt-fast]
    max_new_tokens: Size = 96  # tokens at which a report is cut off; it stays in the loss [ours; not in the paper]


@dataclass
class RewardConfig:
    lambda_lex: Weight = 0.5  # Eq. 3 weight of BLEU-4 + ROUGE-L; with lambda_sem 1 [ours; not in the paper]
    lambda_sem: Weight = 0.5  # Eq. 3 weight of BERTScore [ours; not in the paper]
    lambda_clin: Weight = 1.0  # Eq. 5 weight of the clinical reward [ours; not in the paper]
    lambda_cx: Weight = 0.5  # Eq. 4 weight of CheXbert F1 [ours; not in the paper]
    lambda_rg: Weight = 0.5  # Eq. 4 weight of RadGraph F1 [ours; not in the paper]
    k_clin: Count = 4  # Eq. 5: clinical reward every k_clin updates, 0 = never [paper: "moderate"; 4 is ours]
    lambda_vis: Share = 0.5  # Eq. 8 share of the visual reward in Stage 2, in [0, 1] [paper: 0.5]
    lambda_format: Weight = 0.5  # weight of the format reward, added after Eq. 8's mix [ours; not in the paper]
    # headers that must stand exactly once inside the tags for the format reward; empty = tags only [ours]
    required_sections: tuple[str, ...] = ("FINDINGS", "IMPRESSION")
    rank: Literal["soft", "literal"] = "soft"  # Eq. 7 as printed or softened: rewards.rank_reward [paper: literal]
    tau: Positive = 0.03  # temperature of the soft rank, in cosine-similarity units [ours]
    mix: Literal["raw", "ranked"] = "raw"  # Eq. 8 mixes R_text as it is, or ranked to [0, 1] like r_vis [paper: raw]


@dataclass
class ScorerConfig:
    # frozen expert of Eq. 6: folder or hf-hub: name of an open_clip model; phantom:expert_noisy learnt from the
    # policy's own references; `oracle` knows the exact labels (an upper bound) [paper: not named]
    expert: str = "phantom:expert"
    expert_noise: Weight = 0.0  # deviation of a random error in each similarity: a control of experiments [ours]
    expert_sees: Literal["own", "other"] = "own"  # another study's image: does a gain need the right one? [ours]
    # checkpoint in CheXbert's format: path, or hf-hub:StanfordAIMI/RRG_scorers/chexbert.pth [Smit et al. 2020]
    chexbert: str = "phantom:labeller/chexbert.pth"
    bert: str = "phantom:labeller"  # its BERT, folder or hub name: bert-base-uncased, mostly [Smit et al. 2020]
    bertscore: str = "phantom:labeller"  # folder or hub name of BERTScore's encoder [ours]
    bertscore_layer: AtLeastOne = 2  # encoder layer whose states BERTScore compares [ours]
    # BERTScore as (F - b) / (1 - b), at least 0: b's file, or `package`: bert-score's for a hub name [bert-score]
    bertscore_baseline: str = ""
    # the `radgraph` package's model, or `rules` for the phantom's English; auto: these there, else none [ours]
    radgraph: Literal["auto", "rules", "radgraph", "radgraph-xl", "modern-radgraph-xl"] = "auto"
    radgraph_dir: str = ""  # folder of its unpacked archive, in <model type>/; empty = the package's cache [radgraph]
    # entities agree alone, with whether they have a relation, or with the relations [ours]
    radgraph_level: Literal["simple", "partial", "complete"] = "partial"


@dataclass
class SFTConfig:
    steps: Count = 220  # optimizer updates; 0 = `epochs` passes over the split [ours]
    epochs: Positive = 3.0  # passes over the split when steps = 0 [paper: 3]
    batch_size: Size = 32  # studies per update, over all processes [ours]
    micro_batch: Size = 8  # studies per forward/backward pass: the same gradient; fewer need less memory [ours]
    lr: Positive = 4e-3  # peak learning rate of AdamW; 3% warm-up, then linear decay to 0 [ours]
    max_grad_norm: Positive = 1.0  # gradient norm above which gradients are scaled down [TRL]
    trainable: Trainable = "language+projector"  # whose LoRA weights Stage 0 trains [ours; not in the paper]


@dataclass
class GRPOConfig:
    batch_size: Size = 8  # studies per update, over all processes; each has G candidates [paper: 8]
    micro_batch: Size = 2  # studies per pass, as sft.micro_batch; on a CPU a few stay in its cache [ours]
    micro_group: Count = 0  # candidates of a study per pass, 0 = all: where one study is still too much [ours]
    lr: Positive = 1.5e-3  # of AdamW; the tiny phantom needs far more than the paper's [paper: 1e-6]
    lr_scheduler_type: Literal["constant", "linear"] = "linear"  # linear: falls to 0 over each stage [TRL]
    beta: Weight = 0.04  # Eq. 10 weight of the KL to the SFT policy [DeepSeekMath; not in the paper]
    eps_low: Share = 0.2  # Eq. 10 lower clip range of the importance ratio [DeepSeekMath; not in the paper]
    eps_high: Positive = 0.2  # Eq. 10 upper clip range of the importance ratio [DeepSeekMath; not in the paper]
    num_iterations: AtLeastOne = 1  # optimizer updates per batch of rollouts, TRL's mu [TRL; not in the paper]
    advantage: Literal["rank", "zscore", "mean"] = "rank"  # Eq. 9, GRPO's z-score, or minus the mean [paper: rank]
    max_grad_norm: Positive = 1.0  # gradient norm above which gradients are scaled down [TRL]


@dataclass
class StageConfig:
    steps: Count = 60  # policy updates (rollout batches) in this stage; 0 = `epochs` passes over the split [ours]
    epochs: Positive = 3.0  # passes over the split when steps = 0 [paper: 3]
    trainable: Trainable = "language"  # whose LoRA weights train [paper: Stage 1 language, Stage 2 vision projection]


@dataclass
class DPOConfig:
    pairs: str = ""  # file of preference pairs: formats/preferences.py; evidence/pairs.py makes one [ours]
    steps: Count = 160  # optimizer updates, as both RL stages together; 0 = `epochs` passes over the pairs [ours]
    epochs: Positive = 3.0  # passes over the pairs when steps = 0 [MMedPO: 3]
    batch_size: Size = 8  # pairs per update, over all processes [MMedPO: 16; 8 as grpo.batch_size]
    micro_batch: Size = 4  # pairs per pass, as sft.micro_batch [ours]
    lr: Positive = 5e-4  # peak, of AdamW; 3% warm-up, then a cosine to 0 [ours; MMedPO: 1e-7]
    beta: Positive = 0.3  # weight of the log-ratios to the reference policy; evidence/plan_dpo.toml [ours; MMedPO: 0.1]
    kinds: Literal["both", "text", "visual"] = "both"  # which of the pairs: visual ones have a rejected_image [MMedPO]
    weighted: bool = False  # weigh the pairs' losses by their normalised `weight`; false is plain DPO [MMedPO: true]
    max_grad_norm: Positive = 1.0  # gradient norm above which gradients are scaled down [TRL]
    trainable: Trainable = "language+projector"  # whose LoRA weights train [ours]


@dataclass
class EvalConfig:
    batch_size: Size = 64  # studies decoded together [ours]
    samples: Annotated[Count, Field(le=2**16)] = 4  # sampled reports per study beside the greedy one; 0 = none [ours]
    val_studies: AtLeastOne = 128  # studies of the validation split in the passes during training (val_every) [ours]
    # BLEU, ROUGE-L, METEOR on whole texts, or cleaned and cut for IU X-Ray or MIMIC-CXR (evidence/protocols.py) [R2Gen]
    protocol: Literal["raw", "r2gen", "r2gen-mimic"] = "raw"
    bootstrap: Annotated[int, Field(ge=1, le=100_000)] = 1000  # resamples of the studies for the 95% intervals [ours]
    # GREEN's judge, folder or hub name, e.g. StanfordAIMI/GREEN-radllama2-7b; empty = no GREEN [Ostmeier et al. 2024]
    green: str = ""
    ratescore: str = ""  # Python of an environment with RaTEScore; empty = no RaTEScore [Zhao et al. 2024]
    # sided F1 (percent) that the demo's SFT policy must reach before RL, which hurts one that hardly looks [ours]
    gate: Annotated[float, Field(ge=0, le=100)] = 57.0


@dataclass
class Config:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # and of all the tables below

    # 0 = SFT, 1 = text rewards, 2 = text + visual rewards; a missing predecessor is built first [paper, Alg. 1]; beside
    # them dpo, on preference pairs, from the SFT policy [Rafailov et al. 2023]
    stage: Literal["0", "1", "2", "all", "dpo"] = "all"
    # the run folder; an interrupted run goes on from it. Under torchrun --run-dir: it takes --run for its own [ours]
    run: Annotated[str, tyro.conf.arg(aliases=("--run-dir",))] = "runs/phantom"
    # folder of this stage in the run, for branches off one predecessor; empty = sft, stage1, stage2 or dpo [ours]
    name: Annotated[str, Field(pattern=r"^([\w-][\w.-]*)?$")] = ""
    init_from: str = ""  # adapter (or stage) folder that a single --stage starts from, not the predecessor's [ours]
    reference: str = ""  # adapter (or stage) folder of the KL's reference policy; empty = sft [paper: the SFT policy]
    seed: Count = 0  # seed of everything: data order, sampling, initial LoRA weights [ours]
    assets_seed: Count = 0  # seed of the phantom's data and models, apart from `seed`: runs share them [ours]
    assets_dir: str = "assets"  # cache of the phantom's data set and models, one folder per setting [ours]
    # cpu, cuda, cuda:1, ...; auto = cuda where there is one, else cpu [ours]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|xpu|cuda(:\d+)?)$")] = "auto"
    fsdp: bool = False  # spread the base over torchrun's GPUs (PyTorch's FSDP2): it does not fit on each [ours]
    threads: Annotated[Count, Field(le=1024)] = 1  # CPU threads per process, 0 = torch's choice [ours]
    save_every: AtLeastOne = 20  # updates between checkpoints [ours]
    sample_every: AtLeastOne = 20  # updates between groups in samples.jsonl, a third of an update's time each [ours]
    val_every: Count = 0  # updates between greedy passes over eval.val_studies, logged as val/*; 0 = never [ours]

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scorers: ScorerConfig = field(default_factory=ScorerConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    stage1: StageConfig = field(default_factory=StageConfig)
    stage2: StageConfig = field(default_factory=lambda: StageConfig(steps=100, trainable="language+projector"))
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    assets: AssetsConfig = field(default_factory=AssetsConfig)
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    tiny: TinyConfig = field(default_factory=TinyConfig)


def merge(default: Config, values: dict) -> Config:
    """A copy of `default` with `values`, {"table.field": value}, in their places.

    Raises ValueError, one line that names every field of an unknown name, a wrong type or a value out of range.
    """
    tree = dataclasses.asdict(default)
    for name, value in values.items():
        *tables, key = name.split(".")
        table = tree
        for part in tables:
            table[part] = table[part] if isinstance(table.get(part), dict) else {}
            table = table[part]
        if value != {} or not isinstance(table.get(key), dict):  # an empty table changes nothing
            table[key] = value
    try:
        return TypeAdapter(type(default)).validate_json(json.dumps(tree, default=str))  # TOML knows dates, for one
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])), fault["msg"], fault["input"]) for fault in error.errors()]
        raise ValueError("; ".join(f"{name}: {said}, got {value!r}" for name, said, value in faults)) from None


def from_recorded(path: Path, default: Config) -> tuple[Config, list[str]]:
    """(`default` with a run's recorded config.json over it, names of recorded fields that are no longer known).

    A field that was added since keeps its default, one that was removed says nothing today: neither ends an old run.
    `eval.ratescore`, a program, keeps its default too: the folder of a run, perhaps a stranger's, starts nothing.
    ValueError, one line with the path, for a file that is no config or has a value that cannot be.
    """
    try:
        recorded, known = flatten(json.loads(read_regular(path))), flatten(dataclasses.asdict(default))
        taken = known.keys() - {"eval.ratescore"}
        cfg = merge(default, {name: value for name, value in recorded.items() if name in taken})
    except (ValueError, AttributeError, RecursionError) as error:  # JSON, but no object, or nested without end
        said = "not a JSON object" if isinstance(error, AttributeError) else error
        raise ValueError(f"{path}: {said}") from None
    return cfg, [ascii(name)[1:-1] for name in recorded if name not in known]  # as any terminal prints it


def read_regular(path: Path) -> str:
    """A UTF-8 file's text; ValueError for what is no regular file: a pipe would be waited for without end."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    return path.read_text(encoding="utf-8-sig")


def parse(cls=Config, description: str = "", argv: list[str] | None = None, default: Config | None = None):
    """Read flags, and before them `--config FILE.toml`, into `cls`, Config or a subclass of it.

    Ends the program with one line for a file that is not usable, and for values that cannot be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = cls() if default is None else default
    description += "\n\n--config FILE.toml sets fields from a file; flags win over it."
    path = next((i for i, word in enumerate(argv) if word.split("=")[0] == "--config"), None)
    try:
        if path is not None:
            word, _, file = argv.pop(path).partition("=")
            default = load_toml(file or (argv.pop(path) if path < len(argv) else ""), default)
        return check(tyro.cli(cls, args=argv, default=default, description=description))
    except ValueError as error:
        sys.exit(f"config: {error!s:.1500}")


def load_toml(path: str, default: Config) -> Config:
    """`default` overlaid with a TOML file; ValueError with one line when the file is not usable."""
    try:
        values = tomllib.loads(read_regular(Path(path)))
        if type(values.get("stage")) is int:
            values["stage"] = str(values["stage"])  # `stage = 2` means "2"
        return merge(default, flatten(values))
    except (OSError, ValueError, RecursionError) as error:  # the last: tables in tables without end
        raise ValueError(f"{path or '--config needs a file'}: {getattr(error, 'strerror', error)}") from None


def check(config: Config) -> Config:
    """`config` itself; ValueError, one line, for a value out of its range or fields that contradict each other."""
    merge(config, {})
    lex_and_sem = config.rewards.lambda_lex + config.rewards.lambda_sem
    if abs(lex_and_sem - 1) > 1e-6:
        raise ValueError(f"rewards.lambda_lex + rewards.lambda_sem must be 1, got {lex_and_sem:g}")
    if not config.run.strip():
        raise ValueError("run is empty: name a folder")
    if config.rollout.min_new_tokens >= config.rollout.max_new_tokens:
        raise ValueError("rollout.min_new_tokens must be below rollout.max_new_tokens")
    if 0 < config.model.max_pixels < 16 * 784:
        raise ValueError(f"model.max_pixels counts pixels, 784 a token: {config.model.max_pixels} is below 16 tokens")
    return config


def to_dict(config) -> dict:
    """The resolved config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: dict, where: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = {}
    for key, value in tree.items():  # an empty table is kept: it may be one that nobody knows
        items |= flatten(value, f"{where}{key}.") if isinstance(value, dict) and value else {where + key: value}
    return items
