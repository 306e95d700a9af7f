"""What an evaluation is asked about: the settings that a run was trained with, its policies, files of reports."""

import argparse
import re
import sys
from collections.abc import Collection
from pathlib import Path

from config import Config, DataConfig, from_recorded, parse
from data import target_text
from evidence.judge import Wanted
from formats.files import exact_labels, read_jsonl
from phantom.text import NORMAL_TEMPLATE
from rewards import strip_tags
from running import parallel
from running.weights import require, tensor_shapes

# what many a normal report of a real collection says; says nothing about the image
GENERIC_TEMPLATE = (
    "FINDINGS: The heart size and mediastinal contours are within normal limits. The lungs are clear. There is no "
    "focal airspace consolidation. No pleural effusion or pneumothorax. IMPRESSION: No acute cardiopulmonary disease."
)
NO_RUN = {"--config", "--predictions", "--compare", "--help", "-h"}  # with one of these, no run's settings matter


def begin(default: Config, description: str) -> Config:
    """The flags over --config's file, else over the settings that the stages of --run were trained with; the process
    has started as they say (parallel.start)."""
    argv = sys.argv[1:]
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--run", "--run-dir", default=default.run)
    run = Path(known.parse_known_args(argv)[0].run)
    stages = [run / "sft", run / "stage1", run / "stage2", *(path.parent for path in sorted(run.glob("*/adapter")))]
    recorded = [stage / "config.json" for stage in stages if (stage / "adapter").exists()]
    recorded = next(filter(Path.exists, recorded), None)
    if recorded and not NO_RUN & {word.split("=")[0] for word in argv}:
        default, ignored = from_recorded(recorded, default)
        default.run = str(run)  # not the path at which it was trained
        print(f"settings: {recorded}" + f"; not known today and ignored: {', '.join(ignored)}" * bool(ignored))
    cfg = parse(type(default), description, argv, default)
    parallel.start(cfg.device, cfg.threads)
    return cfg


def find_policies(run: Path, chosen: str, copies: Collection[str] = ()) -> dict[str, Path | None]:
    """{name: adapter folder, None for the base and `copies`} of the flag --policy; ValueError for one that does not
    exist.

    An adapter folder elsewhere is called by its own name, which must be no name of this run's.
    """
    own = {path.parent.name: path for path in sorted(run.glob("*/adapter"))}
    if "base" in own or not (own or chosen):
        raise ValueError(f"{own['base']}: this name is the base model's, rename the folder" if own else
                         f"{run} has no trained policy; for the base model alone give --policy base")  # fmt: skip
    own = {"base": None} | own | {name: None for name in copies if name not in own}
    words = [word.strip() for word in chosen.split(",") if word.strip()] if chosen else list(own)
    if not words:
        raise ValueError(f"--policy '{chosen}' names no policy; {run} has {', '.join(own)}")
    policies = {}
    for word in words:
        folder = own.get(word, Path(word))
        if word not in own and not (folder / "adapter_config.json").exists():
            raise ValueError(f"policy '{word}': neither in {run} (which has {', '.join(own)}) nor an adapter folder")
        name = word if word in own else folder.parent.name if folder.name == "adapter" else folder.resolve().name
        same = name not in own or folder == own[name] or bool(own[name]) and folder.samefile(own[name])
        if name in policies or not same:
            raise ValueError(f"--policy: two adapters are called '{name}'; evaluate the other with a --run of its own")
        policies[name] = folder
    for folder in filter(None, policies.values()):  # before the first of them writes its reports
        require(folder, "adapter_config.json")
        tensor_shapes(folder / "adapter_model.safetensors")
    return policies


def one_policy(run: Path, chosen: str) -> tuple[str, Path | None]:
    """The name and adapter of the flag --policy where it must name one."""
    [found, *more] = find_policies(run, chosen).items()
    if more:
        raise ValueError(f"--policy {chosen}: name one policy")
    return found


def read_reports(path: str) -> dict[str, dict]:
    """{id: row} of a .jsonl of {"id", "report"}; ValueError names a missing key, a repeated id or foreign labels."""
    rows = {}
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        where = f"{path}: row {number}"
        if row.get("id") in (None, "") or not isinstance(row.get("report", 0), str | None):
            raise ValueError(f"{where} needs an 'id' and a text 'report'; it has {', '.join(row)[:200] or 'nothing'}")
        name = str(row["id"])
        if name in rows:
            raise ValueError(f"{where}: id {name} occurs twice")
        report = row["report"] if (row["report"] or "").strip() else ""  # None, or blanks alone
        rows[name] = {"report": report, "labels": exact_labels(row.get("labels"), where)}
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_pairs(predictions: str, references: str) -> tuple[Wanted, list[str], list[str]]:
    """(what reports are held against, each one's predicted report, notes on rows that are less than whole).

    Studies without a reference are left out. ValueError where one file lacks an id of the other.
    """
    wanted, given = read_reports(references), read_reports(predictions)
    for have, lack, path in ((wanted, given, predictions), (given, wanted, references)):
        absent = [name for name in have if name not in lack]
        if absent:
            raise ValueError(f"{path}: no row for id {absent[0]}" + f" and {len(absent) - 1} more" * (len(absent) > 1))
    empty = [name for name, row in wanted.items() if not row["report"]]
    wanted = {name: row for name, row in wanted.items() if row["report"]}
    if not wanted:
        raise ValueError(f"{references}: every report is empty")
    blank, labels = [name for name in wanted if not given[name]["report"]], [row["labels"] for row in wanted.values()]
    of, unknown = "without labels", [name for name, row in wanted.items() if row["labels"] is None]
    if not any(labels):  # no finding anywhere is no phantom's truth
        of, unknown = "with empty labels alone", [*wanted] if [] in labels else []
    said = [(references, "empty references, left out", empty),
            (predictions, "empty reports, scored as they are", blank),
            (references, f"rows {of}, so no report is held against the exact truth", unknown)]  # fmt: skip
    notes = [f"{path}: {len(names)} {what} (first: id {names[0]})" for path, what, names in said if names]
    texts = [strip_tags(row["report"]) if "report>" in row["report"] else row["report"] for row in wanted.values()]
    exact = labels if any(labels) and not unknown else None
    return Wanted(references, list(wanted), texts, exact), [given[name]["report"] for name in wanted], notes


def normal_template(wanted: Wanted, data: DataConfig) -> str:
    """The normal report in the references' form: their sections, and headers only where they have them."""
    text, _ = target_text(NORMAL_TEMPLATE if wanted.labels and not data.labels else GENERIC_TEMPLATE, data.target)
    if data.target == "both" and not any("FINDINGS:" in reference for reference in wanted.references):
        text = re.sub(r"(FINDINGS|IMPRESSION): ", "", text)
    return text
