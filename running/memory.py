"""How much GPU memory a stage needs: arithmetic on the policy's shape, no weights loaded.

    weights      every parameter of the frozen base, in model.dtype
    lora         the float32 adapter, in RL that of the reference too; gradient and AdamW's two moments of what trains
    scorers      the frozen scorers, as large as their files
    sampling     reading the B prompts, or keys, values and logits of the B * G reports being written
    loss         activations, keys, values, masks and logits that one micro-batch keeps for its backward pass
    margin       CUDA context, vision tower, fragmentation: a flat guess

Sampling and loss never overlap: a stage needs the larger of the two beside the rest. The activations' formula is held
against what autograd keeps of a small model on the CPU; on a GPU, for 7B, the loss took up to 14% more, sampling up to
22% less than is said here (benchmarks/results/peak_memory-7b.md). The sums assume an attention
kernel that keeps no attention matrix, images of the largest size and reports of the full length: real runs stay below.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from config import Config
from formats.files import read_text
from model import LOGITS
from vlm.attention import STRIP

GIB = 2**30
PROMPT_TOKENS = 64  # of the chat template and the prompt, about: no tokenizer is loaded to count them
MARGIN = 2 * GIB
SOURCES = tomllib.loads(read_text(Path(__file__).with_name("sources.toml")))
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a policy. Widths in numbers, e.g. Mistral-7B: 4096, 14336, 4096, 1024."""

    parameters: int  # of the whole model, vision tower included
    layers: int
    hidden: int
    inner: int  # of the MLP
    query: int  # heads x head size
    key: int  # key/value heads x head size
    vocabulary: int
    image_tokens: int  # of one image, at most
    projector: list[list[int]]  # [in, out] of the vision projection's linear layers


KNOWN = {name: Shape(**sizes) for name, sizes in SOURCES["shapes"].items()}  # for an estimate before the download


def read_shape(config, parameters: int, pixels: int = 0) -> Shape:
    """The shape of a policy of so many parameters by transformers' configuration of it, LLaVA's or Qwen2.5-VL's.

    pixels: of the largest image that Qwen2.5-VL's processor allows.
    """
    text, vision = config.get_text_config(), config.vision_config
    hidden, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or hidden // heads
    if config.model_type == "qwen2_5_vl":
        side = vision.spatial_merge_size  # side x side patches are a token
        wide = middle = vision.hidden_size * side**2
        tokens = pixels // (vision.patch_size * side) ** 2
    else:
        wide, middle, tokens = vision.hidden_size, hidden, (vision.image_size // vision.patch_size) ** 2
    query, key, projector = heads * head, text.num_key_value_heads * head, [[wide, middle], [middle, hidden]]
    return Shape(parameters, text.num_hidden_layers, hidden, text.intermediate_size, query, key, text.vocab_size,
                 tokens, projector)  # fmt: skip


def lora_parameters(shape: Shape, r: int, parts: str = "language+projector") -> int:
    """LoRA weights of rank r on every linear layer of the parts: r * (in + out) of each."""
    h, f, q, k = shape.hidden, shape.inner, shape.query, shape.key
    layer = 2 * (h + q) + 2 * (h + k) + 3 * (h + f)  # queries and output; keys and values; gate, up and down
    sizes = {"language": layer * shape.layers, "projector": sum(map(sum, shape.projector))}
    return r * sum(sizes[part] for part in parts.split("+"))


def kept_activations(shape: Shape, tokens: int, itemsize: int, language_trains: bool) -> int:
    """Bytes that autograd keeps of one layer for `tokens` tokens, keys and values apart.

    Per token: two norms' float32 inputs; query and attention output; gate, its SiLU and up. Where the language model's
    LoRA trains, PEFT keeps a float32 copy of each of the seven linear layers' inputs.
    """
    h, f, q = shape.hidden, shape.inner, shape.query
    copies = 4 * (5 * h + q + f) if language_trains else 0
    return tokens * (2 * 4 * h + itemsize * (2 * q + 3 * f) + copies)


def sampling_bytes(shape: Shape, prefix: int, length: int, studies: int, group: int, itemsize: int) -> int:
    """The sampler's peak: the prompts in one layer's MLP, or the keys and values of all layers with a row's logits."""
    reading = studies * prefix * (3 * shape.inner + 4 * shape.hidden) * itemsize
    writing = 6 * 4 * shape.vocabulary * studies * group
    return shape.layers * 2 * shape.key * itemsize * studies * (prefix + group * length) + max(reading, writing)


def loss_bytes(shape: Shape, prefix: int, length: int, studies: int, group: int, trains: str, cfg: Config) -> int:
    """What a micro-batch of `studies` x `group` candidates keeps for its backward pass, and the backward's own needs.

    With gradient checkpointing one hidden state per layer and token stays, and one layer in full.
    """
    itemsize = ITEMSIZE[cfg.model.dtype]
    row = prefix + group * length  # a study's image, prompt and reports
    tokens, full = studies * row, 1 if cfg.model.gradient_checkpointing else shape.layers
    kept = full * kept_activations(shape, tokens, itemsize, "language" in trains)
    kept += shape.layers * tokens * shape.hidden * itemsize if cfg.model.gradient_checkpointing else 0
    size = max(STRIP, prefix // 2)
    strips = -(-group * length // size)  # each has the prefix's keys and values too (vlm/attention.py)
    seen = row + strips * (prefix + length // 2) + group * length
    keys = full * studies * seen * 2 * itemsize * shape.query  # repeated for every query head
    mask = studies * group * length * (prefix + min(size, group * length) + length // 2) * itemsize
    # float32: kept, and two copies while the gradient is made; beyond LOGITS made in parts
    return kept + keys + mask + 3 * 4 * min(LOGITS, shape.vocabulary * studies * group * length)


def estimate(shape: Shape, cfg: Config, stage: int | str, scorers: int) -> dict[str, float]:
    """Bytes of each part of a stage on one GPU (one process), and their `total`; scorers: bytes of their files.

    DPO samples nothing; its pairs are taken for two reports under one image.
    """
    itemsize, r = ITEMSIZE[cfg.model.dtype], cfg.model.lora_r
    trains, samples = {0: cfg.sft, 1: cfg.stage1, 2: cfg.stage2, "dpo": cfg.dpo}[stage].trainable, stage in (1, 2)
    prefix = cfg.data.views * shape.image_tokens + PROMPT_TOKENS  # P
    length, group = cfg.rollout.max_new_tokens, cfg.rollout.group_size  # T, G
    settings, together = {0: (cfg.sft, 1), "dpo": (cfg.dpo, 2)}.get(stage, (cfg.grpo, cfg.grpo.micro_group or group))
    studies = min(settings.micro_batch, settings.batch_size)
    parts = {
        "weights": shape.parameters * itemsize,
        "lora": 4 * (2 if stage else 1) * lora_parameters(shape, r) + 12 * lora_parameters(shape, r, trains),
        "scorers": scorers if samples else 0,
        "sampling": sampling_bytes(shape, prefix, length, cfg.grpo.batch_size, group, itemsize) if samples else 0,
        "loss": loss_bytes(shape, prefix, length, studies, together, trains, cfg),
        "margin": MARGIN,
    }
    return parts | {"total": sum(parts.values()) - min(parts["sampling"], parts["loss"])}


def checkpoint_bytes(shape: Shape, cfg: Config) -> int:
    """Disk that the stages write: adapter/ and checkpoints: the last, the one before, the one being written."""
    r, stages = cfg.model.lora_r, (cfg.sft, *([cfg.dpo] if cfg.stage == "dpo" else [cfg.stage1, cfg.stage2]))
    adapter = 4 * lora_parameters(shape, r)
    return sum(adapter + 3 * (adapter + 8 * lora_parameters(shape, r, stage.trainable)) for stage in stages)
