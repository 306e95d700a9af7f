"""The whole method in one command: small models, SFT, Stage 1, two branches of equal length, evaluation, table, page.

    assets ──▶ sft ──▶ stage1 ──┬──▶ stage1_continued   (lambda_vis = 0: text rewards only)
                                └──▶ stage2             (lambda_vis = 0.5: VALOR)

The assets are the phantom and its models or, where the config names `tiny:` ones, models of a data set of your own
(`make iu-xray`). Both branches start from the same Stage-1 checkpoint, take equally many updates on the same studies
and train the same weights. Flags are passed on to every step; an interrupted demo goes on where it stopped when started
again.
"""

import sys
import time
from functools import partial
from pathlib import Path

from config import Config, parse
from evidence.page import write_page
from evidence.tasks import CORES, Task, asset_tasks, own_models, run_tasks
from formats.files import read_json


def make_tasks(cfg: Config, flags: list[str]) -> list[Task]:
    """The demo's commands. Their seconds: what an update or a study took on two quiet cores."""
    branch, look = ["--stage", "2", *flags], ["--policy", "sft", "--split", cfg.data.val_split, "--eval.samples", "0"]
    text_only = [*branch, "--rewards.lambda-vis", "0", "--name", "stage1_continued"]
    own, names = own_models(cfg), ("labeller", "base", "expert")  # the longest of one's own first
    assets = asset_tasks(cfg, [f"tiny:{name}" for name in names] if own else ["data", *names], flags)
    *_, labeller, base, expert = assets.values()
    n_val, n_test = (300, 600) if own else (cfg.phantom.val, cfg.phantom.test)  # of one's own, about
    sft = Task("Stage 0 (SFT)", "train.py", ["--stage", "0", *flags], 0.4 * cfg.sft.steps, [base])
    gate = Task("its gate: does it see?", "evaluate.py", [*flags, *look], 0.06 * n_val, [sft, labeller],
                cores=CORES, check=partial(check_gate, cfg))  # fmt: skip
    stage1 = Task("Stage 1: text rewards", "train.py", ["--stage", "1", *flags], 1.1 * cfg.stage1.steps,
                  [gate, expert], cores=CORES)  # fmt: skip
    branches = [Task("text rewards go on", "train.py", text_only, 1.6 * cfg.stage2.steps, [stage1]),
                Task("visual reward mixed in", "train.py", branch, 1.6 * cfg.stage2.steps, [stage1])]  # fmt: skip
    tables = [Task(f"evaluation: {names}", "evaluate.py", ["--policy", names, "--eval.samples", "2", *flags],
                   0.13 * n_test, branches)
              for names in ("base,sft,stage1", "nearest,retrieved," * own + "stage1_continued,stage2")]  # fmt: skip
    return [*assets.values(), sft, gate, stage1, *branches, *tables]


def check_gate(cfg: Config) -> None:
    """Stop before RL when the SFT policy's sided F1 on the validation split is below the gate."""
    if not cfg.eval.gate:
        return
    path = Path(cfg.run, "eval", cfg.data.val_split, "sft", "results.json")
    f1 = read_json(path)["greedy"].get("sided_f1", {}).get("value")
    if f1 is None:
        sys.exit(f"demo: {path} has no sided F1, so the gate cannot be checked: set --eval.gate 0")
    said = f"the SFT policy's sided F1 on the validation split: {100 * f1:.1f} (gate {cfg.eval.gate:g})"
    print(said)
    if 100 * f1 < cfg.eval.gate:
        sys.exit(f"demo: {said}: too low, train the base or SFT longer, or set --eval.gate")


def main() -> None:
    cfg, began = parse(Config, __doc__), time.time()
    run_tasks(make_tasks(cfg, sys.argv[1:]))
    print(f"\nlook at it in a browser: {write_page(Path(cfg.run))}")
    print(f"the demo took {time.time() - began:.0f} s; what it left is in {cfg.run}/")


if __name__ == "__main__":
    main()
