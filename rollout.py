"""Hand-written group sampling: G candidate reports per study, with the log-prob of every token.

    1) prefill      image + prompt, once per study: keys and values (B, ...), never copied G times
    2) logits       of each report's next token, as the loss will see them: temperature, banned tokens (N, V)
    3) draw         top-k / top-p, then an inverse-CDF draw from the study's own uniform numbers (N,)
    4) record       token and log-prob; a report is finished by its first EOS, whatever comes after
    5) loop         one more token for the reports still being written; the finished leave the batch now and then

The draw uses uniform numbers made from (seed, update, study id) alone, so a study's candidates do not depend on its
batch mates, on the number of processes or on what ran before.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from model import encode_prompts, get_base, next_hidden, policy_logits, prefill, require_finite, sampling_rules
from running import parallel
from vlm.families import encode_images
from vlm.fast_linear import fast_linears

EVALUATION = -1  # the update whose random numbers evaluation takes: none of training


@dataclass
class Rollout:
    """N = B * G candidates; row b * G + g is candidate g of study b."""

    completions: Tensor  # (N, T) token ids, right-padded
    completion_mask: Tensor  # (N, T) 1 up to and including the first EOS, by position, never by token value
    logps: Tensor  # (N, T) log-probs under the tempered, untruncated policy; 0 where masked
    finished: Tensor  # (N,) bool: ended by EOS, not cut off at the length limit

    def record(self, rows: Tensor, t: int, token: Tensor, logps: Tensor, eos: Tensor) -> None:
        """Token t (n,) of reports `rows` (n,) with log-probs (n, V); what comes after a report's EOS is dropped."""
        live = ~self.finished[rows]  # (n,)
        self.completions[rows, t] = torch.where(live, token, self.completions[rows, t])
        self.completion_mask[rows, t] = live.long()  # an EOS drawn now is still part of the report
        self.logps[rows, t] = torch.where(live, logps.gather(1, token[:, None])[:, 0], 0.0)  # (n, V) -> (n,)
        self.finished[rows] |= torch.isin(token, eos)  # (n,)


def uniforms(ids: list[str], seed: int, step: int, group_size: int, length: int) -> Tensor:
    """Uniform numbers (B * G, T) in [0, 1), a function of (seed, step, study id) alone."""
    rows = []
    for study_id in ids:
        digest = hashlib.sha256(f"{seed}/{step}/{study_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(group_size, length, generator=generator))  # (G, T)
    return torch.cat(rows)  # (B * G, T)


def truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top-k tokens, then all but the smallest set of mass >= top_p. (N, V) -> (N, V), unnormalised."""
    if top_k > 0:
        kth = probs.topk(min(top_k, probs.shape[-1]), dim=-1).values[:, -1:]  # (N, 1)
        probs = probs.masked_fill(probs < kth, 0.0)  # (N, V)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)  # (N, V) each
        before = ordered.cumsum(-1) - ordered  # (N, V) mass of the tokens ranked above this one
        ordered = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)  # (N, V)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)  # (N, V)
    return probs


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling: (N, V) weights, (N,) uniforms -> (N,) token ids. A token of weight 0 is never drawn."""
    cdf = probs.cumsum(-1)  # (N, V)
    total = cdf[:, -1:]  # (N, 1)
    # u * total can round up to total itself: stay below it, so that the index exists and has weight
    point = torch.minimum(u[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))  # (N, 1)
    return torch.searchsorted(cdf, point, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)  # (N,); NaN comes after all


@torch.no_grad()
def sample(model, inputs, rules, u, max_new_tokens, group_size=1, top_p=1.0, top_k=0, together=False, compiled=False):
    """Write `group_size` reports for each of the B encoded prompts. u: (N, T) uniforms, or None for greedy decoding.

    rules: model.SamplingRules. together: go on until every process is done, as a base that is spread over them needs.
    compiled: vlm/static_decoding.py. Returns a Rollout.
    """
    base = get_base(model)
    with fast_linears(base, not compiled):
        cache, hidden, first = prefill(model, inputs, compiled)  # 1); hidden (B, D), first (B,)
        cache.start(group_size, max_new_tokens - 1)  # the last token is never read
        hidden = hidden.repeat_interleave(group_size, dim=0)  # (N, D)
        first = first.repeat_interleave(group_size)  # (N,) position of token 0
        completions = torch.full((len(hidden), max_new_tokens), rules.eos_ids[0], device=hidden.device)  # (N, T)
        out = Rollout(completions, torch.zeros_like(completions), torch.zeros_like(completions, dtype=torch.float32),
                      torch.zeros_like(first, dtype=torch.bool))  # fmt: skip
        rules, u = rules.to(hidden.device), u if u is None else u.to(hidden.device)
        rows = torch.arange(len(hidden), device=hidden.device)  # (n,) the reports in the batch, n = N at first
        for t in range(max_new_tokens):
            logits = policy_logits(base.lm_head(hidden), torch.full_like(rows, t), rules)  # 2) (n, V)
            logps = logits.log_softmax(dim=-1)  # (n, V)
            token = logits.argmax(-1) if u is None else draw(truncate(logps.exp(), top_k, top_p), u[rows, t])  # 3) (n,)
            out.record(rows, t, token, logps, rules.eos_ids)  # 4)
            if t == max_new_tokens - 1:
                break
            stay = cache.keep(~out.finished[rows])  # (n',) places in the batch that go on; none: all are finished
            if not (any(parallel.gather(len(stay) > 0)) if together else len(stay)):
                break
            if len(stay):  # else only other processes have reports left: go on with ours, which are dropped
                rows, token = rows[stay], token[stay]  # (n',) each
            hidden = next_hidden(model, cache, token, first[rows] + t)  # 5) (n, D)
    length = int(out.completion_mask.sum(dim=1).max())  # of the longest report
    return Rollout(out.completions[:, :length], out.completion_mask[:, :length], out.logps[:, :length], out.finished)


def rollout(model, processor, images: list, ids: list[str], cfg: Config, step: int, samples: int | None = None):
    """Write reports of B studies: G = `rollout.group_size` candidates each, or `samples`; samples = 0: one, greedy.

    Returns (Rollout with N = B * G rows, texts [B][G], the encoded prompts, which the loss pass uses again).
    """
    r, base = cfg.rollout, get_base(model)
    group_size = r.group_size if samples is None else max(samples, 1)
    inputs = encode_images(base, encode_prompts(processor, images, cfg.data.prompt, base.device))
    u = None if samples == 0 else uniforms(ids, cfg.seed, step, group_size, r.max_new_tokens)  # (N, T)
    rules = sampling_rules(model, processor, cfg)
    out = sample(model, inputs, rules, u, r.max_new_tokens, group_size, r.top_p, r.top_k, cfg.fsdp, r.compile)
    require_finite(out.logps, ids)
    lengths = out.completion_mask.sum(dim=1) - out.finished.long()  # (N,) without the EOS
    rows = [row[:n].tolist() for row, n in zip(out.completions, lengths.tolist(), strict=True)]
    texts = processor.tokenizer.batch_decode(rows, skip_special_tokens=True)
    return out, [texts[i : i + group_size] for i in range(0, len(texts), group_size)], inputs


def generate_reports(model, processor, images: list, cfg: Config, *, ids: list[str], samples: int = 0):
    """Reports for evaluation: [study][1] greedy (samples = 0) or [study][samples] sampled."""
    return rollout(model, processor, images, ids, cfg, EVALUATION, samples)[1]
