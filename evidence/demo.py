"""The whole method in one command: phantom, SFT, Stage 1, two branches of equal length, evaluation, table.

    assets ──▶ sft ──▶ stage1 ──┬──▶ stage1_continued   (lambda_vis = 0: text rewards only)
                                └──▶ stage2             (lambda_vis = 0.5: VALOR)

Both branches start from the same Stage-1 checkpoint, take equally many updates on the same studies and train the same
weights. Flags are passed on to every step; an interrupted demo goes on where it stopped when started again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from config import Config, parse

ROOT = Path(__file__).parents[1]
CORES = 2  # processes side by side, one thread each: faster here than one process with two threads


def command(script: str, flags: list[str], processes: int = 1) -> list[str]:
    """The command line of one step, through torchrun where it takes several processes."""
    if not script.endswith(".py"):
        return [sys.executable, "-m", script, *flags]
    script = str(ROOT / script)
    if processes == 1:
        return [sys.executable, script, *flags]
    flags = [re.sub(r"^--run(?==|$)", "--run-dir", word) for word in flags]  # torchrun would take --run for its own
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*torchrun, script, *flags]


def run_side_by_side(chains: list[list[list[str]]]) -> None:
    """Run chains of commands at the same time, a progress bar on a line of its own each; stop all when one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    if not sys.stderr.isatty():
        environment["TQDM_MININTERVAL"] = "15"  # in a log file a bar is a line each time
    waiting, running = {place: list(chain) for place, chain in enumerate(chains)}, {}
    try:
        while any(waiting.values()) or running:
            for place, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[place]
                if process.returncode != 0:
                    sys.exit(f"demo: this step failed (exit code {process.returncode}): {' '.join(process.args)}")
            for place, chain in waiting.items():
                if chain and place not in running:
                    running[place] = subprocess.Popen(chain.pop(0), env=environment | {"TQDM_POSITION": str(place)})
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def expected_seconds(cfg: Config) -> list[float]:
    """Seconds of each step on two quiet cores: start-up of its processes plus what an update or study took there."""
    p, a = cfg.phantom, cfg.assets
    studies = p.expert + p.base + p.sft + p.train + p.val + p.test
    base = 40 + 0.08 * a.vision_steps + 0.34 * a.base_steps + 0.4 * cfg.sft.steps + 0.12 * p.val
    return [
        13 + max(0.0016 * studies, 0.18 * a.labeller_steps),
        max(base, 15 + 0.66 * a.expert_steps),
        12 + 1.1 * cfg.stage1.steps,
        12 + 1.7 * cfg.stage2.steps,
        15 + 0.2 * p.test,
    ]


def steps(cfg: Config, flags: list[str]) -> list[tuple[str, list[list[list[str]]]]]:
    """(title, chains of commands to run side by side) of each step."""
    branch, gate = ["--stage", "2", *flags], ["--policy", "sft", "--split", cfg.data.val_split, "--eval.samples", "0"]
    return [
        ("phantom data set | labeller", [
            [command("phantom.assets", ["--build", "data", *flags])],
            [command("phantom.assets", ["--build", "labeller", *flags])],
        ]),
        ("base model, then Stage 0 (SFT) and its gate: does it see? | expert", [
            [
                command("phantom.assets", ["--build", "base", *flags]),
                command("train.py", ["--stage", "0", *flags]),
                command("evaluate.py", [*flags, *gate]),
            ],
            [command("phantom.assets", ["--build", "expert", *flags])],
        ]),
        ("Stage 1: text rewards", [[command("train.py", ["--stage", "1", *flags], CORES)]]),
        ("two branches: text rewards go on | visual reward mixed in", [
            [command("train.py", [*branch, "--rewards.lambda-vis", "0", "--name", "stage1_continued"])],
            [command("train.py", branch)],
        ]),
        ("evaluation on the test split", [
            [command("evaluate.py", ["--policy", "base,sft,stage1", *flags])],
            [command("evaluate.py", ["--policy", "stage1_continued,stage2", *flags])],
        ]),
    ]  # fmt: skip


def check_gate(cfg: Config) -> None:
    """Stop before RL when the SFT policy's sided F1 on the validation split is below the gate."""
    if not cfg.eval.gate:
        return
    path = Path(cfg.run) / "eval" / cfg.data.val_split / "sft" / "results.json"
    f1 = 100 * json.loads(path.read_text())["greedy"]["sided_f1"]["value"]
    print(f"the SFT policy's sided F1 on the validation split: {f1:.1f} (gate {cfg.eval.gate:g})")
    if f1 < cfg.eval.gate:
        sys.exit(
            f"demo: {f1:.1f} is below the gate of {cfg.eval.gate:g}: train the base or SFT longer, or set --eval.gate"
        )


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    flags = sys.argv[1:]
    cfg = parse(Config, __doc__)
    began, expected = time.time(), 0.0
    plan = list(zip(steps(cfg, flags), expected_seconds(cfg), strict=True))
    total = sum(seconds for _, seconds in plan)
    for number, ((title, chains), seconds) in enumerate(plan, 1):
        elapsed = time.time() - began
        # this machine's pace so far, once there is one, scales what is left
        pace = elapsed / expected if expected > 10 else 1.0
        left = (total - expected) * pace
        print(f"\n[{number}/{len(plan)}] {title}: {elapsed:.0f} s so far, about {left:.0f} s to go", flush=True)
        run_side_by_side(chains)
        expected += seconds
        if "gate" in title:
            check_gate(cfg)
    print(f"\nthe demo took {time.time() - began:.0f} s; what it left is in {cfg.run}/")


if __name__ == "__main__":
    main()
