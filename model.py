"""The policy: a Hugging Face vision-language model, its LoRA adapter, the frozen reference policy, log-probs.

    image ──frozen tower, once per study──▶ features ─┐
    prompt ────────────────────────────────────────────┴──▶ image + prompt, once per study ──▶ G candidate reports

Sampler (`prefill`, `next_hidden`) and loss (`completion_logps`) read image and prompt once, the reports' own tokens G
times: vlm/attention.py. Gradients flow through the shared part: the result is that of G full forwards.

The policy of a stage is "base + one LoRA adapter", which covers the language model and the vision projection;
`set_trainable` picks what trains. The reference policy (Eq. 10) is a second, frozen adapter `ref` with the SFT policy:
`disable_adapter()` would give the base model instead, which is another.
"""

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from config import Config
from running import parallel
from running.weights import loading
from vlm import attention
from vlm.adapters import load_adapter, targets
from vlm.attention import Decoding, pack, run_layers
from vlm.families import PARTS, embed_prompt, load_family, placeholder_ids, prompt_positions
from vlm.static_decoding import StaticDecoding

LOGITS = 2**25  # a GiB in float32 with their gradient and what makes it


@dataclass
class SamplingRules:
    """What turns logits into the policy's distribution, the same in the sampler and in the loss."""

    temperature: float
    min_new_tokens: int  # EOS is impossible before this position
    eos_ids: list[int] | Tensor  # (E,)
    banned_ids: list[int] | Tensor  # (banned,) never sampled: an image placeholder would break the next forward

    def to(self, device) -> "SamplingRules":
        """The same with ids that lie on the device: a list is copied there, and waited for, at every token."""
        ids = (torch.tensor(x, dtype=torch.long, device=device) for x in (self.eos_ids, self.banned_ids))
        return SamplingRules(self.temperature, self.min_new_tokens, *ids)


def sampling_rules(model, processor, cfg: Config) -> SamplingRules:
    """The rules of `cfg.rollout` for this model's special tokens."""
    base, tokenizer = get_base(model), processor.tokenizer
    eos = base.generation_config.eos_token_id  # one, several or none
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    size = base.config.get_text_config().vocab_size
    if not all(type(i) is int and 0 <= i < size for i in eos_ids):
        raise ValueError(f"{base.name_or_path}: eos_token_id {eos} of generation_config.json is none of {size} tokens")
    banned = (placeholder_ids(base.config, tokenizer) | {tokenizer.pad_token_id}) - {None} - eos_ids
    return SamplingRules(cfg.rollout.temperature, cfg.rollout.min_new_tokens, sorted(eos_ids), sorted(banned))


def policy_logits(logits: Tensor, positions: Tensor, rules: SamplingRules) -> Tensor:
    """Logits (n, V) of the tokens at report positions (n,) -> float32 logits of the policy's distribution."""
    logits = logits.float() / rules.temperature  # (n, V); float32 first: log_softmax in bf16 loses digits
    logits[:, rules.banned_ids] = float("-inf")  # (n, banned)
    too_early = (positions < rules.min_new_tokens)[:, None]  # (n, 1)
    logits[:, rules.eos_ids] = logits[:, rules.eos_ids].masked_fill(too_early, float("-inf"))  # (n, E)
    return logits


def get_base(model):
    """The Hugging Face model inside a PeftModel (LoRA layers stay active), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def load_policy(cfg: Config, adapter: Path | None = None, *, new_lora=False, trainable="", reference=None):
    """Load `cfg.model.path`, plus an adapter folder, or a new LoRA adapter (whose update is 0), or neither.

    trainable: what shall train (set_trainable). reference: the reference policy's adapter folder, for RL.
    Returns (model in eval mode, processor). ValueError for what does not fit.
    """
    m = cfg.model
    model, processor = load_family(m.path, getattr(torch, m.dtype), m.max_pixels)
    if adapter is not None:
        model = load_adapter(model, Path(adapter))
    elif new_lora:
        settings = {"r": m.lora_r, "lora_alpha": m.lora_alpha, "lora_dropout": m.lora_dropout}
        model = get_peft_model(model, LoraConfig(target_modules=targets(model), **settings))
    model.requires_grad_(False)
    prepare(model, cfg)
    if cfg.fsdp and cfg.rollout.compile:
        raise ValueError("rollout.compile: not with fsdp, which puts each layer together while it computes")
    if cfg.fsdp:
        parallel.shard(get_base(model))
    model = model.to(parallel.pick_device(cfg.device)).eval()
    base, image = get_base(model), Image.new("RGB", (64, 64), "grey")
    with loading(f"{m.path}: no prompt can be made"), torch.no_grad():  # what of it would fail later
        embed_prompt(base, encode_prompts(processor, [image], cfg.data.prompt, base.device))
    sampling_rules(model, processor, cfg)  # likewise
    if reference is not None:
        add_reference(model, reference)
    if trainable:
        set_trainable(model, trainable)
    return model, processor


def prepare(model, cfg: Config) -> None:
    """Let the language model's layers attend as vlm/attention.py says, and checkpoint them where that is wanted."""
    language_model = get_base(model).model.language_model
    language_model.set_attn_implementation(attention.NAME)
    if cfg.model.gradient_checkpointing:  # acts in train mode only
        language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def set_trainable(model, trainable: str) -> list[str]:
    """Let exactly the policy's LoRA weights of the named parts ("language+projector") train; returns their names."""
    parts = PARTS[get_base(model).config.model_type]
    wanted = re.compile(rf"({'|'.join(parts[part] for part in trainable.split('+'))})\.lora_[AB]\.default\.weight")
    names = [name for name, _ in model.named_parameters() if wanted.fullmatch(name)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    if not names:
        raise ValueError(f"no LoRA weight of '{trainable}' found: was the adapter made for this model?")
    return names


def add_reference(model: PeftModel, adapter: str | Path) -> None:
    """Load the SFT policy's adapter as the second adapter `ref`; nothing trains until `set_trainable` says so.

    Every dropout becomes 0: the log-probs of sampler, old, new and reference policy must agree.
    """
    load_adapter(model, Path(adapter), "ref")
    model.set_adapter("default")
    model.requires_grad_(False)
    for dropout in filter(lambda module: isinstance(module, torch.nn.Dropout), model.modules()):
        dropout.p = 0.0


@contextlib.contextmanager
def use_reference(model: PeftModel):
    """Within this block the model is the reference policy. Restores requires_grad, which PEFT changes on a switch."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter("default")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def encode_prompts(processor, images: list, prompt: str, device) -> dict[str, Tensor]:
    """Chat template + image preprocessing of the model's own processor -> left-padded model inputs, batch B.

    images: per study one PIL image or a list of its views. Returns input_ids and attention_mask (B, P), all images in
    the family's own form (pixel_values; Qwen: image_grid_thw, mm_token_type_ids) and image_counts (B,) of the studies.
    """
    if "<image>" in prompt or processor.image_token in prompt:
        raise ValueError("data.prompt: leave the image placeholder out; the chat template adds one per image")
    views, bos = [s if isinstance(s, list | tuple) else [s] for s in images], processor.tokenizer.bos_token
    turns = [[{"type": "image"}] * len(study) + [{"type": "text", "text": prompt}] for study in views]
    chats = [[{"role": "user", "content": turn}] for turn in turns]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    one_bos = not (bos and texts[0].startswith(bos))  # the template's or the tokenizer's
    flat = [image for study in views for image in study]
    inputs = processor(text=texts, images=flat, padding=True, add_special_tokens=one_bos, return_tensors="pt")
    return dict(inputs.to(device)) | {"image_counts": torch.tensor([len(study) for study in views], device=device)}


def prefill(model, inputs: dict[str, Tensor], compiled=False) -> tuple[Decoding, Tensor, Tensor]:
    """(Keys and values of B images and prompts, hidden states (B, D) that predict token 0, its positions (B,))."""
    base, positions = get_base(model), prompt_positions(get_base(model), inputs)  # (B, P) or (3, B, P)
    cache = (StaticDecoding if compiled else Decoding)(inputs["attention_mask"], base.dtype)
    hidden = run_layers(base, embed_prompt(base, inputs), positions, cache)  # (B, P, D)
    return cache, hidden[:, -1], report_start(positions)


def next_hidden(model, cache: Decoding, tokens: Tensor, positions: Tensor) -> Tensor:
    """Hidden states (N, D) after one more token (N,) of each report, at positions (N,)."""
    base = get_base(model)
    embeds = base.get_input_embeddings()(tokens[:, None])  # (N, 1, D)
    return cache.step(base, embeds, positions[:, None])[:, -1]


def report_start(positions: Tensor) -> Tensor:
    """Position (B,) of a report's first token behind a prompt at positions (B, P), or (3, B, P) under mRoPE.

    The prompt ends in text, whose three mRoPE positions are one number; from there on they count up by 1.
    """
    return positions.view(-1, *positions.shape[-2:])[0, :, -1] + 1


def completion_logps(
    model, inputs: dict, completions: Tensor, completion_mask: Tensor, rules: SamplingRules, packing=None
) -> Tensor:
    """log pi(o_t | image, prompt, o_<t) of every report token, Eq. 1's factors: (N, T) float32, 0 where masked.

    inputs: B encoded prompts; N = B * G, row b * G + g is candidate g of study b. completions: (N, T) token ids,
    right-padded. completion_mask: (N, T), 1 up to and including the first EOS, by position. packing: their `pack`.
    """
    base, mask = get_base(model), inputs["attention_mask"]  # (B, P)
    group = len(completions) // len(mask)  # G
    packing = packing or pack(mask, completion_mask, base.dtype)  # S slots a row for the reports' tokens
    tokens = completions[:, :-1].reshape(len(mask), -1).gather(1, packing.order)  # (B, S)
    embeds = torch.cat([embed_prompt(base, inputs), base.get_input_embeddings()(tokens)], dim=1)  # (B, P + S, D)
    before = prompt_positions(base, inputs)  # (B, P) or (3, B, P)
    after = (report_start(before)[:, None] + packing.positions).expand(*before.shape[:-1], -1)  # (B, S) or (3, B, S)
    hidden = run_layers(base, embeds, torch.cat([before, after], dim=-1), packing)  # (B, P + S, D)
    row, position = completion_mask.nonzero(as_tuple=True)  # (n,) each: one entry per real token
    places = packing.outputs.flatten(0, 1)[row, position]  # (n,) where in its study's row each is predicted
    hidden = hidden[row // group, places]  # (n, D)
    chosen = token_logps(base.lm_head, hidden, completions[row, position], position, rules)  # (n,)
    return torch.zeros(completions.shape, device=hidden.device).index_put((row, position), chosen)


def require_finite(logps: Tensor, ids: list[str], advice: str = "lower the learning rate") -> None:
    """Stop with the name of the first study whose log-probs (N, T) are not finite; N is a multiple of the studies."""
    bad = (~torch.isfinite(logps).all(dim=1)).nonzero().flatten()  # (rows,)
    if len(bad):
        study_id = ids[int(bad[0]) * len(ids) // len(logps)]
        raise ValueError(f"the log-probs of study {study_id} are not finite: {advice}")


def token_logps(lm_head, hidden: Tensor, tokens: Tensor, positions: Tensor, rules: SamplingRules) -> Tensor:
    """Log-probs (n,) of tokens (n,) at report positions (n,), predicted from hidden states (n, D).

    Logits are a loss pass's largest tensor: beyond LOGITS they come in parts, made again in the backward pass.
    """

    def part(hidden: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        logits = policy_logits(lm_head(hidden), positions, rules)  # (n, V)
        return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)  # (n,)

    size = max(1, LOGITS // lm_head.weight.shape[0])
    if len(tokens) <= size:
        return part(hidden, tokens, positions)
    parts = zip(hidden.split(size), tokens.split(size), positions.split(size), strict=True)
    return torch.cat([checkpoint(part, *some, use_reentrant=False) for some in parts])


def report_ids(processor, texts: list[str], banned: Iterable[int] = ()) -> tuple[list[list[int]], list[bool]]:
    """Token ids of each text and EOS, without special or `banned` ones; and whether it spelt out such a token."""
    tokenizer, rows = processor.tokenizer, processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    never = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {*banned}
    kept = [[i for i in row if i not in never] + [tokenizer.eos_token_id] for row in rows]
    return kept, [len(left) <= len(row) for left, row in zip(kept, rows, strict=True)]


def tokenize_reports(processor, texts: list[str], max_tokens: int, device, banned: Iterable[int] = ()):
    """Texts -> (ids (B, T) of `report_ids`, padded, mask (B, T) by position, number of texts cut to max_tokens)."""
    rows = report_ids(processor, texts, banned)[0]
    cut = sum(len(row) > max_tokens for row in rows)
    rows = [torch.tensor(row[:max_tokens], device=device) for row in rows]  # B x (its length,)
    ids = pad_sequence(rows, batch_first=True, padding_value=processor.tokenizer.eos_token_id)  # (B, T)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (B, T)
    return ids, mask, cut
