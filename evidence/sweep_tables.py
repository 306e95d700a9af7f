"""From a sweep's evaluated runs to its tables: counts of every arm and seed, and all that is computed of them alone.

counts.npz holds "<arm>/<row>/<family>", (seeds, n studies, k) as metrics.collect counts them, in the smallest integers
that hold them; ROUGE-L, BERTScore and other fractions are float16. "settings" is JSON: seeds by arm, ids of the studies
and what the tables say beside numbers. The sweep makes its own tables from this file, so whoever recomputes them
(`python -m evidence.sweep --recompute results/counts.npz`) gets the same digits.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from evidence.compare import check_alike, load_runs
from evidence.expert_accuracy import accuracy_file
from evidence.metrics import METRICS
from evidence.protocols import NOTES
from evidence.statistics import PLAN, Runs, estimate, spread, trend, verdicts
from evidence.tables import columns
from formats.files import read_json, read_jsonl
from running.folder import write_bytes
from running.weights import check_zip

BASELINES = ("stage1_continued", "sft")  # what the arms are compared with, pair by pair
# what is swept: {its value: arm}; both stages at each k_clin
SWEEPS = {"lambda_vis": {0: "stage1_continued", 0.05: "vis_05", 0.1: "vis_10", 0.25: "vis_25", 0.5: "valor",
                         1: "visual_only"},
          "k_clin": {1: "valor_dense", 4: "valor", 16: "valor_rare"}}  # fmt: skip


def write_counts(
    path: Path, root: Path, seeds: list[int], split: str, about: dict[str, str], assets: list[Path],
    experts: dict[str, str],
) -> None:  # fmt: skip
    """Collect a sweep's evaluated runs, a folder per seed in `root`: the base and the arms `about` {arm: what it is}.

    assets: the folders of small models, one a world. experts {arm: its expert}: their accuracy is kept where it was
    measured. ValueError for an arm without a result for any of the seeds.
    """
    keys, arms, shared = [column.key.split("/") for column in columns("pairs")], {}, None
    for arm in ["base", *about]:
        found, settings = load_runs(str(root / "*" / arm), split)
        shared = shared or settings
        check_alike(arm, settings, "base", shared)
        arms[arm] = {seed: found[seed] for seed in seeds if seed in found}
        if not arms[arm]:
            raise ValueError(f"{arm} has no result for any of the seeds {', '.join(map(str, seeds))}")
    arms["fixed_template"] = {
        seed: {name.replace("template/", "greedy/"): stats[name] for name in stats if name.startswith("template/")}
        for seed, stats in arms["base"].items()
    }
    wanted = {f"{row}/{METRICS[metric][0]}" for row, metric in keys}
    arrays = {f"{arm}/{name}": _small(np.stack([stats[name] for stats in runs.values()])) for arm, runs in arms.items()
              for name in sorted(wanted) if all(name in stats for stats in runs.values())}  # fmt: skip
    settings = {
        "seeds": {arm: list(runs) for arm, runs in arms.items()}, "about": about, "ids": shared["ids"],
        "split": shared["split"], "studies": shared["n"], "torch": torch.__version__,
        "protocol": NOTES[shared["eval"].get("protocol", "raw")],
        "assets": {f"{world.name}/{p.parent.name}": json.loads(p.read_text())
                   for world in assets for p in sorted(world.glob("*/quality.json"))},
        "kinds": kinds_of(shared["ids"], assets[0] / "data" / "truth.jsonl") if len(assets) == 1 else {},
        "accuracy": {arm: {seed: read_json(file)["value"] for seed in seeds
                           if (file := accuracy_file(root / str(seed), expert)).exists()}
                     for arm, expert in experts.items()},
    }  # fmt: skip
    file = io.BytesIO()
    np.savez_compressed(file, settings=np.array(json.dumps(settings)), **arrays)
    write_bytes(path, file.getbuffer())


def kinds_of(ids: list[str], exact: Path) -> dict[str, list[bool]]:
    """{kind of reference: whether each study has it}, of the phantom: nobody knows which real references are true."""
    if not exact.exists():
        return {}
    truth = {row["id"]: row for row in read_jsonl(exact)}
    pairs = [(set(truth[i]["stated"]), set(truth[i]["labels"])) for i in ids]
    return {"reference states exactly what the image shows": [stated == true for stated, true in pairs],
            "reference hallucinates": [bool(stated - true) for stated, true in pairs]}  # fmt: skip


def read_counts(path: Path) -> tuple[dict[str, Runs], dict]:
    """({arm: {seed: {"<row>/<family>": (n, k)}}}, settings) of `write_counts`' file; ValueError for a damaged one."""
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        settings = json.loads(str(arrays.pop("settings")))
        runs = {arm: {seed: {} for seed in seeds} for arm, seeds in settings["seeds"].items()}
        for name, values in arrays.items():
            arm, _, key = name.partition("/")
            for seed, of in zip(settings["seeds"][arm], values.astype(float), strict=True):
                runs[arm][seed][key] = of
        settings["accuracy"] = {arm: {int(seed): value for seed, value in found.items()}
                                for arm, found in settings.get("accuracy", {}).items()}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no file of counts ({error}); make it again by python -m evidence.sweep") from None
    return runs, settings


def _small(values: np.ndarray) -> np.ndarray:
    """Counts as the smallest unsigned integers that hold them, anything else as float16."""
    whole = values.min() >= 0 and (values == np.rint(values)).all()
    return values.astype(np.min_scalar_type(int(values.max())) if whole else np.float16)


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
