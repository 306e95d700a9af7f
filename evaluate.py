"""Evaluation: reports of every policy of a run against the references and, on the phantom, against the exact truth.

    python evaluate.py --run runs/phantom                              # base and every stage of the run
    python evaluate.py --run R --policy sft,path/to/adapter --split val
    python evaluate.py --predictions P.jsonl --references R.jsonl      # rows {"id", "report"}; no model needed
    python evaluate.py --compare R/stage1 R/stage2                     # paired differences; several seeds: compare.py
    python evaluate.py --image X.png --run R                           # one report (PNG, JPG or DICOM)
    torchrun --nproc-per-node 8 evaluate.py --run-dir R                # studies shared out over the GPUs

A policy writes greedy reports and `eval.samples` sampled ones. Always beside it stand two rows that need no eyes: the
fixed normal template, and the policy with its images shuffled among the studies (does it look?). What is scored is the
text between the <report> tags; where an output is not one tagged report, its text with the tags stripped (`format`
shows how often). How each number is made: metrics.py. What a report states is read by reader.py, which shares no code
with the rewards. In `<run>/eval/<split>/`: `<policy>/results.json`, `<policy>/reports.jsonl`, and `results.md` and
`results.json` over all policies evaluated there.

Without --config, the settings are those the run was trained with; flags win.
"""

import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

import rewards
from config import Config, check, merge, parse, to_dict
from data import load_studies, target_text
from evidence import metrics, reader
from evidence.compare import compare
from evidence.tables import finish, save
from formats.files import read_jsonl
from formats.images import read_image
from model import load_policy
from phantom import world as phantom
from phantom.assets import resolve
from evidence.generate import generate_split
from rollout import generate_reports
from running import parallel
from running.folder import write_text
from scorers.chexbert import CHEXPERT_LABELS
from scorers.green import load_green
from scorers.load import load_scorers
from scorers.ratescore import load_ratescore

# what many a normal report of a real collection says; says nothing about the image
GENERIC_TEMPLATE = (
    "FINDINGS: The heart size and mediastinal contours are within normal limits. The lungs are clear. There is no "
    "focal airspace consolidation. No pleural effusion or pneumothorax. IMPRESSION: No acute cardiopulmonary disease."
)


@dataclass
class EvalRun(Config):
    policy: str = ""
    """`base`, names of folders inside the run, or adapter folders, separated by commas; empty = base and all of the
    run (with --image: its last stage) [ours]"""
    split: str = ""
    """split to evaluate; empty = data.test_split [ours]"""
    predictions: str = ""
    """score this .jsonl of {"id", "report"} instead of a policy [ours]"""
    references: str = ""
    """the .jsonl of {"id", "report"} that --predictions are scored against; "labels" too, where known [ours]"""
    compare: tuple[str, ...] = ()
    """paired differences of evaluated policies to the first: stage folders, or quoted globs over seeds [ours]"""
    image: str = ""
    """write the report of this one image: PNG, JPG or DICOM [ours]"""


def settings(argv: list[str]) -> EvalRun:
    """The flags over --config's file, else over the config that the run's stages were trained with."""
    names = ("--run", "--run-dir")
    run = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word in names), "runs/phantom")
    run = next((word.partition("=")[2] for word in argv if word.startswith(tuple(f"{n}=" for n in names))), run)
    first = [Path(run) / name / "config.json" for name in ("sft", "stage1", "stage2")]
    others = [path.parent / "config.json" for path in sorted(Path(run).glob("*/adapter"))]
    stages = [path for path in (*first, *others) if path.exists() and (path.parent / "adapter").exists()]
    if not stages or any(word.split("=")[0] in ("--config", "--predictions", "--help", "-h") for word in argv):
        return parse(EvalRun, __doc__, argv)
    try:
        default = merge(EvalRun(), json.loads(stages[0].read_text(encoding="utf-8")))
    except ValueError as error:
        sys.exit(f"evaluate.py: {stages[0]}: {error}")
    default.run = run
    print(f"settings: {stages[0]}")
    cfg = tyro.cli(EvalRun, args=argv, default=default, description=__doc__)
    check(cfg)
    return cfg


# ---------------------------------------------------------------------------------------------- policies and texts


def find_policies(cfg: EvalRun) -> list[tuple[str, Path | None]]:
    """[(name, adapter folder or None for the base)] of cfg.policy; ValueError for one that does not exist."""
    run = Path(cfg.run)
    trained = {path.parent.name: path for path in sorted(run.glob("*/adapter"))}
    if not cfg.policy:
        if not trained:
            raise ValueError(f"{run} has no trained policy; for the base model alone give --policy base")
        return [("base", None), *trained.items()]
    chosen = []
    for name in filter(None, (word.strip() for word in cfg.policy.split(","))):
        folder = Path(name)
        if name == "base" or name in trained:
            chosen.append((name, trained.get(name)))
        elif (folder / "adapter_config.json").exists():
            chosen.append((folder.parent.name if folder.name == "adapter" else folder.name, folder))
        else:
            there = ", ".join(["base", *trained])
            raise ValueError(f"policy '{name}': neither in {run} (which has {there}) nor an adapter folder")
    names = [name for name, _ in chosen]
    for name, adapter in chosen:
        if names.count(name) > 1 or (name in trained and adapter.resolve() != trained[name].resolve()):
            raise ValueError(f"--policy: two adapters are called '{name}'; evaluate the other with a --run of its own")
    return chosen


def derangement(n: int, seed: int) -> list[int]:
    """A random cyclic order of 0..n-1: a permutation that leaves nothing in its place. ValueError below n = 2."""
    if n < 2:
        raise ValueError("one study cannot be shuffled: at least two are needed")
    order = np.random.default_rng(seed).permutation(n)
    places = np.empty(n, dtype=int)
    places[order] = np.roll(order, 1)
    return places.tolist()


def normal_template(references: list[str], labels, target: str) -> str:
    """The normal report in the references' form: their sections, and headers only where they have them."""
    text, _ = target_text(phantom.NORMAL_TEMPLATE if labels else GENERIC_TEMPLATE, target)
    if target == "both" and not any("FINDINGS:" in reference for reference in references):
        text = re.sub(r"(FINDINGS|IMPRESSION): ", "", text)
    return text


# -------------------------------------------------------------------------------------------------------- scoring


def make_judge(cfg: Config, references: list[str], labels: list[list[str]] | None, scorers) -> tuple:
    """(function from raw outputs [study][sample] to metrics.collect's dict, notes about what is not available)."""
    meteor_stats, why = metrics.start_meteor()
    known, notes = {}, []
    if scorers is not None:
        known = {"label": scorers.label, "bertscore": scorers.bertscore, "radgraph": scorers.radgraph}
    costly = {"meteor_stats": meteor_stats}
    if meteor_stats is None:
        notes.append(f"{why}. METEOR ex.+st. (exact and stem matches only) stands in and must not be compared with it")
        costly = {"meteor_exact_stem": metrics.meteor_exact_stem}
    if cfg.eval.green:
        costly["green"] = load_green(cfg.eval.green, parallel.pick_device(cfg.device))
    if cfg.eval.ratescore:
        costly["ratescore"] = load_ratescore(cfg.eval.ratescore)
    collect = partial(metrics.collect, references=references, truth_counts=reader.truth_counts, labels=labels, **known)

    def judge(outputs: list[list[str]], formats: bool = True, sampled: bool = False) -> dict:
        sections = cfg.rewards.required_sections
        scores = [rewards.format_reward(group, None, sections) for group in outputs] if formats else None
        texts = [[rewards.readable(output) for output in group] for group in outputs]
        return collect(texts, formats=scores, **({} if sampled else costly))

    return judge, notes


def score(judge, greedy: list[list[str]], sampled: list[list[str]] | None, seed: int, tagged: bool = True) -> dict:
    """{"greedy", "sampled", "shuffled"}: statistics per study. A greedy report depends on nothing but its image, so
    giving the reports to other studies is giving them other images."""
    rows = {"greedy": judge(greedy, tagged)}
    if sampled is not None:
        rows["sampled"] = judge(sampled, tagged, sampled=True)
    if len(greedy) > 1:
        rows["shuffled"] = judge([greedy[i] for i in derangement(len(greedy), seed)], tagged)
    return rows


def summaries(stats: dict[str, dict], cfg: Config) -> dict[str, dict]:
    """metrics.summarise of each row of statistics."""
    return {
        row: metrics.summarise(values, CHEXPERT_LABELS, cfg.eval.bootstrap, cfg.seed) for row, values in stats.items()
    }


def describe(cfg: Config, split: str, n: int) -> dict:
    """The settings that numbers must share to stand in one table."""
    names = ("path", "format", "target", "prompt", "views")
    plain = to_dict(cfg)
    return {
        "split": split,
        "n": n,
        "seed": cfg.seed,
        "eval": {name: plain["eval"][name] for name in ("samples", "bootstrap", "green") if plain["eval"][name] != ""},
        "rollout": plain["rollout"],
        "data": {name: plain["data"][name] for name in names},
        "model": {name: plain["model"][name] for name in ("path", "dtype", "max_pixels")},
        "required_sections": plain["rewards"]["required_sections"],  # of the format rate
        "scorers": {name: value for name, value in plain["scorers"].items() if name != "expert"},  # no metric uses it
    }


def report_rows(ids, references, labels, greedy, sampled) -> list[dict]:
    """Rows of reports.jsonl: what was written, what the image shows, what the reader understood as stated."""
    rows = []
    for i, study_id in enumerate(ids):
        text = rewards.readable(greedy[i][0])
        tagged = rewards.unwrap(greedy[i][0]) is not None
        row = {"id": study_id, "reference": references[i], "report": text, "tagged": tagged}
        if sampled is not None:
            row["samples"] = [rewards.readable(output) for output in sampled[i]]
        if labels is not None:
            stated = reader.read_report(text).stated
            row |= {"labels": labels[i], "stated": sorted(f"{name}_{side}" if side else name for name, side in stated)}
        rows.append(row)
    return rows


def evaluate_run(cfg: EvalRun) -> None:
    """Evaluate the chosen policies on a split, write their files, then the table of all policies of that folder."""
    split = cfg.split or cfg.data.test_split
    policies = find_policies(cfg)
    cfg = resolve(cfg, ("data", "base", "labeller"))
    studies = load_studies(cfg.data, split)
    ids, references = [s.id for s in studies], [s.report for s in studies]
    labels = None if studies[0].labels is None else [s.labels for s in studies]
    if parallel.rank() == 0:  # the one that scores and writes
        scorers = load_scorers(cfg, parallel.pick_device(cfg.device), with_expert=False)
        judge, notes = make_judge(cfg, references, labels, scorers)
        template = judge([[normal_template(references, labels, cfg.data.target)]] * len(studies), formats=False)
    folder = Path(cfg.run) / "eval" / split
    model = None
    for name, adapter in policies:
        del model  # before the next one is loaded
        model, processor = load_policy(cfg, adapter)
        greedy = generate_split(model, processor, studies, cfg, what=f"{name}: greedy")
        sampled = None
        if cfg.eval.samples:
            what = f"{name}: {cfg.eval.samples} samples"
            sampled = generate_split(model, processor, studies, cfg, cfg.eval.samples, what)
        if parallel.rank() > 0:
            continue
        result = {"policy": name, "adapter": str(adapter or ""), "settings": describe(cfg, split, len(studies))}
        stats = score(judge, greedy, sampled, cfg.seed) | {"template": template}
        result |= {"shuffled_as": "image shuffled", "notes": notes} | summaries(stats, cfg)
        save(folder / name, result, report_rows(ids, references, labels, greedy, sampled), stats)
    if parallel.rank() == 0:
        finish(folder, describe(cfg, split, len(studies)))
    parallel.barrier()


def evaluate_predictions(cfg: EvalRun) -> None:
    """Score a file of reports; the phantom's scorers and the truth join only where the references have labels."""
    if not cfg.references:
        raise ValueError("--predictions needs --references")
    wanted = read_rows(cfg.references)
    given = read_rows(cfg.predictions)
    for have, lack, path in ((wanted, given, cfg.predictions), (given, wanted, cfg.references)):
        absent = [study_id for study_id in have if study_id not in lack]
        if absent:
            raise ValueError(f"{path}: no row for id {absent[0]}" + f" and {len(absent) - 1} more" * (len(absent) > 1))
    references = [row["report"] for row in wanted.values()]
    labels = [row.get("labels") for row in wanted.values()]
    labels = None if None in labels else labels
    notes, scorers = [], None
    used = [path for name, path in to_dict(cfg)["scorers"].items() if name != "expert"]  # no metric looks at images
    if labels is None and any(str(path).startswith("phantom:") for path in used):
        notes.append("CheXbert F1, RadGraph F1 and BERTScore need --scorers.*: the phantom's know only its reports")
    else:
        cfg = resolve(cfg, ("labeller",))
        scorers = load_scorers(cfg, parallel.pick_device(cfg.device), with_expert=False)
    judge, more = make_judge(cfg, references, labels, scorers)
    outputs = [[given[study_id]["report"]] for study_id in wanted]
    empty = [study_id for study_id in wanted if not given[study_id]["report"].strip()]
    if empty:
        notes.append(f"{cfg.predictions}: {len(empty)} empty reports, scored as they are (first: id {empty[0]})")
    tagged = any(rewards.OPEN in group[0] for group in outputs)  # another system may know no tags at all
    template = judge([[normal_template(references, labels, cfg.data.target)]] * len(outputs), formats=False)
    path = Path(cfg.predictions)
    result = {"policy": path.stem, "adapter": "", "settings": describe(cfg, cfg.references, len(outputs))}
    stats = score(judge, outputs, None, cfg.seed, tagged) | {"template": template}
    result |= {"shuffled_as": "references shuffled", "notes": notes + more} | summaries(stats, cfg)
    folder = path.with_name(f"{path.stem}_eval")
    save(folder / path.stem, result, report_rows(list(wanted), references, labels, outputs, None), stats)
    finish(folder, result["settings"])


def read_rows(path: str) -> dict[str, dict]:
    """{id: row} of a .jsonl of {"id", "report"}; ValueError names a missing key or a repeated id."""
    rows = {}
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        if row.get("id") in (None, "") or not isinstance(row.get("report"), str):
            raise ValueError(f"{path}: row {number} needs an 'id' and a text 'report'")
        if str(row["id"]) in rows:
            raise ValueError(f"{path}: row {number}: id {row['id']} occurs twice")
        rows[str(row["id"])] = row
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def report_image(cfg: EvalRun) -> None:
    """Print the greedy report of one image and write it to `<run>/images/<name of the image>.txt`."""
    image = read_image(cfg.image)
    if not cfg.policy:
        there = [name for name in ("stage2", "stage1", "sft") if (Path(cfg.run) / name / "adapter").exists()]
        if not there:
            raise ValueError(f"{cfg.run} has no trained policy; name one with --policy (base: the model alone)")
        cfg.policy = there[0]
    [(name, adapter), *more] = find_policies(cfg)
    if more:
        raise ValueError("--image takes one policy")
    cfg = resolve(cfg, ("base",))
    model, processor = load_policy(cfg, adapter)
    stem = Path(cfg.image).stem
    text = rewards.readable(generate_reports(model, processor, [[image]], cfg, ids=[stem], samples=0)[0][0])
    path = Path(cfg.run) / "images" / f"{stem}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")
    print(f"{text}\n\n{name}, written to {path}. Not for clinical use.")


def main() -> None:
    cfg = settings(sys.argv[1:])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parallel.start(cfg.device)
    try:
        if parallel.world() > 1 and (cfg.compare or cfg.image or cfg.predictions):
            raise ValueError("several processes are for --run; start this without torchrun")
        if cfg.compare:
            print(compare(cfg.compare, cfg.split or cfg.data.test_split))
        elif cfg.image:
            report_image(cfg)
        elif cfg.predictions:
            evaluate_predictions(cfg)
        else:
            evaluate_run(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
