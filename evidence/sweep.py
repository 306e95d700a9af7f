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

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from config import Config, parse
from evidence.figures import draw_arms, draw_curves
from evidence.sweep_tables import collect_results, markdown
from evidence.tables import write_json
from phantom.assets import NAMES, asset_dir
from running.folder import write_text

ROOT = Path(__file__).parents[1]
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
        tasks.append(Task(f"assets: {name}", ["-m", "phantom.assets", "--build", name, *flags], assets / name, after,
                          seconds[name], root / "log" / f"assets_{name}.txt"))  # fmt: skip
    ready = [assets / name for name in NAMES]
    both = cfg.stage1.steps + cfg.stage2.steps
    for seed in cfg.seeds:
        run = root / str(seed)
        common = [*flags, "--run", str(run), "--seed", str(seed)]
        for arm, (before, arm_flags, _) in ARMS.items():
            after = [assets / "base"] if arm == "sft" else [run / before / "adapter", *ready]
            words = ["train.py", *common, "--name", arm, *arm_flags]  # the last flag wins: the arm stays what it says
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
            words = ["evaluate.py", "--policy", ",".join(missing), "--eval.samples", "2", *common]
            tasks.append(Task(f"seed {seed}: evaluation", words, evaluated / half[-1] / "results.json",
                              [run / a / "adapter" for a in half if a in ARMS], 28 * len(missing),
                              root / "log" / f"{seed}_evaluation_{half[0]}.txt"))  # fmt: skip
    return tasks


def run_tasks(tasks: list[Task]) -> None:
    """Run all tasks, WORKERS at a time, each as soon as what it needs is there; one line per finished task.

    ETA: the expected seconds of what is left over the workers, scaled by the pace of what this call has finished.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_MININTERVAL": "30",
                                "PYTHONPATH": str(ROOT)}
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
        words = [sys.executable, *(str(ROOT / w) if w in ("train.py", "evaluate.py") else w for w in task.words)]
        task.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    return task


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
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
        about = {arm: what for arm, (_, _, what) in ARMS.items()}
        split, assets = cfg.data.test_split, asset_dir(cfg)
        results = collect_results(Path(cfg.root), list(cfg.seeds), split, about, assets)
    except ValueError as error:
        sys.exit(f"seeds.py: {error}")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "phantom.json", results)
    write_text(out / "phantom.md", markdown(results))
    draw_curves([Path(cfg.root) / str(seed) for seed in cfg.seeds], out / "curves.png")
    draw_arms(results, out / "arms.png")
    print(f"this call took {(time.time() - began) / 60:.0f} min; tables and figures are in {out}/")


if __name__ == "__main__":
    main()
