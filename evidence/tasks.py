"""Commands run side by side, each as soon as what it needs is done; all stop when one fails.

The demo and the sweep over seeds are lists of these tasks. To import torch, transformers and the rest takes a process
ten seconds, and three more to end. Here a server does it once, and a task is a copy of it (multiprocessing's
forkserver) that runs a script's `main` with the flags of the command line.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path

from config import Config
from phantom.cache import place_of

CORES = 2  # processes side by side, one thread each: faster here than one process with two threads
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["train", "evaluate", "phantom.assets"]  # once, by the server


def run_script(script: str, flags: list[str], log: Path | None, line: int, environment: dict[str, str]) -> None:
    """What a task's process does: `python SCRIPT FLAGS`, its output added to the file `log` or, None, the terminal's,
    with its progress bar in that `line`."""
    from tqdm import tqdm

    os.environ.update(environment)
    if log:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
    in_file = log or not sys.stderr.isatty()  # where each state of a bar is a line
    tqdm.__init__ = partialmethod(tqdm.__init__, position=line, mininterval=15 if in_file else 0.5)
    sys.argv = [script, *flags]
    importlib.import_module(script.removesuffix(".py")).main()


@dataclass(eq=False)
class Task:
    """One command. Where it makes something and all of that is there, it is done and not run again."""

    title: str
    script: str  # train.py, evaluate.py, or a module with a `main`
    flags: list[str]
    seconds: float  # expected on two quiet cores; the time to go scales it by the pace seen
    after: list["Task"] = field(default_factory=list)  # must be done before
    makes: list[Path] = field(default_factory=list)
    log: Path | None = None  # file that its output is added to; None: the terminal, with a progress bar of its own
    cores: int = 1  # as many processes, as torchrun would start them
    check: Callable[[], None] | None = None  # called when it has ended well; may end the program
    processes: list[multiprocessing.Process] = field(default_factory=list)
    began: float = 0.0
    line: int = 0  # of the terminal, for the progress bar

    def made(self) -> bool:
        return bool(self.makes) and all(path.exists() for path in self.makes)

    def start(self) -> None:
        """Start its processes."""
        if self.log:
            self.log.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(self.cores)}
        self.began = time.time()
        for i in map(str, range(self.cores)):
            given = self.script, self.flags, self.log, self.line, group | {"RANK": i, "LOCAL_RANK": i}
            self.processes.append(FORKS.Process(target=run_script, args=given))
            self.processes[-1].start()

    def ended(self) -> bool:
        """Whether all its processes have, or one has failed."""
        codes = [process.exitcode for process in self.processes]
        return None not in codes or any(codes)

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()

    def finish(self) -> None:
        """End the program, with the last lines of the log, unless the command ended well and made what it should."""
        code = next((process.exitcode for process in self.processes if process.exitcode), 0)
        launcher = "python" if self.cores == 1 else f"torchrun --nproc-per-node {self.cores}"
        said = " ".join([launcher, self.script, *self.flags])
        self.stop()  # a process whose peer has failed
        if code or (self.makes and not self.made()):
            if self.log:
                lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
                said = "\n".join([f"see {self.log}", *lines[-8:]])
            sys.exit(f"{self.title} failed ({f'exit code {code}' if code else 'its results are not there'}): {said}")
        if self.check:
            self.check()


def own_models(cfg: Config) -> bool:
    """Whether the small models are the data set's own, not the phantom's."""
    return cfg.model.path.startswith("tiny:")


def asset_tasks(cfg: Config, names: Iterable[str], flags: list[str], logs: Path | None = None) -> dict[str, Task]:
    """{asset: what builds it} of `names`, the data set before those that are made of it; logs: folder of their logs."""
    p, a, t, tasks = cfg.phantom, cfg.assets, cfg.tiny, {}
    seconds = {
        "data": 10 + 0.0016 * (p.expert + p.base + p.sft + p.train + p.val + p.test), "data_clean": 5,
        "labeller": 10 + 0.18 * a.labeller_steps, "base": 0.08 * a.vision_steps + 0.2 * a.base_steps,
        "tiny:labeller": 30 + 0.5 * t.labeller_steps, "tiny:base": 30 + 0.06 * t.vision_steps + 0.4 * t.base_steps,
        "tiny:expert": 30 + 0.35 * t.folds * t.expert_steps,
    }  # fmt: skip
    for name in dict.fromkeys(names):
        words = ["--build", name, *flags, "--assets-seed", str(cfg.assets_seed)]
        after = [tasks["data"]] if "data" in tasks and name != "labeller" else []
        log = logs and logs / f"assets_{name.replace(':', '_')}_{cfg.assets_seed}.txt"
        tasks[name] = Task(f"assets: {name}", "phantom.assets", words, seconds.get(name, 0.5 * a.expert_steps), after,
                           [place_of(cfg, name)], log)  # fmt: skip
    return tasks


def run_tasks(tasks: list[Task]) -> None:
    """Run all tasks on CORES, in their order where several could start; a line for each that is done.

    The time to go: expected seconds of what is left, over the cores, scaled by the pace of what this call has done.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    FORKS.set_forkserver_preload(IMPORTED)
    waiting, running = [task for task in tasks if not task.made()], []
    print(f"{len(tasks)} commands, {len(tasks) - len(waiting)} of them done before", flush=True)
    expected = spent = 0.0
    try:
        while waiting or running:
            for task in [t for t in running if t.ended()]:
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
            task.stop()
