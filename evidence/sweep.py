"""Evidence over seeds: every arm, several seeds, one table (on the phantom results/phantom.md) and its figures.

    python -m evidence.sweep                        # seeds 5-10; SEEDS="5 6" ARMS="valor dpo" make seeds
    python -m evidence.sweep --seeds 5 6 --arms valor dpo --out DIR
    python -m evidence.sweep --recompute results/counts.npz    # the tables anew, from the published counts alone
    python -m evidence.sweep --plan evidence/plan_iu_xray.toml --config configs/iu_xray_tiny.toml --own-models 3

    data, base, labeller, experts           once, shared by all seeds
    seed s:  sft ──┬── stage1 ──┬── stage1_continued, valor, noisy_expert, clean_text, ...   from one checkpoint
                   ├── plain_grpo                                        as many updates in all
                   └── pairs ───── dpo, ...                              as many studies, candidates and updates

What is finished is not done again: killed and started again, the sweep goes on, arm by arm (arms.toml) and inside an
arm from its checkpoint. Settings come from config.py; they were chosen on the validation split.
"""

import argparse
import re
import time
import tomllib
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from config import Config, Count, parse
from evidence.baselines import BASELINES
from evidence.expert_accuracy import accuracy_file
from evidence.figures import draw_arms, draw_crossed, draw_curves, draw_phase, draw_sweeps, draw_worlds
from evidence.statistics import read_plan
from evidence.sweep_tables import collect_results, markdown, read_counts, write_counts
from evidence.tables import write_json
from evidence.tasks import Task, asset_tasks, own_models, run_tasks
from formats.files import read_json
from phantom.cache import asset_dir
from running import parallel
from running.folder import write_text

ARMS: dict[str, dict] = tomllib.loads(Path(__file__).with_name("arms.toml").read_text(encoding="utf-8"))
WORLDS = {"phantom": "world 0", "worlds": "worlds 1 to 3", "omissions": "references that omit"}  # tables: their row
MEASURED = 3  # seeds, the first, on whose Stage-1 groups the experts' accuracy is measured


@dataclass
class SweepConfig(Config):
    # seeds of SFT, sampling and data order; images, references and small models are shared [ours]
    seeds: tuple[int, ...] = (5, 6, 7, 8, 9, 10)
    plan: str = ""  # another TOML than plan.toml; its [arms.NAME], where it has any, instead of arms.toml's [ours]
    own_models: Count = 0  # as many of the seeds, the first, have a world of their own, of that assets_seed [ours]
    arms: tuple[str, ...] = ()  # to run, with those that they start from; empty = all, or all that --plan names [ours]
    out: str = "results"  # folder of phantom.md, phantom.json, counts.npz and the figures [ours]
    recompute: str = ""  # make the tables and their figures of this counts.npz; nothing is run [ours]
    root: str = "runs/seeds"  # one run folder per seed in here [ours]


def chosen_arms(cfg: SweepConfig) -> dict[str, dict]:
    """The arms to run and those before them, in the file's order; ValueError for a name or an order that cannot be."""
    plan = read_plan(cfg.plan) if cfg.plan else {}
    file, known = (cfg.plan, plan["arms"]) if "arms" in plan else ("arms.toml", ARMS)
    named = known if "arms" in plan or not plan else {arm for row in plan["comparison"] for arm in row["arms"]}
    wanted = {"sft", *(cfg.arms or named)}
    if unknown := wanted - known.keys():
        raise ValueError(f"--arms {min(unknown)}: {file} has {', '.join(known)}")
    for place, (name, arm) in reversed([*enumerate(known.items())]):
        if arm.get("after", name) not in [name, *list(known)[:place]]:
            raise ValueError(f"{file}: [{name}] must stand below [{arm['after']}], after which it runs")
        wanted |= {arm["after"]} if name in wanted and "after" in arm else set()
    return {name: arm for name, arm in known.items() if name in wanted}


def needed_assets(name: str, arm: dict, own: bool) -> list[str]:
    """The assets that an arm reads: all but SFT are judged, Stage 2 by an expert too. own: own_models."""
    if own:
        return ["tiny:base", *["tiny:labeller", "tiny:expert"] * (name != "sft")]
    named = re.findall(r"phantom:(\w+)", arm["flags"])
    expert = "--stage 2" in arm["flags"] and "phantom:expert" not in arm["flags"]
    return ["base", *named, *["expert"] * expert, *["labeller"] * (name != "sft")]


def expert_of(arm: dict) -> str | None:
    """The expert that rewards an arm, as evidence.expert_accuracy names it; None where none or exact labels do."""
    flags = dict(pairwise(arm["flags"].split()))
    expert, noise = flags.get("--scorers.expert", "phantom:expert"), flags.get("--scorers.expert-noise")
    if flags.get("--stage") != "2" or flags.get("--rewards.lambda-vis") == "0" or expert == "oracle":
        return None
    return expert + f"+{noise}" * bool(noise)


def assets_seeds(cfg: SweepConfig) -> list[int]:
    """Of each seed's world and small models."""
    return [seed if nth < cfg.own_models else cfg.assets_seed for nth, seed in enumerate(cfg.seeds)]


def make_tasks(cfg: SweepConfig, flags: list[str]) -> list[Task]:
    """All commands of the sweep, those that unlock the most first; each has a log in `<root>/log/`."""
    arms, worlds, own = chosen_arms(cfg), assets_seeds(cfg), own_models(cfg)
    needed = [] if own else ["data", "base", "labeller", "expert"]
    needed += [asset for item in arms.items() for asset in needed_assets(*item, own)]
    assets = {world: asset_tasks(replace(cfg, assets_seed=world), needed, flags, Path(cfg.root, "log"))
              for world in dict.fromkeys(worlds)}  # fmt: skip
    seeds = [tasks_of_seed(cfg, flags, nth, arms, assets[world]) for nth, world in enumerate(worlds)]
    return [task for tasks in (*(part.values() for part in assets.values()), *seeds) for task in tasks]


def tasks_of_seed(cfg: SweepConfig, flags: list[str], nth: int, arms: dict[str, dict], assets: dict) -> list[Task]:
    """The arms of the nth seed, each with its evaluation, and on the phantom the baselines and the spill."""
    seed, both, own = cfg.seeds[nth], cfg.stage1.steps + cfg.stage2.steps, own_models(cfg)
    run, trained, judged, spilt, rest = Path(cfg.root, str(seed)), {}, {}, [], []
    common = [*flags, "--run", str(run), "--seed", str(seed), "--assets-seed", str(assets_seeds(cfg)[nth])]
    known = {"both": both, "run": run, "studies": both * cfg.grpo.batch_size, "data": cfg.data.path}

    def task(title: str, script: str, words: list[str], seconds: float, after: list[Task], log: str, *makes: str):
        makes, log = [run / path for path in makes], Path(cfg.root, "log", f"{seed}_{log}.txt")
        return Task(f"seed {seed}: {title}", script, words, seconds, after, makes, log)

    for name, arm in {"base": {"flags": ""}, **arms}.items():
        if nth >= arm.get("seeds", nth + 1):
            continue
        after = [assets[asset] for asset in needed_assets(name, arm, own)]
        if name != "base":  # the last flag wins: the arm stays what it says
            words = [*common, *["--name", name] * ("script" not in arm), *arm["flags"].format(**known).split()]
            after += [trained[arm["after"]]] if "after" in arm else []
            trained[name] = task(name, arm.get("script", "train.py"), words, 160, after, name,
                                 arm.get("makes", f"{name}/adapter"))  # fmt: skip
            after = [trained[name]]
        if "script" not in arm:  # on a data set of one's own the base brings the rows that need no policy, too
            words = ["--policy", "base,nearest,retrieved" if own and name == "base" else name, *common]
            judged[name] = task(f"{name} judged", "evaluate.py", [*words, "--eval.samples", "8"], 60, after,
                                f"evaluation_{name}", f"eval/{cfg.data.test_split}/{name}/results.json")  # fmt: skip
            spilt += [task(f"{name} spill", "evidence.spill", [*words, "--eval.samples", "4"], 40, after,
                           f"spill_{name}", f"eval/spill/{name}/results.json")]  # fmt: skip
    if own:
        return [*trained.values(), *judged.values()]
    experts = dict.fromkeys(filter(None, map(expert_of, arms.values())))
    if experts and "stage1" in trained and nth < MEASURED:
        built = [e.partition("+")[0].removeprefix("phantom:") for e in experts]  # others lie somewhere already
        after = [trained["stage1"], *(assets[name] for name in built if name in assets)]
        rest = [task("experts", "evidence.expert_accuracy", [*common, "--experts", *experts], 60, after, "experts",
                     *(accuracy_file(Path(), expert) for expert in experts))]  # fmt: skip
    rest += [task("baselines", "evidence.baselines", [*common, "--eval.samples", "8"], 100,
                  [judged["base"], judged["sft"], assets["expert"]], "baselines",
                  *(f"eval/{cfg.data.test_split}/{name}/results.json" for name in BASELINES))]  # fmt: skip
    return [*trained.values(), *judged.values(), *spilt, *rest]


@parallel.script("sweep")
def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # what is ours; all else goes to every command
    for name in SweepConfig.__annotations__:
        several = isinstance(getattr(SweepConfig, name), tuple)
        own.add_argument(f"--{name}", "--" + name.replace("_", "-"), nargs="*" if several else None)  # as tyro takes it
    cfg, passed, began = parse(SweepConfig, __doc__), own.parse_known_args()[1], time.time()
    out, root, name = Path(cfg.out), Path(cfg.root), Path(cfg.plan).stem.removeprefix("plan_")
    out.mkdir(parents=True, exist_ok=True)
    counts = Path(cfg.recompute or out / f"counts{name and '_' + name}.npz")
    if not cfg.recompute:
        run_tasks(make_tasks(cfg, passed))
        arms = chosen_arms(cfg)
        about = {arm: of["what"] for arm, of in arms.items() if "script" not in of}
        experts = {arm: expert for arm, of in arms.items() if (expert := expert_of(of))}
        about, world = (about, "tiny") if own_models(cfg) else (about | BASELINES, "phantom")
        worlds = [asset_dir(replace(cfg, assets_seed=seed), world) for seed in dict.fromkeys(assets_seeds(cfg))]
        write_counts(counts, root, list(cfg.seeds), cfg.data.test_split, about, worlds, experts)
    results = collect_results(*read_counts(counts), read_plan(cfg.plan))
    write_json(out / f"{name or 'phantom'}.json", results)
    write_text(out / f"{name or 'phantom'}.md", markdown(results | {"world": name or "phantom"}, vars(cfg.rewards)))
    if not cfg.plan:  # the figures name the phantom's arms
        if not cfg.recompute:
            draw_curves([root / str(seed) for seed in cfg.seeds], out / "curves.png")
        for draw in (draw_arms, draw_sweeps, draw_crossed, draw_phase):
            draw(results, out / f"{draw.__name__.removeprefix('draw_')}.png")
    if not own_models(cfg):
        worlds = {said: out / f"{stem}.json" for stem, said in WORLDS.items()}
        draw_worlds({said: read_json(file) for said, file in worlds.items() if file.exists()}, out / "worlds.png")
    print(f"this call took {(time.time() - began) / 60:.0f} min; tables and figures are in {out}/")


if __name__ == "__main__":
    main()
