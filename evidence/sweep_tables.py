"""The tables of a sweep over seeds: every arm, its paired differences, every seed."""

import json
from pathlib import Path

import torch
from jinja2 import Environment, StrictUndefined

from evidence.compare import load_runs
from evidence.protocols import NOTES
from evidence.statistics import estimate, spread
from evidence.tables import columns
from formats.files import read_jsonl

BASELINES = ("stage1_continued", "sft")  # what the arms are compared with, pair by pair


def collect_results(root: Path, seeds: list[int], split: str, about: dict[str, str], assets: Path) -> dict:
    """{"arms": {arm: {"<row>/<metric>": estimate}}, "versus": {baseline: {arm: the same}}, ...} of evaluated runs.

    root holds a run folder per seed, about = {arm: what it is}, assets is the folder of the phantom's models. Raises
    ValueError for an arm that has no result for one of the seeds.
    """
    runs, settings = {}, {}
    for arm in ["base", *about]:
        found, settings = load_runs(str(root / "*" / arm), split)
        runs[arm] = {seed: stats for seed, stats in found.items() if seed in seeds}
        missing = set(seeds) - runs[arm].keys()
        if missing:
            raise ValueError(f"{arm} has no result for seed {min(missing)}")
    template = {seed: {key.replace("template/", "greedy/"): value for key, value in stats.items() if "template/" in key}
                for seed, stats in runs["sft"].items()}  # fmt: skip

    def measured(of, minus=None) -> dict:
        found = {column.key: estimate(of, column.key, minus) for column in columns("pairs")}
        return {key: value for key, value in found.items() if value is not None}

    return {
        "seeds": seeds,
        "split": settings["split"],
        "studies": settings["n"],
        "torch": torch.__version__,
        "protocol": NOTES[settings["eval"].get("protocol", "raw")],
        "assets": {p.parent.name: json.loads(p.read_text()) for p in sorted(assets.glob("*/quality.json"))},
        "about": about,
        "arms": {"fixed_template": measured(template)} | {arm: measured(runs[arm]) for arm in runs},
        "versus": {baseline: {arm: measured(runs[arm], runs[baseline]) for arm in list(about)[1:] if arm != baseline}
                   for baseline in BASELINES},
        "bleu_by_reference": by_reference(assets, runs, settings["ids"]),
    }  # fmt: skip


def by_reference(assets: Path, runs: dict, ids: list[str]) -> dict:
    """BLEU-4 apart on studies whose reference is true to the image and on those whose reference hallucinates.

    Leaving out what a reference made up costs BLEU: this shows how much of a difference in BLEU is that.
    {kind: {"n": studies, "arms": {arm: estimate}, "versus": {arm: paired difference to stage1_continued}}}.
    """
    truth = {row["id"]: row for row in read_jsonl(assets / "data" / "truth.jsonl")}
    pairs = [(set(truth[i]["stated"]), set(truth[i]["labels"])) for i in ids]
    kinds = {"reference states exactly what the image shows": [stated == true for stated, true in pairs],
             "reference hallucinates": [bool(stated - true) for stated, true in pairs]}  # fmt: skip

    def table(wanted: list[bool]) -> dict:
        part = {arm: {seed: {"greedy/bleu": stats["greedy/bleu"][wanted]} for seed, stats in found.items()}
                for arm, found in runs.items()}  # fmt: skip
        compared = {"arms": None, "versus": part["stage1_continued"]}
        return {"n": sum(wanted)} | {name: {arm: estimate(part[arm], "greedy/bleu_4", minus) for arm in part}
                                     for name, minus in compared.items()}  # fmt: skip

    return {kind: table(wanted) for kind, wanted in kinds.items() if any(wanted)}


def markdown(results: dict) -> str:
    """results/phantom.md, as sweep.md.jinja lays it out, of what `collect_results` gave."""
    page = Path(__file__).with_name("sweep.md.jinja").read_text(encoding="utf-8")
    render = Environment(trim_blocks=True, undefined=StrictUndefined).from_string(page).render
    return render(results, columns=columns, spread=spread, number="{:.1f}".format)
