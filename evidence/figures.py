"""The two figures of results/: what happened over the updates (the paper's Figure 7), and where each arm ended."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

# arm: (colour, line, label); colour-blind safe (Okabe & Ito 2008), told apart by line style in print too
ARMS = {"stage1": ("#555555", "-", "Stage 1"), "stage1_continued": ("#D55E00", "--", "Stage 1 continued"),
        "valor": ("#0072B2", "-", "Stage 2")}  # fmt: skip
PARTS = {"bleu4": ("#0072B2", "BLEU-4"), "rouge_l": ("#56B4E9", "ROUGE-L"), "bertscore": ("#009E73", "BERTScore"),
         "chexbert": ("#D55E00", "CheXbert F1"), "radgraph": ("#CC79A7", "RadGraph F1")}  # fmt: skip
WINDOW = 9  # updates in the running mean of a reward: one batch is 8 studies, noisy
ENDS = {"greedy/hallucination_rate": "hallucinated, % of stated", "greedy/sided_f1": "sided F1, %",
        "greedy/bleu_4": "BLEU-4", "sampled/hallucination_rate": "hallucinated %, sampled"}  # fmt: skip


def series(runs: list[Path], arm: str, key: str) -> pd.DataFrame:
    """A metric of an arm, one row per update k at which it was logged, one column per run."""
    logs = [pd.read_json(run / arm / "metrics.jsonl", lines=True).set_index("k") for run in runs]
    return pd.concat([log.reindex(columns=[key]).dropna() for log in logs], axis=1, join="inner")


def curve(axis, values: pd.DataFrame, colour: str, line: str = "-", label: str | None = None) -> None:
    """Mean over the runs as a line, their range as a band."""
    if len(values):
        axis.plot(values.mean(axis=1), line, color=colour, label=label, linewidth=1.6)
        axis.fill_between(values.index, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, linewidth=0)


def draw_curves(runs: list[Path], path: Path) -> None:
    """Reward components, KL, validation hallucination and BLEU-4 over the policy updates of both stages.

    runs: run folders, one per seed, with the stages sft, stage1, stage1_continued and valor.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    border = series(runs, "stage1", "reward/total").index[-1]

    def smooth(arm: str, key: str) -> pd.DataFrame:  # the mean over the updates within WINDOW // 2 of each
        values = series(runs, arm, key)
        near = np.abs(np.subtract.outer(values.index, values.index)) <= WINDOW // 2  # (K, K)
        return pd.DataFrame(near @ values.to_numpy() / near.sum(axis=1, keepdims=True), values.index)

    def validation(arm: str, key: str) -> pd.DataFrame:  # in percent, from where the arm before ended
        before = series(runs, "sft" if arm == "stage1" else "stage1", key).tail(1)
        before.index = before.index * 0 + (0 if arm == "stage1" else border)
        return 100 * pd.concat([before, series(runs, arm, key)])

    for key, (colour, label) in PARTS.items():
        curve(axes[0, 0], smooth("stage1", f"reward/{key}"), colour)
        curve(axes[0, 0], smooth("valor", f"reward/{key}"), colour, label=label)
    for arm, style in ARMS.items():
        curve(axes[0, 1], smooth(arm, "kl"), *style)
        curve(axes[1, 0], validation(arm, "val/hallucination_rate"), *style)
        curve(axes[1, 1], validation(arm, "val/bleu_4"), *style)
    axes[0, 0].margins(y=0.3)  # room for the legend
    titles = ("rewards of sampled reports, Stage 1 then Stage 2", "KL to the SFT policy, nats per token",
              "validation: hallucinated, % of stated (greedy)", "validation: BLEU-4 (greedy)")  # fmt: skip
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("policy update k")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False, ncols=3 if axis is axes[0, 0] else 1)
            axis.axvline(border + 0.5, color="black", linewidth=0.8, linestyle=":")
    figure.suptitle(f"mean of {len(runs)} seeds, band = their range; dotted: Stage 2 begins; 0 = SFT", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_arms(results: dict, path: Path) -> None:
    """Dot and 95% interval of each arm, a tick per seed; `results` as sweep_tables.collect_results makes them."""
    arms = {arm: found for arm, found in results["arms"].items() if arm not in ("base", "fixed_template")}
    columns = [key for key in ENDS if key in arms["sft"]]
    size = (12, 0.42 * len(arms) + 1.3)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    places = np.arange(len(arms))[::-1]
    for axis, key in zip(axes, columns, strict=True):
        for place, (arm, found) in zip(places, arms.items(), strict=True):
            colour = ARMS[arm][0] if arm in ("valor", "stage1_continued") else "#333333"
            mean, lo, hi = (100 * found[key][name] for name in ("mean", "lo", "hi"))
            axis.plot([lo, hi], [place, place], color=colour, linewidth=1.6)
            axis.plot(mean, place, "o", color=colour, markersize=6)
            for value in found[key]["seeds"].values():
                axis.plot(100 * value, place - 0.25, "|", color=colour, markersize=5, alpha=0.7)
        axis.set_title(ENDS[key], fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, [arm.replace("_", " ") for arm in arms])
    axes[0].set_ylim(-0.7, len(arms) - 0.3)
    what = f"{results['studies']} test studies; dot: mean of {len(results['seeds'])} seeds; line: 95% interval"
    figure.suptitle(f"{what}; ticks: each seed", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
