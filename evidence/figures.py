"""The figures of results/: what happened over the updates (the paper's Figure 7), where each arm ended, where the arms
of the two sweeps over lambda_vis and k_clin did (its Figure 6), what references and expert each add, how the gain goes
with the expert's accuracy, and whether it is there in other worlds."""

import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

plt.rcParams.update({"figure.titlesize": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "grid.alpha": 0.3, "legend.fontsize": 8, "legend.frameon": False})  # fmt: skip
TABLES = tomllib.loads(Path(__file__).with_name("figures.toml").read_text(encoding="utf-8"))
CURVES, ARMS, PARTS, ENDS, SWEPT, PRIMARY, CROSSED, PHASE = TABLES.values()
WINDOW = 9  # updates in the running mean of a reward: one batch is 8 studies, noisy


def series(runs: list[Path], arm: str, key: str) -> pd.DataFrame:
    """A metric of an arm, one row per update k at which it was logged, one column per run."""
    logs = [pd.read_json(run / arm / "metrics.jsonl", lines=True).set_index("k") for run in runs]
    return pd.concat([log.reindex(columns=[key]).dropna() for log in logs], axis=1, join="inner")


def draw_curves(runs: list[Path], path: Path) -> None:
    """Reward components, KL, validation hallucination and BLEU-4 over the policy updates of both stages, with the first
    clinical reward and the beginning of Stage 2: a line is the mean of the runs, a band their range.

    runs: run folders, one per seed; nothing is drawn where SFT or one of ARMS was not trained.
    """
    if not all((run / arm / "metrics.jsonl").exists() for run in runs for arm in ("sft", *ARMS)):
        return

    def smooth(arm: str, key: str) -> pd.DataFrame:  # the mean over the updates within WINDOW // 2 of each
        values = series(runs, arm, key)
        near = np.abs(np.subtract.outer(values.index, values.index)) <= WINDOW // 2  # (K, K)
        return pd.DataFrame(near @ values.to_numpy() / near.sum(axis=1, keepdims=True), values.index)

    def validation(arm: str, key: str) -> pd.DataFrame:  # in percent, from where the arm before ended
        before = series(runs, "sft" if arm == "stage1" else "stage1", key).tail(1)
        before.index = before.index * 0 + (0 if arm == "stage1" else border)
        return 100 * pd.concat([before, series(runs, arm, key)])

    border, clinical = series(runs, "stage1", "reward/total").index[-1], series(runs, "stage1", "reward/chexbert").index
    curves = [[(smooth(arm, f"reward/{key}"), colour, "-", label * (arm == "valor"))
               for key, (colour, label) in PARTS.items() for arm in ("stage1", "valor")],
              *([(values(arm, key), *style) for arm, style in ARMS.items()] for values, key in
                ((smooth, "kl"), (validation, "val/hallucination_rate"), (validation, "val/bleu_4")))]  # fmt: skip
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    for axis, title, drawn in zip(axes.flat, CURVES, curves, strict=True):
        for values, colour, line, label in drawn:
            if len(values):
                axis.plot(values.mean(axis=1), line, color=colour, label=label, linewidth=1.6)
                axis.fill_between(values.index, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15, lw=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("policy update k")
        if axis.has_data():
            axis.legend(ncols=3 if drawn is curves[0] else 1)
            axis.axvline(border + 0.5, color="black", linewidth=0.8, linestyle=":")
            for first in clinical[:1]:
                axis.axvline(first, color="black", linewidth=0.8, linestyle="--")
    axes[0, 0].set_ylim(bottom=0)  # room for the legend
    start = "; 0 = SFT" if len(series(runs, "sft", "val/bleu_4")) else ""  # of each run it was validated
    marks = f"dashed: first clinical reward; dotted: Stage 2 begins{start}"
    finish(figure, path, f"mean of {len(runs)} seeds, band = their range; {marks}")


def draw_arms(results: dict, path: Path) -> None:
    """Each arm in the metrics of ENDS; `results` as sweep_tables.collect_results makes them."""
    arms = {arm: found for arm, found in results["arms"].items() if arm not in ("base", "fixed_template")}
    columns = {key: title for key, title in ENDS.items() if key in arms["sft"]}
    axes = draw_rows(arms, columns, (12, 0.42 * len(arms) + 1.3))
    what = f"{results['studies']} test studies; dot: mean over the seeds; line: 95% interval"
    finish(axes[0].figure, path, f"{what}; ticks: each seed")


def draw_worlds(worlds: dict[str, dict], path: Path) -> None:
    """VALOR's difference to Stage 1 continued in the primary metrics: a row for each of `worlds` {name: results}."""
    gains = {name: results["versus"].get("stage1_continued", {}).get("valor", {}) for name, results in worlds.items()}
    axes = draw_rows(gains, PRIMARY, (11, 0.5 * len(worlds) + 1.5), "#0072B2")
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.8)
    what = "VALOR minus Stage 1 continued; dot: mean of the seeds; line: 95% interval; ticks: each seed"
    finish(axes[0].figure, path, what)


def draw_rows(rows: dict, columns: dict[str, str], size: tuple[float, float], others: str = "#333333") -> np.ndarray:
    """The axes, one for each of `columns` {metric: title}, of a figure in which `rows` {name: {metric: estimate}} stand
    one below the other; others: colour of what is not one of the two arms that are compared."""
    axes = plt.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")[1]
    places = range(len(rows))[::-1]
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        for place, (name, found) in zip(places, rows.items(), strict=True):
            colour = ARMS[name][0] if name in ("valor", "stage1_continued") else others
            dots(axis, {place: found[key]} if key in found else {}, colour, across=True)
        tidy(axis, title, "x")
    axes[0].set_yticks(places, [name.replace("_", " ") for name in rows])
    axes[0].set_ylim(-0.7, len(rows) - 0.3)
    return axes


def draw_sweeps(results: dict, path: Path) -> None:
    """A row for each of sweep_tables.SWEEPS, a column for each of SWEPT: the values that were run, one beside the other
    and not to scale. Nothing is drawn where no sweep has two."""
    known = {name: grid for name, grid in results["sweeps"].items() if len(grid) > 1}
    if not known:
        return
    size = (2.7 * len(SWEPT), 2.6 * len(known) + 0.3)
    figure, axes = plt.subplots(len(known), len(SWEPT), figsize=size, squeeze=False, layout="constrained")
    for line, (name, grid) in zip(axes, known.items(), strict=True):
        for axis, (key, title) in zip(line, SWEPT.items(), strict=True):
            dots(axis, {place: arm[key] for place, arm in enumerate(grid.values()) if key in arm}, "#0072B2", "o:")
            axis.set_xticks(range(len(grid)), [f"{value:g}" for value in grid])
            axis.set_xlim(-0.5, len(grid) - 0.5)
            axis.set_xlabel(name)
            tidy(axis, title, "y")
    what = f"{results['studies']} test studies; of a row's seeds, the same for all its dots: mean, 95% interval, each"
    finish(figure, path, what)


def draw_crossed(results: dict, path: Path) -> None:
    """The primary metrics by the expert of the image reward, a line for noisy and one for clean references: CROSSED."""
    figure, axes = plt.subplots(1, len(PRIMARY), figsize=(10, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, PRIMARY.items(), strict=True):
        for shift, (name, line) in enumerate(CROSSED.items()):
            found = {place + 0.08 * shift: results["arms"][arm][key] for place, arm in enumerate(line.values())
                     if key in results["arms"].get(arm, {})}  # fmt: skip
            dots(axis, found, *(("#D55E00", "o:"), ("#0072B2", "s-"))[shift], label=name, ticks=False)
        tidy(axis, title, "y")
        axis.set_xticks(range(3), CROSSED["noisy references"])
        axis.set_xlabel("expert of the image reward")
    axes[0].legend()
    finish(figure, path, f"{results['studies']} test studies; mean over the seeds, line: 95% interval")


def draw_phase(results: dict, path: Path) -> None:
    """Each arm's gain over Stage 1 continued against its expert's measured accuracy; the line is the plan's trend."""
    gains = results["versus"].get("stage1_continued", {})
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for arm, (colour, mark) in PHASE.items():
        measured, gain = results["accuracy"].get(arm), gains.get(arm, {}).get("sampled/sided_f1")
        if measured and gain:
            place = np.mean([*measured.values()])
            dots(axis, {place: gain}, colour, mark, ticks=False)
            beside = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(arm.replace("_", " "), (place, 100 * gain["mean"]), **beside)
    for found in results["trends"]:
        if found["row"] == "a":
            at = np.array(sorted(found["places"].values()))
            axis.plot(at, 100 * np.polyval(found["line"], at), "--", color="#555555", linewidth=1)
            if found["zero"]:
                axis.axvspan(*found["zero"], color="#999999", alpha=0.2, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("pairs of Stage-1 candidates that the expert orders as exact truth does, share")
    tidy(axis, "gain in sampled sided F1 over Stage 1 continued, points", "both")
    finish(figure, path, "line: 95% interval; square: errs at random; dashed: fitted; grey: where the gain may be 0")


def dots(axis, found: dict[float, dict], colour: str, mark: str = "o", label: str = "", across: bool = False,
         ticks: bool = True) -> None:  # fmt: skip
    """Of estimates {place: estimate} the mean, the 95% interval and, with `ticks`, every seed's value, in percent."""
    turn = slice(None, None, -1 if across else 1)  # (places, values) as (x, y)
    for place, each in found.items():
        lo, hi, *seeds = (100 * value for value in (each["lo"], each["hi"], *each["seeds"].values()))
        axis.plot(*([place, place], [lo, hi])[turn], color=colour, linewidth=1.6)
        if ticks:
            at = [place - 0.25 * across] * len(seeds)
            axis.plot(*(at, seeds)[turn], "|" if across else "_", color="#555555", markersize=6)
    means = [100 * each["mean"] for each in found.values()]
    axis.plot(*([*found], means)[turn], mark, color=colour, label=label, markersize=6, linewidth=1)


def tidy(axis, title: str, grid: str) -> None:
    axis.set_title(title)
    axis.grid(True, axis=grid)


def finish(figure, path: Path, what: str) -> None:
    figure.suptitle(what)
    figure.savefig(path, dpi=110)
    plt.close(figure)
