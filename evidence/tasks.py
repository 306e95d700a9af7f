"""Commands run side by side, each as soon as what it needs is done; all stop when one fails.

The demo and the sweep over seeds are lists of these tasks.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORES = 2  # processes side by side, one thread each: faster here than one process with two threads


def command(script: str, flags: list[str], processes: int = 1) -> list[str]:
    """The command line of `train.py`, `evaluate.py` or a module, through torchrun where it takes several processes."""
    if not script.endswith(".py"):
        return [sys.executable, "-m", script, *flags]
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        flags = [re.sub(r"^--run(?==|$)", "--run-dir", word) for word in flags]  # torchrun takes --run for its own
    return [sys.executable, *launcher, str(ROOT / script), *flags]


@dataclass(eq=False)
class Task:
    """One command. Where it makes something and all of that is there, it is done and not run again."""

    title: str
    command: list[str]
    seconds: float  # expected on two quiet cores; the time to go scales it by the pace seen
    after: list["Task"] = field(default_factory=list)  # must be done before
    makes: list[Path] = field(default_factory=list)
    log: Path | None = None  # file that its output is added to; None: the terminal, with a progress bar of its own
    cores: int = 1
    check: Callable[[], None] | None = None  # called when it has ended well; may end the program
    process: subprocess.Popen | None = None
    began: float = 0.0
    line: int = 0  # of the terminal, for the progress bar

    def made(self) -> bool:
        return bool(self.makes) and all(path.exists() for path in self.makes)

    def start(self) -> None:
        """Start the process."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                    "TQDM_POSITION": str(self.line)}  # fmt: skip
        if self.log or not sys.stderr.isatty():
            environment["TQDM_MININTERVAL"] = "15"  # in a file each state of a bar is a line
        if self.log:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        output = self.log.open("a", encoding="utf-8") if self.log else None
        self.began = time.time()
        self.process = subprocess.Popen(self.command, stdout=output, stderr=output, env=environment)
        if output:
            output.close()

    def finish(self) -> None:
        """End the program, with the last lines of the log, unless the command ended well and made what it should."""
        code, said = self.process.returncode, " ".join(self.command)
        if code or (self.makes and not self.made()):
            if self.log:
                lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
                said = "\n".join([f"see {self.log}", *lines[-8:]])
            sys.exit(f"{self.title} failed ({f'exit code {code}' if code else 'its results are not there'}): {said}")
        if self.check:
            self.check()


def run_tasks(tasks: list[Task]) -> None:
    """Run all tasks on CORES, in their order where several could start; a line for each that is done.

    The time to go: expected seconds of what is left, over the cores, scaled by the pace of what this call has done.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    waiting, running = [task for task in tasks if not task.made()], []
    print(f"{len(tasks)} commands, {len(tasks) - len(waiting)} of them done before", flush=True)
    expected = spent = 0.0
    try:
        while waiting or running:
            for task in [t for t in running if t.process.poll() is not None]:
                running.remove(task)
                task.finish()
                took = time.time() - task.began
                expected, spent = expected + task.seconds, spent + took
                left = sum(t.seconds * t.cores for t in waiting) + sum(t.seconds * t.cores / 2 for t in running)
                place = f"[{len(tasks) - len(waiting) - len(running)}/{len(tasks)}]"
                to_go = f"about {left / CORES * spent / expected / 60:.0f} min to go"
                print(f"{place:<9}{task.title:<28} {took:5.0f} s   {to_go}", flush=True)
            for task in waiting[:]:
                free = CORES - sum(t.cores for t in running)
                if task.cores <= free and not any(t in waiting or t in running for t in task.after):
                    waiting.remove(task)
                    task.line = min(set(range(CORES)) - {t.line for t in running})
                    task.start()
                    running.append(task)
            time.sleep(0.2)
    finally:
        for task in running:
            task.process.terminate()
            task.process.wait()
