"""What an update leaves in a stage's folder: a row in metrics.jsonl, the same as TensorBoard events, and, of every
`sample_every`-th update, a group of candidates in samples.jsonl for evidence/page.py to show:

    {"k", "id", "reference",
     "greedy": [report before the update, report after it],
     "candidates": [{"text", "reward", one number for each reward's part, null for what there is not,
                     "pieces"   characters of the text that each token added; a special token, such as EOS, adds none
                     "ratio"    pi / pi_old of each token in the loss's last pass: 1 with one gradient step a batch
                     "clipped"  places of the tokens that the clipping left without a gradient
                     "kl"       k3 estimate of each token, in nats
                     "moved"    log-prob of each token after the update, less before}]}

Two greedy reports and a pass over the group are all that it computes; it draws no random number and changes no weight.
After a kill, rows written since the last checkpoint are dropped and written again, so each k stands once.
"""

import json
import math
import threading
from collections import defaultdict
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import Config
from data import Study
from formats.files import require_regular
from grpo import k3
from model import completion_logps, sampling_rules
from rollout import Rollout, generate_reports
from running.folder import private, write_text, writing
from vlm.families import select_studies


class Log:
    """metrics.jsonl, samples.jsonl and TensorBoard of a stage that began after k0, written by the first process."""

    def __init__(self, folder: Path, k0: int, done: int, active: bool = True):
        self.folder, self.active = folder, active
        if active:
            lost = done - keep_rows(folder / "metrics.jsonl", k0, k0 + done)
            if lost:
                print(f"{folder / 'metrics.jsonl'}: the rows of {lost} earlier updates are lost; the weights are not")
            keep_rows(folder / "samples.jsonl", k0, k0 + done)
            threading.excepthook = quiet
            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=k0 + done + 1)

    def write(self, k: int, row: dict[str, float], sample: dict | None = None) -> None:
        """Append the row of update k, and a group of candidates where one is given."""
        if not self.active:
            return
        append(self.folder / "metrics.jsonl", {"k": k} | row)
        if sample is not None:
            append(self.folder / "samples.jsonl", sample)
        with writing(self.folder / "tb", 100 * len(row)):
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, k)

    def close(self) -> None:
        if self.active:
            with writing(self.folder / "tb", 0):
                self.tensorboard.close()


def quiet(thread) -> None:
    """Prints no traceback of a full disk: TensorBoard's thread hands its OSError to the next write, which is a line."""
    if not issubclass(thread.exc_type, OSError):
        threading.__excepthook__(thread)


def append(path: Path, row: dict) -> None:
    """Add one line to a .jsonl."""
    line = json.dumps(row) + "\n"
    with writing(path, len(line)), open(path, "a", encoding="utf-8", opener=private) as file:
        file.write(line)


def keep_rows(path: Path, k0: int, last_k: int) -> int:
    """Keep the rows of updates k0 + 1 to `last_k`, each once and in order; their number.

    Those after it, and a last line that a kill cut short, will be written again; a line says which others are dropped.
    """
    rows, bad = {}, []
    require_regular(path)
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n")[:-1] if path.exists() else (), 1):
        try:
            k = json.loads(line)["k"]
        except (ValueError, LookupError, TypeError, RecursionError):
            k = None
        if type(k) is not int or k <= k0 or k in rows:
            bad.append(number)
        elif k <= last_k:
            rows[k] = line + "\n"
    if bad:
        print(f"{path}: line {bad[0]} and {len(bad) - 1} others without a k of their own are left out")
    if path.exists():
        write_text(path, "".join(rows[k] for k in sorted(rows)))
    return len(rows)


def group_metrics(out: Rollout, rewards: Tensor, parts: dict[str, Tensor]) -> dict[str, list[float]]:
    """Per-study metrics of a rollout: mean and spread inside the group of each reward (B, G), length, entropy, rates.

    NaN, the similarity of a candidate that is not readable, does not count.
    """
    found = {}
    for name, values in {"total": rewards, **parts}.items():
        mean = values.nanmean(dim=1)  # (B,)
        found[f"reward/{name}"] = mean.tolist()
        found[f"spread/{name}"] = (values - mean[:, None]).square().nanmean(dim=1).sqrt().tolist()
    lengths = out.completion_mask.sum(dim=1)  # (N,)
    per_row = {
        "length": lengths.float(),
        # mean -log p of the sampled tokens: estimates the entropy of the distribution they were drawn from, so with
        # top_k or top_p, whose tails `logps` still hold, it is a cross-entropy a little above that
        "entropy": -out.logps.sum(dim=1) / lengths,
        "finished_rate": out.finished.float(),
        "format_rate": parts["format"].flatten(),
    }
    return found | {name: x.view(rewards.shape).mean(dim=1).tolist() for name, x in per_row.items()}


def average(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Mean of each metric over all studies of all processes; what is NaN everywhere is left out."""
    known = defaultdict(list)
    for name, values in (item for part in parts for item in part.items()):
        known[name] += [value for value in values if not math.isnan(value)]
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def shown(row: dict[str, float]) -> dict[str, str]:
    """What stands behind the progress bar."""
    return {name.split("/")[-1]: f"{row[name]:.3f}" for name in ("loss", "reward/total", "kl") if name in row}


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
