"""Evidence over seeds on the phantom: every arm, several seeds, one table (results/phantom.md) and its figures.

    python -m evidence.sweep                        # seeds 5-10; SEEDS="5 6" ARMS="valor dpo" make seeds
    python -m evidence.sweep --seeds 5 6 --arms valor dpo --out DIR
    python -m evidence.sweep --recompute results/counts.npz    # the tables anew, from the published counts alone

    data, base, labeller, experts           once, shared by all seeds
    seed s:  sft ──┬── stage1 ──┬── stage1_continued, valor, noisy_expert, clean_text, ...   from one checkpoint
                   ├── plain_grpo                                        as many updates in all
                   └── pairs ───── dpo, ...                              as many studies, candidates and updates

What is finished is not done again: killed and started again, the sweep goes on, arm by arm (arms.toml) and inside an
arm from its checkpoint. Settings come from config.py; they were chosen on the validation split.
"""

import argparse
import re
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from config import Config, parse
from evidence.baselines import BASELINES
from evidence.counts import read_counts, write_counts
from evidence.figures import draw_arms, draw_curves, draw_sweeps
from evidence.sweep_tables import collect_results, markdown
from evidence.tables import write_json
from evidence.tasks import Task, run_tasks
from phantom.cache import asset_dir
from running.folder import write_text

ARMS: dict[str, dict] = tomllib.loads(Path(__file__).with_name("arms.toml").read_text(encoding="utf-8"))
EVALUATED = ["base", *(name for name, arm in ARMS.items() if "script" not in arm)]
ASSETS = {"data": 45, "data_clean": 5, "base": 280, "labeller": 60}  # seconds that they take; an expert 330


@dataclass
class SweepConfig(Config):
    # seeds of SFT, sampling and data order; images, references and small models are shared [ours]
    seeds: tuple[int, ...] = (5, 6, 7, 8, 9, 10)
    arms: tuple[str, ...] = ()  # arms of arms.toml to run, with those that they start from; empty = all [ours]
    out: str = "results"  # folder of phantom.md, phantom.json, counts.npz and the figures [ours]
    recompute: str = ""  # make phantom.md, phantom.json and arms.png of this counts.npz; nothing is run [ours]
    root: str = "runs/seeds"  # one run folder per seed in here [ours]


def chosen_arms(cfg: SweepConfig) -> dict[str, dict]:
    """The arms to run and those before them, in the file's order; ValueError for a name or an order that cannot be."""
    wanted = {"sft", *(cfg.arms or ARMS)}
    if unknown := wanted - ARMS.keys():
        raise ValueError(f"--arms {min(unknown)}: arms.toml has {', '.join(ARMS)}")
    for place, (name, arm) in reversed([*enumerate(ARMS.items())]):
        if arm.get("after", name) not in [name, *list(ARMS)[:place]]:
            raise ValueError(f"arms.toml: [{name}] must stand below [{arm['after']}], after which it runs")
        wanted |= {arm["after"]} if name in wanted and "after" in arm else set()
    return {name: arm for name, arm in ARMS.items() if name in wanted}


def needed_assets(name: str, arm: dict) -> list[str]:
    """The assets that an arm reads: all but SFT are judged, Stage 2 by an expert too."""
    named = re.findall(r"phantom:(\w+)", arm["flags"])
    expert = ["expert"] if "--stage 2" in arm["flags"] and not any(n.startswith("expert") for n in named) else []
    return ["base", *named, *expert, *["labeller"] * (name != "sft")]


def make_tasks(cfg: SweepConfig, flags: list[str]) -> list[Task]:
    """All commands of the sweep, those that unlock the most first; each has a log in `<root>/log/`."""
    arms, assets = chosen_arms(cfg), {}
    needed = ["data", "base", "labeller", "expert", *(asset for item in arms.items() for asset in needed_assets(*item))]
    for name in dict.fromkeys(needed):
        words, log = ["--build", name, *flags], Path(cfg.root) / "log" / f"assets_{name}.txt"
        assets[name] = Task(f"assets: {name}", "phantom.assets", words, ASSETS.get(name, 330),
                            list(assets.values())[:1], [asset_dir(cfg) / name], log)  # fmt: skip
    seeds = [tasks_of_seed(cfg, flags, nth, arms, assets) for nth in range(len(cfg.seeds))]
    return [*assets.values(), *(task for tasks in seeds for task in tasks)]


def tasks_of_seed(cfg: SweepConfig, flags: list[str], nth: int, arms: dict[str, dict], assets: dict) -> list[Task]:
    """The arms of the nth seed, each with its evaluation, and the baselines."""
    seed, both = cfg.seeds[nth], cfg.stage1.steps + cfg.stage2.steps
    run, logs, tasks, judged, spilt = Path(cfg.root) / str(seed), Path(cfg.root) / "log", {}, {}, []
    results = run / "eval" / cfg.data.test_split
    common = [*flags, "--run", str(run), "--seed", str(seed)]
    for name, arm in {"base": {}, **arms}.items():
        if nth >= arm.get("seeds", nth + 1):
            continue
        if arm:  # the last flag wins: the arm stays what it says
            known = {"both": both, "run": run, "studies": both * cfg.grpo.batch_size}
            words = [*common, *["--name", name] * ("script" not in arm), *arm["flags"].format(**known).split()]
            words += ["--val-every", "20"] if arm.get("watched") else []
            after = [assets[asset] for asset in needed_assets(name, arm)] + [tasks[a] for a in [arm.get("after")] if a]
            makes = run / arm.get("makes", f"{name}/adapter")
            tasks[name] = Task(f"seed {seed}: {name}", arm.get("script", "train.py"), words, arm.get("seconds", 160),
                               after, [makes], logs / f"{seed}_{name}.txt")  # fmt: skip
        if "script" not in arm:
            words, base = ["--policy", name, *common, "--eval.samples", "8"], [assets["base"], assets["labeller"]]
            after = [tasks[name]] if arm else base
            judged[name] = Task(f"seed {seed}: {name} judged", "evaluate.py", words, 60, after,
                                [results / name / "results.json"], logs / f"{seed}_evaluation_{name}.txt")  # fmt: skip
            words = ["--policy", name, *common, "--eval.samples", "4"]
            spilt.append(Task(f"seed {seed}: {name} spill", "evidence.spill", words, 40, after,
                              [run / "eval" / "spill" / name / "results.json"],
                              logs / f"{seed}_spill_{name}.txt"))  # fmt: skip
    rest = Task(f"seed {seed}: baselines", "evidence.baselines", [*common, "--eval.samples", "8"], 100,
                [judged["base"], judged["sft"], assets["expert"]],
                [results / name / "results.json" for name in BASELINES], logs / f"{seed}_baselines.txt")  # fmt: skip
    return [*tasks.values(), *judged.values(), *spilt, rest]


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what is ours; all else goes to every command
    for flag, count in (("--seeds", "*"), ("--arms", "*"), ("--out", None), ("--root", None), ("--recompute", None)):
        own.add_argument(flag, nargs=count)
    cfg, passed, began = parse(SweepConfig, __doc__), own.parse_known_args()[1], time.time()
    out, root = Path(cfg.out), Path(cfg.root)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if not cfg.recompute:
            run_tasks(make_tasks(cfg, passed))
            about = {name: arm["what"] for name, arm in chosen_arms(cfg).items() if "script" not in arm} | BASELINES
            write_counts(out / "counts.npz", root, list(cfg.seeds), cfg.data.test_split, about, asset_dir(cfg))
        results = collect_results(*read_counts(Path(cfg.recompute or out / "counts.npz")))
    except ValueError as error:
        sys.exit(f"sweep: {error}")
    write_json(out / "phantom.json", results)
    write_text(out / "phantom.md", markdown(results))
    if not cfg.recompute:
        draw_curves([root / str(seed) for seed in cfg.seeds], out / "curves.png")
    draw_arms(results, out / "arms.png")
    draw_sweeps(results, out / "sweeps.png")
    print(f"this call took {(time.time() - began) / 60:.0f} min; tables and figures are in {out}/")


if __name__ == "__main__":
    main()
