"""A recorded group of candidates as the page shows it: its reports marked, its equations filled with their numbers.

Every number is recorded (running/record.py) or comes from the method's own functions: grpo.group_advantages,
rewards.text_reward and rank_reward.
"""

import difflib
import math
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np
import torch
from markupsafe import Markup, escape

from config import Config
from evidence.phrases import MARKS, mark_report
from evidence.reader import read_report, truth_counts
from grpo import group_advantages
from rewards import rank_reward, strip_tags, text_reward

TOKENS = ("pieces", "ratio", "clipped", "kl", "moved")  # of a candidate: running/record.py


@dataclass
class Stage:
    """A stage's folder in a run, whether it is finished (`done`) or not."""

    name: str
    title: str
    cfg: Config
    metrics: list[dict]
    samples: list[dict]
    done: bool


def marked(text: str, labels: list[str] | None) -> dict:
    """A report for the page: its HTML, where the truth is known with what it states marked, and what it omits."""
    text, html = strip_tags(text), Markup("")
    if labels is None:
        return {"html": escape(text), "omitted": [], "said": [], "stated": text, "invents": False}
    phrases, omitted = mark_report(text, labels)
    for phrase in phrases:
        said, (_, _, meaning) = ", ".join(map(spoken, phrase.labels)), MARKS[phrase.mark]
        mark = "{}" if phrase.mark == "plain" else '<mark class="{1}" title="{2}: {3}">{0}</mark>'
        html += Markup(mark).format(text[phrase.start : phrase.end], phrase.mark.split()[0], said, meaning)
    n = truth_counts(text, labels)
    said = [f"{n['correct']} right", f"{n['hallucinated']} invented"]
    said += [f"{n['wrong_side']} of them on the wrong side"] * (n["wrong_side"] > 0)
    return {"html": html, "omitted": list(map(spoken, omitted)), "said": said, "invents": n["hallucinated"] > 0,
            "stated": sorted(read_report(text).stated, key=str)}  # fmt: skip


def spoken(label: str) -> str:
    """ "effusion_left" as one says it."""
    return " ".join(reversed(label.split("_")))


def changed(before: str, after: str) -> Markup:
    """`after` with its new words in <ins>, and the words of `before` that are gone in <del>."""
    old, new, html = before.split(), after.split(), []
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = " ".join(old[a:b]), " ".join(new[c:d])
        html += [Markup("<del>{}</del>").format(gone)] * (what != "equal" and b > a)
        html += [Markup("{}" if what == "equal" else "<ins>{}</ins>").format(come)] * (d > c)
    return Markup(" ").join(html)


def equations(c: dict, others: list[dict], stage: Stage, k: int) -> list[str]:
    """Eqs. 3-9 with the numbers of candidate `c` of update k; the other candidates of its group are `others`."""
    r, n, reward, rewards = stage.cfg.rewards, len(others), c["reward"], [x["reward"] for x in (c, *others)]
    text = f"{r.lambda_lex:g} ({c['bleu4']:.3f} + {c['rouge_l']:.3f}) + {r.lambda_sem:g} · {c['bertscore']:.3f}"
    if "chexbert" in c:
        clinical = f"{r.lambda_cx:g} · {c['chexbert']:.3f} + {r.lambda_rg:g} · {c['radgraph']:.3f}"
        text, why = f"{text} + {r.lambda_clin:g} ({clinical})", ""
    else:
        why = f"; no clinical part, as {k} mod {r.k_clin} is not 0" if r.k_clin else ""
    lines, name = [f"Eqs. 3-5: R_text = {text} = {c['r_text']:.3f}{why}"], "Reward"
    total = f"R_text = {c['r_text']:.3f}"
    if "visual" in c:
        s, *rest = (-1.0 if x["similarity"] is None else x["similarity"] for x in (c, *others))
        known = c["similarity"] is not None
        wins = [1 / (1 + math.exp((x - s) / r.tau)) if r.rank == "soft" else (np.sign(s - x) + 1) / 2 for x in rest]
        soft = f"mean of σ((S - S_j) / {r.tau:g}) = ({' + '.join(f'{win:.2f}' for win in wins)}) / {n}"
        hard = f"1 - (rank - 1) / (G - 1) = 1 - ({n + 1 - sum(wins):g} - 1) / {n}"
        lines.append(f"Eq. 6: S = cos(text, image) = {s:.3f}" if known else "Eq. 6: no S of what is no readable report")
        means = f"{soft if r.rank == 'soft' else hard} = " * known
        lines.append(f"Eq. 7: r_vis = {means}{c['visual']:.3f}")
        name, text = "Eq. 8", f"{c['mixed']:.3f}" + " (R_text ranked to [0, 1])" * (r.mix == "ranked")
        total = f"(1 - {r.lambda_vis:g}) {text} + {r.lambda_vis:g} · {c['visual']:.3f}"
    lines.append(f"{name}: R = {total} + {r.lambda_format:g} · {c['format']:g} (format) = {reward:.3f}")
    below, above, mean = sum(x < reward for x in rewards), sum(x > reward for x in rewards), fmean(rewards)
    kinds = {"rank": f"({below} below - {above} above) / {n}", "mean": f"R - mean R = {reward:.3f} - {mean:.3f}",
             "zscore": f"(R - mean R) / spread = ({reward:.3f} - {mean:.3f}) / {pstdev(rewards):.3f}"}  # fmt: skip
    advantage = kinds[stage.cfg.grpo.advantage]
    return [*lines, f"Eq. 9: A = {advantage} = {c['advantage']:+.3f}"]


def tokens(c: dict, largest: np.ndarray) -> list[dict]:
    """The tokens of a candidate: text, numbers in words, and shades: advantage x ratio, change, KL, over `largest`."""
    found, end = [], 0
    numbers = zip(*(c[name] for name in ("pieces", "ratio", "kl", "moved")), strict=True)
    for i, (size, ratio, kl, moved) in enumerate(numbers):
        text, end, clipped = c["text"][end : end + size], end + size, i in c["clipped"]
        said = f"KL {kl:.3f}, ratio {ratio:.3f}{', clipped' * clipped}, then {math.exp(moved):.2f} times as likely"
        shades = (np.array([c["advantage"] * ratio, moved, kl]) / largest).round(2).tolist()
        found.append({"text": text or "■", "said": said, "clipped": clipped, "shades": shades})
    return found


def explain(stage: Stage, row: dict, labels: list[str] | None) -> dict:
    """A row of samples.jsonl with all that fills its equations, candidates from the best to the worst.

    labels: the findings in the study's image, where they are known.
    """
    r, group = stage.cfg.rewards, [dict(c, n=n) for n, c in enumerate(row["candidates"], 1)]
    parts = [name for name in row["candidates"][0] if name not in ("text", "reward", *TOKENS)]
    share, recorded = r.lambda_vis if "visual" in parts else 0.0, all(name in c for c in group for name in TOKENS)
    weights = {"bleu4": r.lambda_lex, "rouge_l": r.lambda_lex, "bertscore": r.lambda_sem,
               "chexbert": r.lambda_clin * r.lambda_cx, "radgraph": r.lambda_clin * r.lambda_rg}  # fmt: skip
    weights = {name: weight * (1 - share) for name, weight in weights.items()}
    weights |= {"visual": share, "format": r.lambda_format}
    rewards = torch.tensor([c["reward"] for c in group])  # (G,)
    r_text = torch.tensor([text_reward({name: c[name] for name in parts}, r) for c in group])  # (G,)
    mixed = rank_reward(r_text) if share and r.mix == "ranked" else r_text  # (G,)
    values = group_advantages(rewards, stage.cfg.grpo.advantage), r_text, mixed  # (G,) each
    for c, *found in zip(group, *(value.tolist() for value in values), strict=True):
        c |= dict(zip(("advantage", "r_text", "mixed"), found, strict=True)) | {"marked": marked(c["text"], labels)}
    if recorded:
        size = [np.abs([np.multiply(c["advantage"], c["ratio"]), c["moved"], c["kl"]]).max(axis=1) for c in group]
    for c in group:
        c["equations"] = equations(c, [other for other in group if other is not c], stage, row["k"])
        c["tokens"] = tokens(c, np.max(size, axis=0).clip(1e-6)) if recorded else []
    spread = {name: pstdev([c[name] for c in group if c[name] is not None] or [0]) for name in (*parts, "reward")}
    greedy, metrics = row.get("greedy", []), next((m for m in stage.metrics if m["k"] == row["k"]), {})
    return {"id": f"{stage.name}-{row['k']}", "label": f"{stage.title}, update {row['k']}, study {row['id']}",
            "k": row["k"], "study": row["id"], "stage": stage, "reference": marked(row["reference"], labels),
            "candidates": sorted(group, key=lambda c: -c["reward"]), "parts": parts, "weights": weights,
            "spread": spread, "recorded": recorded, "metrics": metrics, "known": labels is not None,
            "greedy": [marked(text, labels) for text in greedy],
            "changed": changed(*map(strip_tags, greedy)) if len({*greedy}) > 1 else ""}  # fmt: skip
