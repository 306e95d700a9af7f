"""Evidence over seeds on the phantom: every arm, several seeds, one table (results/phantom.md) and two figures.

    python -m evidence.sweep                        # seeds 0-4; `make seeds`, or SEEDS="0 1" make seeds
    python -m evidence.sweep --seeds 0 1 --out DIR

    data, base, labeller, experts           once, shared by all seeds
    seed s:  sft ──┬── stage1 ──┬── stage1_continued, valor, valor_literal, visual_only, projector_only,
                   │            └── oracle_expert, noisy_expert          all from the same Stage-1 checkpoint
                   └── plain_grpo                                        as many updates in all

What is finished is not done again: killed and started again, the sweep goes on, arm by arm (arms.toml) and inside an
arm from its checkpoint. Settings come from config.py; they were chosen on the validation split.
"""

import argparse
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from config import Config, parse
from evidence.figures import draw_arms, draw_curves
from evidence.sweep_tables import collect_results, markdown
from evidence.tables import write_json
from evidence.tasks import Task, run_tasks
from phantom.cache import asset_dir
from running.folder import write_text

ARMS: dict[str, dict] = tomllib.loads(Path(__file__).with_name("arms.toml").read_text(encoding="utf-8"))
EVALUATED = ["base", *ARMS]
ASSETS = {"data": 45, "base": 280, "labeller": 60, "expert": 330, "expert_noisy": 330}  # seconds that they take


@dataclass
class SweepConfig(Config):
    # seeds of SFT, sampling and data order; images, references and small models are shared [ours]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    out: str = "results"  # folder of phantom.md, phantom.json and the figures [ours]
    root: str = "runs/seeds"  # one run folder per seed in here [ours]


def make_tasks(cfg: SweepConfig, flags: list[str]) -> list[Task]:
    """All commands of the sweep, those that unlock the most first; each has a log in `<root>/log/`."""
    assets: dict[str, Task] = {}
    for name, seconds in ASSETS.items():
        words, log = ["--build", name, *flags], Path(cfg.root) / "log" / f"assets_{name}.txt"
        assets[name] = Task(f"assets: {name}", "phantom.assets", words, seconds, list(assets.values())[:1],
                            [asset_dir(cfg) / name], log)  # fmt: skip
    return [*assets.values(), *(task for seed in cfg.seeds for task in tasks_of_seed(cfg, flags, seed, assets))]


def tasks_of_seed(cfg: SweepConfig, flags: list[str], seed: int, assets: dict[str, Task]) -> list[Task]:
    """A seed's arms, then their evaluation in two halves."""
    run, logs, both = Path(cfg.root) / str(seed), Path(cfg.root) / "log", cfg.stage1.steps + cfg.stage2.steps
    common = [*flags, "--run", str(run), "--seed", str(seed)]
    updates = {"sft": 0.3 * cfg.sft.steps, "stage1": cfg.stage1.steps, "plain_grpo": both}
    arms: dict[str, Task] = {}
    for name, arm in ARMS.items():
        # the last flag wins: the arm stays what it says
        words = [*common, "--name", name, *arm["flags"].format(both=both).split()]
        words += ["--val-every", "20"] if arm.get("watched") else []
        seconds = 5 + 1.6 * updates.get(name, cfg.stage2.steps)
        if arm.get("after", "sft") not in {"sft", *arms}:
            raise ValueError(f"arms.toml: [{name}] must stand below [{arm['after']}], after which it runs")
        after = [arms[arm["after"]], *assets.values()] if "after" in arm else [assets["base"]]
        arms[name] = Task(f"seed {seed}: {name}", "train.py", words, seconds, after,
                          [run / name / "adapter"], logs / f"{seed}_{name}.txt")  # fmt: skip
    halves = []
    for half in (EVALUATED[:6], EVALUATED[6:]):
        made = {name: run / "eval" / cfg.data.test_split / name / "results.json" for name in half}
        missing = [name for name in half if not made[name].exists()]
        words = ["--policy", ",".join(missing), "--eval.samples", "2", *common]
        after, log = [arms[n] for n in half if n in arms], logs / f"{seed}_evaluation_{half[0]}.txt"
        halves.append(Task(f"seed {seed}: evaluation", "evaluate.py", words, 25 * len(missing), after,
                           list(made.values()), log))  # fmt: skip
    return [*arms.values(), *halves]


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what is ours; all else goes to every command
    for flag, count in (("--seeds", "*"), ("--out", None), ("--root", None)):
        own.add_argument(flag, nargs=count)
    cfg, passed, began = parse(SweepConfig, __doc__), own.parse_known_args()[1], time.time()
    try:
        run_tasks(make_tasks(cfg, passed))
        about = {name: arm["what"] for name, arm in ARMS.items()}
        results = collect_results(Path(cfg.root), list(cfg.seeds), cfg.data.test_split, about, asset_dir(cfg))
    except ValueError as error:
        sys.exit(f"sweep: {error}")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "phantom.json", results)
    write_text(out / "phantom.md", markdown(results))
    draw_curves([Path(cfg.root) / str(seed) for seed in cfg.seeds], out / "curves.png")
    draw_arms(results, out / "arms.png")
    print(f"this call took {(time.time() - began) / 60:.0f} min; tables and figures are in {out}/")


if __name__ == "__main__":
    main()
