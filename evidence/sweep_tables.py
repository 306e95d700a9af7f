"""The tables of a sweep over seeds: every arm, its paired differences, every seed (seeds.py runs the sweep)."""

import json
from pathlib import Path

import torch

from evidence.compare import COMPARED, estimate, load_runs
from formats.files import read_jsonl

REFERENCES = ("stage1_continued", "sft")  # what the arms are compared with, pair by pair


def collect_results(root: Path, seeds: list[int], split: str, about: dict[str, str], assets: Path) -> dict:
    """{"arms": {arm: {metric: estimate}}, "versus": {reference: {arm: {metric: estimate}}}, ...} of evaluated runs.

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
    template = {seed: {k.replace("template/", "greedy/"): v for k, v in s.items() if k.startswith("template/")}
                for seed, s in runs["sft"].items()}  # fmt: skip
    names = {f"{row}/{metric}": (metric, row) for metric, row, _, _ in COMPARED}

    def table(of, minus=None) -> dict:
        found = {key: estimate(of, metric, row, minus) for key, (metric, row) in names.items()}
        return {key: value for key, value in found.items() if value is not None}

    return {
        "seeds": seeds,
        "split": settings["split"],
        "studies": settings["n"],
        "torch": torch.__version__,
        "assets": {p.parent.name: json.loads(p.read_text()) for p in sorted(assets.glob("*/quality.json"))},
        "about": about,
        "arms": {"fixed_template": table(template)} | {arm: table(runs[arm]) for arm in runs},
        "versus": {
            reference: {arm: table(runs[arm], runs[reference]) for arm in list(about)[1:] if arm != reference}
            for reference in REFERENCES
        },
        "bleu_by_reference": by_reference(assets, runs, settings["ids"]),
    }


def by_reference(assets: Path, runs: dict, ids: list[str]) -> dict:
    """BLEU-4 apart on studies whose reference is true to the image and on those whose reference hallucinates.

    Leaving out what a reference made up costs BLEU: this shows how much of a difference in BLEU is that.
    {kind: {"n": studies, "arms": {arm: estimate}, "versus": {arm: paired difference to stage1_continued}}}.
    """
    truth = {row["id"]: row for row in read_jsonl(assets / "data" / "truth.jsonl")}
    invents = [bool(set(truth[i]["stated"]) - set(truth[i]["labels"])) for i in ids]
    exact = [set(truth[i]["stated"]) == set(truth[i]["labels"]) for i in ids]
    tables = {}
    for kind, wanted in (("reference states exactly what the image shows", exact), ("reference hallucinates", invents)):
        if not any(wanted):
            continue
        part = {arm: {seed: {"greedy/bleu": stats["greedy/bleu"][wanted]} for seed, stats in found.items()}
                for arm, found in runs.items()}  # fmt: skip
        before = part["stage1_continued"]
        tables[kind] = {
            "n": sum(wanted),
            "arms": {arm: estimate(found, "bleu_4", "greedy") for arm, found in part.items()},
            "versus": {arm: estimate(found, "bleu_4", "greedy", before) for arm, found in part.items()},
        }
    return tables


def percent(found: dict | None, factor: float, sign: str = "") -> str:
    """`31.9 [28.7, 34.9]`, or n/a."""
    if found is None or found["mean"] != found["mean"]:
        return "n/a"
    mean, lo, hi = (factor * found[key] for key in ("mean", "lo", "hi"))
    return f"{mean:{sign}.1f} [{lo:{sign}.1f}, {hi:{sign}.1f}]"


def markdown(results: dict) -> str:
    """results/phantom.md: the arms, their paired differences, and every seed."""
    factors = {f"{row}/{metric}": (title, factor) for metric, row, title, factor in COMPARED}
    wide = ["greedy/bleu_4", "greedy/sided_f1", "greedy/hallucination_rate", "greedy/omission_rate",
            "greedy/f1_micro", "greedy/format_rate", "sampled/sided_f1", "sampled/hallucination_rate"]  # fmt: skip
    head = "| " + " | ".join(["", *(factors[key][0] for key in wide)]) + " |\n|" + "---|" * (len(wide) + 1)

    def block(arms: dict, sign: str = "") -> str:
        rows = [" | ".join([arm, *(percent(f.get(k), factors[k][1], sign) for k in wide)]) for arm, f in arms.items()]
        return "\n".join([head, *(f"| {row} |" for row in rows)])

    seeds = ", ".join(map(str, results["seeds"]))
    parts = [
        "# The arms over seeds, on the phantom",
        f"{results['studies']} {results['split']} studies, seeds {seeds}. Mean over the seeds [95% bootstrap interval "
        "over studies and seeds], in percent. Written by `seeds.py`; how to read it: RESULTS.md.",
        "\n".join(f"* **{arm}**: {what}" for arm, what in results["about"].items()),
        "## Each arm",
        block(results["arms"]),
    ]
    for reference, arms in results["versus"].items():
        parts += [f"## Paired difference to {reference}", block(arms, "+")]
    split = results["bleu_by_reference"]
    parts.append("## BLEU-4 by what the reference is (difference to stage1_continued in brackets)")
    titles = [f"{kind} ({found['n']} studies)" for kind, found in split.items()]
    lines = [f"| | {' | '.join(titles)} |", "|---|---:|---:|"]
    for arm in results["about"]:
        cells = [f"{100 * found['arms'][arm]['mean']:.1f} ({percent(found['versus'][arm], 100, '+')})"
                 for found in split.values()]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    parts.append("\n".join(lines))
    parts.append("## Every seed: greedy hallucination %, sided F1, BLEU-4")
    for key in ("greedy/hallucination_rate", "greedy/sided_f1", "greedy/bleu_4"):
        lines = [f"| {factors[key][0]} | " + " | ".join(f"seed {s}" for s in results["seeds"]) + " |"]
        lines.append("|---|" + "---:|" * len(results["seeds"]))
        for arm in ["base", *results["about"]]:
            values = results["arms"][arm][key]["seeds"].values()
            lines.append(f"| {arm} | " + " | ".join(f"{factors[key][1] * value:.1f}" for value in values) + " |")
        parts.append("\n".join(lines))
    quality = [f"* {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if isinstance(v, float))
               for name, numbers in results["assets"].items()]  # fmt: skip
    parts += ["## The small models on held-out studies", "\n".join(quality)]
    return "\n\n".join(parts) + "\n"
