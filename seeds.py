"""Evidence over seeds on the phantom: every arm, several seeds, one table (results/phantom.md) and two figures.

    python seeds.py                        # seeds 0-4; `make seeds`, or SEEDS="0 1" make seeds
    python seeds.py --seeds 0 1 --out DIR

    data, base, labeller, experts           once, shared by all seeds
    seed s:  sft ──┬── stage1 ──┬── stage1_continued, valor, valor_literal, visual_only, projector_only,
                   │            └── oracle_expert, noisy_expert          all from the same Stage-1 checkpoint
                   └── plain_grpo                                        as many updates in all

An arm is a `train.py` command (ARMS), so each can be repeated alone. Two arms run at a time, in processes of one
thread each. What is finished is not done again: killed and started again, the sweep goes on, arm by arm and inside an
arm from its checkpoint. Settings come from config.py; they were chosen on the validation split.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from assets import NAMES, asset_dir
from compare import COMPARED, estimate, load_runs
from config import Config, parse
from figures import draw_arms, draw_curves
from runs import write_text

BRANCH = ["--stage", "2"]
# name: (stage's predecessor, flags of train.py, what it is). Fair means: same data, same seeds, as many updates.
ARMS: dict[str, tuple[str, list[str], str]] = {
    "sft": ("", ["--stage", "0"], "SFT on references that hallucinate"),
    "stage1": ("sft", ["--stage", "1"], "SFT + Stage 1 (text rewards)"),
    "plain_grpo": ("sft", ["--stage", "1", "--rewards.lambda-lex", "1", "--rewards.lambda-sem", "0",
                           "--rewards.k-clin", "0", "--grpo.advantage", "zscore"],
                   "SFT + plain GRPO: BLEU-4 + ROUGE-L, z-score; as many updates as both stages"),
    "stage1_continued": ("stage1", [*BRANCH, "--rewards.lambda-vis", "0"], "Stage 1 + Stage 2 with l_vis = 0"),
    "valor": ("stage1", BRANCH, "Stage 1 + Stage 2, soft Eq. 7"),
    "valor_literal": ("stage1", [*BRANCH, "--rewards.rank", "literal"], "the same with Eq. 7 as printed"),
    "visual_only": ("stage1", [*BRANCH, "--rewards.lambda-vis", "1"], "Stage 2 with l_vis = 1"),
    "projector_only": ("stage1", [*BRANCH, "--stage2.trainable", "projector"], "Stage 2 training the projector alone"),
    "oracle_expert": ("stage1", [*BRANCH, "--scorers.expert", "oracle"], "Stage 2 with exact labels as the expert"),
    "noisy_expert": ("stage1", [*BRANCH, "--scorers.expert", "phantom:expert_noisy"],
                     "Stage 2, expert trained on reports as noisy as the references"),
}  # fmt: skip
WATCHED = ("sft", "stage1", "stage1_continued", "valor")  # the curves' arms: validated while they train
SHOWN = ["base", *ARMS]
WORKERS = 2


@dataclass
class SeedsConfig(Config):
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of SFT, sampling and data order; images, references and small models are shared [ours]"""
    out: str = "results"
    """folder of phantom.md, phantom.json and the figures [ours]"""
    root: str = "runs/seeds"
    """one run folder per seed in here [ours]"""


@dataclass
class Task:
    """One command; it may start when the files in `after` are there, and is finished when `done` is."""

    title: str
    words: list[str]
    done: Path
    after: list[Path]
    seconds: float  # expected, for the ETA only; scaled by the pace seen
    log: Path
    process: subprocess.Popen | None = field(default=None, repr=False)
    began: float = 0.0


def make_tasks(cfg: SeedsConfig, flags: list[str]) -> list[Task]:
    """All commands of the sweep, those that unlock the most first."""
    assets, root = asset_dir(cfg), Path(cfg.root)
    seconds = {"data": 45, "base": 280, "expert": 330, "expert_noisy": 330, "labeller": 60}
    tasks = []
    for name in ("data", "base", "labeller", "expert", "expert_noisy"):
        after = [assets / "data"] if name != "data" else []
        tasks.append(Task(f"assets: {name}", ["assets.py", "--build", name, *flags], assets / name, after,
                          seconds[name], root / "log" / f"assets_{name}.txt"))  # fmt: skip
    ready = [assets / name for name in NAMES]
    both = cfg.stage1.steps + cfg.stage2.steps
    for seed in cfg.seeds:
        run = root / str(seed)
        common = ["--run", str(run), "--seed", str(seed), *flags]
        for arm, (before, arm_flags, _) in ARMS.items():
            after = [assets / "base"] if arm == "sft" else [run / before / "adapter", *ready]
            words = ["train.py", "--name", arm, *arm_flags, *common]
            words += ["--val-every", "20"] if arm in WATCHED else []
            words += ["--stage1.steps", str(both)] if arm == "plain_grpo" else []
            steps = {"sft": 0.3 * cfg.sft.steps, "stage1": cfg.stage1.steps, "plain_grpo": both}.get(
                arm, cfg.stage2.steps
            )
            tasks.append(Task(f"seed {seed}: {arm}", words, run / arm / "adapter", after, 15 + 1.6 * steps,
                              root / "log" / f"{seed}_{arm}.txt"))  # fmt: skip
        evaluated = run / "eval" / cfg.data.test_split
        for half in (SHOWN[:6], SHOWN[6:]):
            missing = [arm for arm in half if not (evaluated / arm / "results.json").exists()]
            tasks.append(Task(f"seed {seed}: evaluation", ["evaluate.py", "--policy", ",".join(missing), *common],
                              evaluated / half[-1] / "results.json", [run / a / "adapter" for a in half if a in ARMS],
                              40 * len(missing), root / "log" / f"{seed}_evaluation_{half[0]}.txt"))  # fmt: skip
    return tasks


def run_tasks(tasks: list[Task]) -> None:
    """Run all tasks, WORKERS at a time, each as soon as what it needs is there; one line per finished task.

    ETA: the expected seconds of what is left over the workers, scaled by the pace of what this call has finished.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_MININTERVAL": "30"}
    waiting = [task for task in tasks if not task.done.exists()]
    print(f"{len(tasks)} commands, {len(tasks) - len(waiting)} of them done before", flush=True)
    running: list[Task] = []
    expected = spent = 0.0
    try:
        while waiting or running:
            for task in [t for t in running if t.process.poll() is not None]:
                running.remove(task)
                if task.process.returncode != 0 or not task.done.exists():
                    tail = task.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()[-8:]
                    sys.exit(f"seeds: {task.title} failed, see {task.log}:\n" + "\n".join(tail))
                took = time.time() - task.began
                expected, spent = expected + task.seconds, spent + took
                left = sum(t.seconds for t in waiting) + sum(t.seconds / 2 for t in running)
                eta = left / WORKERS * spent / expected
                place = f"[{len(tasks) - len(waiting) - len(running)}/{len(tasks)}]"
                print(f"{place} {task.title:<28} {took:5.0f} s   about {eta / 60:.0f} min to go", flush=True)
            for task in waiting[:]:
                if len(running) < WORKERS and all(path.exists() for path in task.after):
                    waiting.remove(task)
                    running.append(launch(task, environment))
            if waiting and not running:
                sys.exit(f"seeds: {waiting[0].title} waits for {waiting[0].after}, which nothing makes")
            time.sleep(0.3)
    finally:
        for task in running:
            task.process.terminate()
            task.process.wait()


def launch(task: Task, environment: dict[str, str]) -> Task:
    """Start a task's process, its output added to its log file."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    task.began = time.time()
    with task.log.open("a", encoding="utf-8") as log:
        task.process = subprocess.Popen([sys.executable, *task.words], stdout=log, stderr=log, env=environment)
    return task


# ---------------------------------------------------------------------------------------------------- the results


def collect_results(cfg: SeedsConfig) -> dict:
    """{"seeds", "settings", "arms": {arm: {metric: estimate}}, "versus": {reference: {arm: {metric: estimate}}}}."""
    runs, settings = {}, {}
    for arm in SHOWN:
        found, settings = load_runs(str(Path(cfg.root) / "*" / arm), cfg.data.test_split)
        runs[arm] = {seed: stats for seed, stats in found.items() if seed in cfg.seeds}
        missing = set(cfg.seeds) - runs[arm].keys()
        if missing:
            raise ValueError(f"{arm} has no result for seed {min(missing)}")
    template = {seed: {k.replace("template/", "greedy/"): v for k, v in s.items() if k.startswith("template/")}
                for seed, s in runs["sft"].items()}  # fmt: skip
    names = {f"{row}/{metric}": (metric, row) for metric, row, _, _ in COMPARED}

    def table(of, minus=None) -> dict:
        found = {key: estimate(of, metric, row, minus) for key, (metric, row) in names.items()}
        return {key: value for key, value in found.items() if value is not None}

    return {
        "seeds": list(cfg.seeds),
        "split": settings["split"],
        "studies": settings["n"],
        "torch": torch.__version__,
        "assets": {p.parent.name: json.loads(p.read_text()) for p in sorted(asset_dir(cfg).glob("*/quality.json"))},
        "about": {arm: what for arm, (_, _, what) in ARMS.items()},
        "arms": {"fixed_template": table(template)} | {arm: table(runs[arm]) for arm in SHOWN},
        "versus": {
            reference: {arm: table(runs[arm], runs[reference]) for arm in list(ARMS)[1:] if arm != reference}
            for reference in ("stage1_continued", "sft")
        },
    }


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
    parts.append("## Every seed: greedy hallucination %, sided F1, BLEU-4")
    for key in ("greedy/hallucination_rate", "greedy/sided_f1", "greedy/bleu_4"):
        lines = [f"| {factors[key][0]} | " + " | ".join(f"seed {s}" for s in results["seeds"]) + " |"]
        lines.append("|---|" + "---:|" * len(results["seeds"]))
        for arm in SHOWN:
            values = results["arms"][arm][key]["seeds"].values()
            lines.append(f"| {arm} | " + " | ".join(f"{factors[key][1] * value:.1f}" for value in values) + " |")
        parts.append("\n".join(lines))
    quality = [f"* {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if isinstance(v, float))
               for name, numbers in results["assets"].items()]  # fmt: skip
    parts += ["## The small models on held-out studies", "\n".join(quality)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    flags = sys.argv[1:]
    cfg = parse(SeedsConfig, __doc__)
    own = {"--seeds", "--out", "--root"}
    passed, mine = [], False
    for word in flags:  # what is ours stays here; everything else goes to every command
        mine = word.split("=")[0] in own or (mine and not word.startswith("--"))
        passed += [] if mine else [word]
    began = time.time()
    try:
        run_tasks(make_tasks(cfg, passed))
        results = collect_results(cfg)
    except ValueError as error:
        sys.exit(f"seeds.py: {error}")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "phantom.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "phantom.md", markdown(results))
    draw_curves([Path(cfg.root) / str(seed) for seed in cfg.seeds], out / "curves.png")
    draw_arms(results, out / "arms.png")
    print(f"this call took {(time.time() - began) / 60:.0f} min; tables and figures are in {out}/")


if __name__ == "__main__":
    main()
