"""Stage 0: supervised fine-tuning on reference reports (Eq. 2).

The loss is the negative log-likelihood of the report's tokens, EOS included, image and prompt tokens never. The paper
sums over a report's tokens; here the batch's sum is divided by their number: no longer reports, no larger gradient.
"""

from torch import Tensor

from config import Config
from data import Study, read_views
from formats.images import read_image
from formats.preferences import Pair
from model import completion_logps, encode_prompts, report_ids, require_finite, sampling_rules, tokenize_reports
from rewards import wrap
from running import parallel


def sft_loss(logps: Tensor, completion_mask: Tensor, total_tokens: int | Tensor | None = None) -> Tensor:
    """Eq. 2: -sum of log-probs (B, T) where completion_mask (B, T) is 1, over the number of report tokens.

    total_tokens: the divisor where the batch is split over micro-batches or processes; None = this batch's own.
    """
    return -(logps * completion_mask).sum() / (completion_mask.sum() if total_tokens is None else total_tokens)


def text_logps(model, processor, inputs: dict[str, Tensor], texts: list[str], cfg: Config):
    """Log-probs (N, T) and mask (N, T) of `texts`, N / B after each of B encoded prompts, and how many were cut."""
    rules = sampling_rules(model, processor, cfg)
    rules.temperature, rules.min_new_tokens = 1.0, 0  # Eq. 2 is about the model itself, not about how it is sampled
    device, length = inputs["input_ids"].device, cfg.rollout.max_new_tokens
    tokens, mask, cut = tokenize_reports(processor, texts, length, device, rules.banned_ids)
    return completion_logps(model, inputs, tokens, mask, rules), mask, cut


def encode_pairs(model, processor, pairs: list[Pair], cfg: Config) -> tuple[dict[str, Tensor], list[str]]:
    """Encoded prompts of n preference pairs and their 2n texts, each pair's chosen one before its rejected one.

    n prompts, each read once for its two texts; 2n where the rejected side of any pair sees an image of its own.
    """
    views = [pair.images for pair in pairs]
    if any(pair.rejected_image for pair in pairs):
        views = [side for p in pairs for side in (p.images, [p.rejected_image or p.images[0], *p.images[1:]])]
    images = [[read_image(path) for path in side] for side in views]
    texts = [wrap(text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    return encode_prompts(processor, images, cfg.data.prompt, model.device), texts


def describe_references(model, processor, studies: list[Study] | list[Pair], cfg: Config) -> list[str]:
    """What of the references, or of the pairs' reports, training will not see, a line for each kind: how many, and the
    first study."""
    length, banned = cfg.rollout.max_new_tokens, sampling_rules(model, processor, cfg).banned_ids
    told = [(s.id, text) for s in studies for text in ([s.report] if isinstance(s, Study) else [s.chosen, s.rejected])]
    rows, spelt = report_ids(processor, [wrap(text) for _, text in told], banned)
    kinds = {f"are cut: longer than rollout.max_new_tokens = {length}": [len(row) > length for row in rows],
             "spell out special tokens (<unk>, </s>, <image>, ...), which are left out": spelt}  # fmt: skip
    what = "references" if isinstance(studies[0], Study) else "reports of the pairs"
    return [f"{sum(hits)} of {len(told)} {what} {kind} (first: study {told[hits.index(True)][0]})"
            for kind, hits in kinds.items() if any(hits)]  # fmt: skip


def sft_update(model, processor, optimizer, batch: list[Study], cfg: Config, step: int, steps: int) -> dict[str, float]:
    """One update of Stage 0; `batch` is this process's share of the studies. Returns the row for metrics.jsonl.

    Learning rate: 3% warm-up, then linear decay to 0 over `steps` updates; `step` counts from 0.
    """
    lr = cfg.sft.lr * min(1.0, (step + 1) / max(1.0, 0.03 * steps)) * (1 - step / steps)
    optimizer.param_groups[0]["lr"] = lr
    model.train()  # dropout, if any, belongs to Stage 0 alone
    part, batch = {"nll": 0.0, "tokens": 0, "cut": 0}, sorted(batch, key=lambda s: len(s.report))  # less padding
    for start in range(0, len(batch), cfg.sft.micro_batch):
        studies = batch[start : start + cfg.sft.micro_batch]
        inputs = encode_prompts(processor, [read_views(s) for s in studies], cfg.data.prompt, model.device)
        logps, mask, cut = text_logps(model, processor, inputs, [wrap(s.report) for s in studies], cfg)  # (b, T)
        require_finite(logps, [s.id for s in studies])
        loss = sft_loss(logps, mask, total_tokens=1)  # the sum: divided by the global token count below
        loss.backward()
        part = {"nll": part["nll"] + loss.item(), "tokens": part["tokens"] + int(mask.sum()), "cut": part["cut"] + cut}
    total = {name: sum(p[name] for p in parallel.gather(part)) for name in part}
    norm = parallel.optimizer_step(optimizer, cfg.sft.max_grad_norm, divide_by=total["tokens"])
    return {"loss": total["nll"] / total["tokens"], "grad_norm": norm, "lr": lr, "cut_reports": total["cut"]}
