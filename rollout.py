"""Hand-written group sampling: G candidate reports per study, with the log-prob of every token.

    encode_prefix(image + prompt)   once per study                      (B rows)
    repeat its keys and values      G times                             (B * G rows)
    loop: one token per row         logits -> temperature -> top-k/top-p -> inverse-CDF draw, until EOS by position

The draw uses uniform numbers made from (seed, update, study id) alone, so a study's candidates do not depend on its
batch mates, on the number of processes or on what ran before.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from model import (
    Prefix,
    SamplingRules,
    encode_prefix,
    encode_prompts,
    get_base,
    policy_logits,
    run_suffix,
    sampling_rules,
)


@dataclass
class Rollout:
    """N = B * G candidates; row b * G + g is candidate g of study b."""

    completions: Tensor  # (N, T) token ids, right-padded
    completion_mask: Tensor  # (N, T) 1 up to and including the first EOS, by position, never by token value
    logps: Tensor  # (N, T) log-probs under the tempered, untruncated policy; 0 where masked
    finished: Tensor  # (N,) bool: ended by EOS, not cut off at the length limit


def uniforms(ids: list[str], seed: int, step: int, group_size: int, length: int) -> Tensor:
    """Uniform numbers (B * G, T) in [0, 1), a function of (seed, step, study id) alone."""
    rows = []
    for study_id in ids:
        digest = hashlib.sha256(f"{seed}/{step}/{study_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(group_size, length, generator=generator))
    return torch.cat(rows)


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top-k tokens, then all but the smallest set of mass >= top_p. (N, V) -> (N, V), unnormalised."""
    if top_k > 0:
        kth = probs.topk(min(top_k, probs.shape[-1]), dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the tokens ranked above this one
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling: (N, V) weights, (N,) uniforms -> (N,) token ids. A token of weight 0 is never drawn."""
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    # u * total can round up to total itself: stay below it, so that the index exists and has weight
    point = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point, right=True)[:, 0]


@torch.no_grad()
def sample(
    model,
    prefix: Prefix,
    rules: SamplingRules,
    u: Tensor | None,
    max_new_tokens: int,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Rollout:
    """Decode one report per row of an already repeated prefix. u: (N, T) uniforms, or None for greedy decoding."""
    base, n, device = get_base(model), len(prefix.mask), prefix.mask.device
    eos = torch.tensor(rules.eos_ids, device=device)
    completions = torch.full((n, max_new_tokens), rules.eos_ids[0], device=device)
    mask = torch.zeros_like(completions)
    logps = torch.zeros(n, max_new_tokens, device=device)
    rows = torch.arange(n, device=device)  # those still being written; finished ones leave the batch
    token, attend = prefix.last_token, prefix.mask  # (rows, 1), (rows, P + t)
    for t in range(max_new_tokens):
        hidden = run_suffix(model, prefix, token, attend, start=t)[:, -1]  # (rows, D)
        logits = policy_logits(base.lm_head(hidden), torch.full_like(rows, t), rules)  # (rows, V)
        all_logps = logits.log_softmax(dim=-1)
        if u is None:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = draw(truncate(all_logps.exp(), top_k, top_p), u[rows.cpu(), t].to(device))[:, None]
        mask[rows, t] = 1  # an EOS drawn now is still part of the report
        completions[rows, t] = token[:, 0]
        logps[rows, t] = all_logps.gather(1, token)[:, 0]
        attend = torch.cat([attend, torch.ones_like(token)], dim=1)
        going = (~torch.isin(token[:, 0], eos)).nonzero()[:, 0]
        if len(going) < len(rows):
            rows, token, attend, prefix = rows[going], token[going], attend[going], prefix.select(going)
        if len(rows) == 0:
            break
    finished = torch.ones(n, dtype=torch.bool, device=device).index_fill(0, rows, False)
    return Rollout(completions[:, : t + 1], mask[:, : t + 1], logps[:, : t + 1], finished)


def rollout(
    model, processor, images: list, ids: list[str], cfg: Config, step: int
) -> tuple[Rollout, list[list[str]], dict]:
    """Sample G candidates for each of B studies.

    Returns (Rollout with N = B * G rows, texts [B][G], the encoded prompts, which the loss pass uses again).
    """
    r, device = cfg.rollout, get_base(model).device
    inputs = encode_prompts(processor, images, cfg.data.prompt, device)
    rules = sampling_rules(model, processor, cfg)
    u = uniforms(ids, cfg.seed, step, r.group_size, r.max_new_tokens)
    with torch.no_grad():
        prefix = encode_prefix(model, inputs).repeat(r.group_size)
    out = sample(model, prefix, rules, u, r.max_new_tokens, r.top_p, r.top_k)
    texts = decode(processor, out)
    groups = [texts[i : i + r.group_size] for i in range(0, len(texts), r.group_size)]
    return out, groups, inputs


def decode(processor, out: Rollout) -> list[str]:
    """Token rows -> N texts, the part before EOS."""
    rows = [
        ids[m.bool()][: len(ids) if not f else int(m.sum()) - 1].tolist()
        for ids, m, f in zip(out.completions, out.completion_mask, out.finished, strict=True)
    ]
    return processor.tokenizer.batch_decode(rows, skip_special_tokens=True)


def generate_reports(
    model, processor, images: list, cfg: Config, *, ids: list[str], samples: int = 0
) -> list[list[str]]:
    """Reports of any number of studies for evaluation: [study][1] greedy (samples = 0) or [study][samples] sampled."""
    rules, device = sampling_rules(model, processor, cfg), get_base(model).device
    inputs = encode_prompts(processor, images, cfg.data.prompt, device)
    u = uniforms(ids, cfg.seed, -1, samples, cfg.rollout.max_new_tokens) if samples else None
    with torch.no_grad():
        prefix = encode_prefix(model, inputs).repeat(max(samples, 1))
    out = sample(model, prefix, rules, u, cfg.rollout.max_new_tokens, cfg.rollout.top_p, cfg.rollout.top_k)
    texts, per = decode(processor, out), max(samples, 1)
    return [texts[i : i + per] for i in range(0, len(texts), per)]
