"""The tables of a sweep over seeds: the plan's comparisons, every arm, its paired differences, every seed."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from evidence.statistics import PLAN, Runs, estimate, spread, trend, verdicts
from evidence.tables import columns

BASELINES = ("stage1_continued", "sft")  # what the arms are compared with, pair by pair
# what is swept: {its value: arm}; both stages at each k_clin
SWEEPS = {"lambda_vis": {0: "stage1_continued", 0.05: "vis_05", 0.1: "vis_10", 0.25: "vis_25", 0.5: "valor",
                         1: "visual_only"},
          "k_clin": {1: "valor_dense", 4: "valor", 16: "valor_rare"}}  # fmt: skip


def collect_results(runs: dict[str, Runs], settings: dict, plan: dict = PLAN) -> dict:
    """{"plan": verdicts, "trends": [trend], "arms": {arm: {"<row>/<metric>": estimate}}, "versus": {baseline: {arm: the
    same}}, "sweeps": {name: {value: the same, of the seeds that all its arms have}}, ...} of what read_counts gave."""

    def measured(of, minus=None) -> dict:
        found = {column.key: estimate(of, column.key, minus) for column in columns("pairs")}
        return {key: value for key, value in found.items() if value is not None}

    about, kinds = settings["about"], settings["kinds"]
    versus = {base: {arm: measured(runs[arm], runs[base]) for arm in ["base", *about] if arm not in ("sft", base)}
              for base in BASELINES if base in runs}  # fmt: skip
    grids = {name: {at: runs[arm] for at, arm in grid.items() if arm in runs} for name, grid in SWEEPS.items()}
    both = {name: set.intersection(*map(set, grid.values())) for name, grid in grids.items() if grid}  # seeds
    swept = {name: {at: measured({seed: of[seed] for seed in both[name]}) for at, of in grids[name].items()}
             for name in both if both[name]}  # fmt: skip
    return {name: settings[name] for name in ("split", "studies", "torch", "protocol", "assets", "about")} | {
        "seeds": sorted({seed for of in settings["seeds"].values() for seed in of}),
        "plan": verdicts(runs, plan),
        "trends": [found for row in plan.get("trend", []) if (found := trend(runs, row, settings["accuracy"]))],
        "accuracy": settings["accuracy"],
        "arms": {arm: measured(runs[arm]) for arm in ["fixed_template", "base", *about]},
        "versus": versus,
        "sweeps": swept,
        "bleu_by_reference": {kind: by_reference(runs, kinds[kind]) for kind in kinds if any(kinds[kind])},
    }


def by_reference(runs: dict[str, Runs], wanted: list[bool]) -> dict:
    """{"n": studies, "arms": {arm: estimate of BLEU-4}, "versus": {arm: difference to BASELINES[0]}} on some studies.

    Leaving out what a reference made up costs BLEU: this shows how much of a difference in BLEU is that.
    """
    part = {arm: {seed: {"greedy/bleu": stats["greedy/bleu"][wanted]} for seed, stats in found.items()}
            for arm, found in runs.items()}  # fmt: skip
    compared = {"arms": None, "versus": part.get(BASELINES[0], {})}
    return {"n": sum(wanted)} | {name: {arm: estimate(part[arm], "greedy/bleu_4", minus) for arm in part}
                                 for name, minus in compared.items()}  # fmt: skip


def markdown(results: dict, weights: dict) -> str:
    """results/phantom.md, as sweep.md.jinja lays it out, of what `collect_results` gave, starred by `weights`."""
    page = Path(__file__).with_name("sweep.md.jinja").read_text(encoding="utf-8")
    render = Environment(trim_blocks=True, undefined=StrictUndefined).from_string(page).render
    titles = {column.key: column for column in columns("pairs")}
    return render(results, columns=columns, spread=spread, number="{:.1f}".format, titles=titles, weights=weights)
