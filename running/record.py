"""The group of candidates that every `sample_every`-th update leaves in samples.jsonl, for evidence/page.py to show.

    {"k", "id", "reference",
     "greedy": [report before the update, report after it],
     "candidates": [{"text", "reward", one number for each reward's part, null for what there is not,
                     "pieces"   characters of the text that each token added; a special token, such as EOS, adds none
                     "ratio"    pi / pi_old of each token in the loss's last pass: 1 with one gradient step a batch
                     "clipped"  places of the tokens that the clipping left without a gradient
                     "kl"       k3 estimate of each token, in nats
                     "moved"    log-prob of each token after the update, less before}]}

Two greedy reports and a pass over the group are all that it computes; it draws no random number and changes no weight.
"""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from config import Config
from data import Study
from grpo import k3
from model import completion_logps, sampling_rules
from rollout import generate_reports
from vlm.families import select_studies


class Sample:
    """A batch's first study, from before the gradient step until its row can be written."""

    def __init__(self, model, processor, study: Study, views: list, cfg: Config):
        self.model, self.processor, self.study, self.views = model, processor, study, views
        self.cfg = replace(cfg, rollout=replace(cfg.rollout, compile=False))  # one report is a shape of its own
        self.before = self.greedy()

    def greedy(self) -> str:
        """The policy's greedy report as it is now."""
        return generate_reports(self.model, self.processor, [self.views], self.cfg, ids=[self.study.id])[0][0]

    @torch.no_grad()
    def row(self, k: int, texts: list[str], rewards: Tensor, parts: dict[str, Tensor], batches: list) -> dict:
        """The row of update k, after it: of G texts, of (B, G) tensors, and of train.policy_step's micro-batches."""
        columns = {"reward": rewards, **parts}.items()
        numbers = {name: [None if x != x else x for x in values[0].tolist()] for name, values in columns}
        rows = [{"text": text} | {name: numbers[name][i] for name in numbers} for i, text in enumerate(texts)]
        tokens, rules = [], sampling_rules(self.model, self.processor, self.cfg)
        for batch in batches:
            n = len(batch.completions) // len(batch.ids)  # candidates of a study; the batch begins with the first one's
            if len(tokens) == len(texts):
                break
            one, some, mask = select_studies(batch.inputs, 0, 1), batch.completions[:n], batch.mask[:n]  # (n, T)
            after = completion_logps(self.model, one, some, mask, rules)  # (n, T)
            logps, old, ref = (x[:n] for x in batch.seen)  # (n, T) each
            ratio, a = (logps - old).exp(), batch.advantages[:n, None]  # (n, T), (n, 1)
            clipped = ratio * a > ratio.clamp(1 - self.cfg.grpo.eps_low, 1 + self.cfg.grpo.eps_high) * a  # (n, T)
            values = {"ratio": ratio, "kl": k3(logps, ref), "moved": after - old}  # old: before any step on this batch
            for i, length in enumerate(mask.sum(dim=1).tolist()):
                found = {name: [round(x, 4) for x in value[i, :length].tolist()] for name, value in values.items()}
                places = clipped[i, :length].nonzero().flatten().tolist()
                tokens.append({"pieces": self.pieces(some[i, :length].tolist())} | found | {"clipped": places})
        rows = [row | found for row, found in zip(rows, tokens, strict=True)]
        return {"k": k, "id": self.study.id, "reference": self.study.report, "greedy": [self.before, self.greedy()],
                "candidates": rows}  # fmt: skip

    def pieces(self, ids: list[int]) -> list[int]:
        """How many characters each token adds to the text; a text's end may change with the token that follows it."""
        starts = self.processor.tokenizer.batch_decode([ids[:i] for i in range(len(ids) + 1)], skip_special_tokens=True)
        return [b - a for a, b in pairwise(accumulate((min(len(s), len(starts[-1])) for s in starts), max))]
