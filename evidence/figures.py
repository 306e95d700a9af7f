"""The two figures of results/: what happened over the updates (the paper's Figure 7), and where each arm ended."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# colour-blind safe (Okabe & Ito 2008), told apart by line style in black-and-white print too
TEXT_ONLY, VALOR, STAGE1 = ("#D55E00", "--"), ("#0072B2", "-"), ("#555555", "-")
PARTS = (("bleu4", "BLEU-4"), ("rouge_l", "ROUGE-L"), ("bertscore", "BERTScore"), ("chexbert", "CheXbert F1"),
         ("radgraph", "RadGraph F1"))  # fmt: skip
WINDOW = 9  # updates in the running mean of a reward: one batch is 8 studies, noisy


def series(runs: list[Path], arm: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(updates (K,), values (runs, K)) of one metric of an arm, at the updates where it was logged."""
    rows = [[json.loads(line) for line in (run / arm / "metrics.jsonl").read_text().splitlines()] for run in runs]
    values = [{row["k"]: row[key] for row in some if key in row} for some in rows]
    steps = sorted(set.intersection(*(set(v) for v in values)))
    return np.array(steps), np.array([[v[k] for k in steps] for v in values])


def smooth(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean over the updates within WINDOW // 2 of each; (runs, K) -> (runs, K)."""
    near = (np.abs(steps[:, None] - steps[None]) <= WINDOW // 2).astype(float)  # (K, K)
    return values @ near / near.sum(axis=0)


def curve(axis, runs: list[Path], arm: str, key: str, style, label=None, factor=1.0, smoothed=False, start=None):
    """Mean over the runs as a line, their range as a band. start: a point (k, values) to begin at."""
    steps, values = series(runs, arm, key)
    if not len(steps):
        return
    values = factor * (smooth(steps, values) if smoothed else values)
    if start is not None:
        steps, values = np.r_[start[0], steps], np.c_[start[1], values]
    colour, line = style
    axis.plot(steps, values.mean(axis=0), line, color=colour, label=label, linewidth=1.6)
    axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def last(runs: list[Path], arm: str, key: str, factor: float) -> np.ndarray | None:
    """(runs, 1) last logged values of a metric, None where it never was."""
    steps, values = series(runs, arm, key)
    return factor * values[:, -1:] if len(steps) else None


def draw_curves(runs: list[Path], path: Path) -> None:
    """Reward components, KL, validation hallucination and BLEU-4 over the policy updates of both stages.

    runs: run folders, one per seed, with the stages stage1, stage1_continued and valor.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    border, _ = series(runs, "stage1", "reward/total")
    for colour, (key, label) in zip(("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7"), PARTS, strict=True):
        for arm in ("stage1", "valor"):
            curve(axes[0, 0], runs, arm, f"reward/{key}", (colour, "-"), label if arm == "valor" else None, 1.0, True)
    curve(axes[0, 1], runs, "stage1", "kl", STAGE1, "Stage 1", smoothed=True)
    panels = ((axes[1, 0], "val/hallucination_rate"), (axes[1, 1], "val/bleu_4"))
    for axis, key in panels:
        before = last(runs, "sft", key, 100)
        curve(axis, runs, "stage1", key, STAGE1, "Stage 1", 100, start=None if before is None else (0, before))
    for arm, label, style in (("stage1_continued", "Stage 1 continued", TEXT_ONLY), ("valor", "Stage 2", VALOR)):
        curve(axes[0, 1], runs, arm, "kl", style, label, smoothed=True)
        for axis, key in panels:
            before = last(runs, "stage1", key, 100)
            curve(axis, runs, arm, key, style, label, 100, start=None if before is None else (border[-1], before))
    axes[0, 0].margins(y=0.3)  # room for the legend
    titles = ("rewards of sampled reports, Stage 1 then Stage 2", "KL to the SFT policy, nats per token",
              "validation: hallucinated, % of stated (greedy)", "validation: BLEU-4 (greedy)")  # fmt: skip
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("policy update k")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False, ncols=3 if axis is axes[0, 0] else 1)
            axis.axvline(border[-1] + 0.5, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"mean of {len(runs)} seeds, band = their range; dotted: Stage 2 begins; 0 = SFT", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_arms(results: dict, path: Path) -> None:
    """Dot and 95% interval of each arm, a small dot per seed; `results` as evidence.collect_results makes them."""
    columns = (("greedy/hallucination_rate", "hallucinated, % of stated"), ("greedy/sided_f1", "sided F1, %"),
               ("greedy/bleu_4", "BLEU-4"), ("sampled/hallucination_rate", "hallucinated %, sampled"))  # fmt: skip
    columns = [column for column in columns if column[0] in results["arms"]["sft"]]
    arms = [arm for arm in results["arms"] if arm not in ("base", "fixed_template")]
    size = (12, 0.42 * len(arms) + 1.3)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    places = np.arange(len(arms))[::-1]
    for axis, (key, title) in zip(axes, columns, strict=True):
        for place, arm in zip(places, arms, strict=True):
            found = results["arms"][arm][key]
            mean, lo, hi = (100 * found[name] for name in ("mean", "lo", "hi"))
            colour = VALOR[0] if arm == "valor" else TEXT_ONLY[0] if arm == "stage1_continued" else "#333333"
            axis.plot([lo, hi], [place, place], color=colour, linewidth=1.6)
            axis.plot(mean, place, "o", color=colour, markersize=6)
            seeds = [100 * value for value in found["seeds"].values()]
            axis.plot(seeds, [place - 0.25] * len(seeds), "|", color=colour, markersize=5, alpha=0.7)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, [arm.replace("_", " ") for arm in arms])
    axes[0].set_ylim(-0.7, len(arms) - 0.3)
    what = f"{results['studies']} test studies; dot: mean of {len(results['seeds'])} seeds; line: 95% interval"
    figure.suptitle(f"{what}; ticks: each seed", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
