"""Stage 0: supervised fine-tuning on reference reports (Eq. 2).

The loss is the negative log-likelihood of the report's tokens, EOS included, image and prompt tokens never. The paper
sums over a report's tokens; here the batch's sum is divided by their number: no longer reports, no larger gradient.
"""

from torch import Tensor

from config import Config
from data import Study, read_views
from model import completion_logps, encode_prompts, report_ids, require_finite, sampling_rules, tokenize_reports
from rewards import wrap
from running import parallel


def sft_loss(logps: Tensor, completion_mask: Tensor, total_tokens: int | Tensor | None = None) -> Tensor:
    """Eq. 2: -sum of log-probs (B, T) where completion_mask (B, T) is 1, over the number of report tokens.

    total_tokens: the divisor where the batch is split over micro-batches or processes; None = this batch's own.
    """
    return -(logps * completion_mask).sum() / (completion_mask.sum() if total_tokens is None else total_tokens)


def text_logps(model, processor, inputs: dict[str, Tensor], texts: list[str], cfg: Config):
    """Log-probs (B, T) and mask (B, T) of `texts` after B encoded prompts, and how many were cut (max_new_tokens)."""
    rules = sampling_rules(model, processor, cfg)
    rules.temperature, rules.min_new_tokens = 1.0, 0  # Eq. 2 is about the model itself, not about how it is sampled
    device, length = inputs["input_ids"].device, cfg.rollout.max_new_tokens
    tokens, mask, cut = tokenize_reports(processor, texts, length, device, rules.banned_ids)
    return completion_logps(model, inputs, tokens, mask, rules), mask, cut


def describe_references(model, processor, studies: list[Study], cfg: Config) -> list[str]:
    """What of the references Stage 0 will not imitate, a line for each kind: their number and the first study."""
    length, banned = cfg.rollout.max_new_tokens, sampling_rules(model, processor, cfg).banned_ids
    rows, spelt = report_ids(processor, [wrap(study.report) for study in studies], banned)
    kinds = {f"are cut: longer than rollout.max_new_tokens = {length}": [len(row) > length for row in rows],
             "spell out special tokens (<unk>, </s>, <image>, ...), which are left out": spelt}  # fmt: skip
    return [f"{sum(hits)} of {len(studies)} references {kind} (first: study {studies[hits.index(True)].id})"
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
