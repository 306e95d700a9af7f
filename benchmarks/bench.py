"""Ours against TRL, `generate` and plain forwards on the same work, in turn, in one run: `make bench`.

    python benchmarks/bench.py                     LLaVA-mini on the CPU (40 minutes on two cores)
    python benchmarks/bench.py --size 7b --cases sampling step loss compile       LLaVA-Med's geometry on a GPU
    python benchmarks/bench.py --cases step --repeats 3

Each side of a case is a process of its own (sides.py) that is told when to run, so both are measured under the same
load of the machine: one repeat here, one there. A ratio is of such neighbours; the table shows the median of the
ratios and their range, and each side's peak memory beside the loaded model. Beside each row stands the load; above 2,
on a GPU's host above half its cores, its numbers are not published. Written to benchmarks/results/.
"""

import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from llava_mini import shape_of
from sides import DEVICE, Case, clock

HERE = Path(__file__).parent
PAIRS = {  # case -> peer, ours, what it is
    "step": ("trl_step", "our_step", "GRPO step: TRL GRPOTrainer / ours"),
    "sampling": ("generate", "our_sampling", "group sampling: generate(num_return_sequences=G) / ours"),
    "loss": ("plain_loss", "our_loss", "loss pass, forward + backward: B x G plain forwards / ours"),
}
COMPILED = {  # with rollout.compile; on a CPU it does not pay, and takes minutes to compile
    "sampling": ("generate", "our_compiled_sampling", "the same with rollout.compile"),
    "step": ("trl_step", "our_compiled_step", "GRPO step with rollout.compile: TRL / ours"),
}
GROUPER = ("prefix_grouper_loss", "our_loss", "the same: PrefixGrouper's shared prefix / ours")
SHORT = {"step": "GRPO step", "sampling": "group sampling", "loss": "loss pass"}
GROWTH = [
    *(("group", {"group": g}, f"G = {g}") for g in (2, 4, 16)),  # G = 8 and 576 tokens are the standard case
    ("prompt", {"image_tokens": 64}, "64 image tokens"),
    ("prompt", {"views": 2}, "1152 image tokens"),
]
REWARDS = {"CheXbert": "f1chexbert", "RadGraph": "radgraph", "BERTScore": "bert_score",
           "BLEU-4 and ROUGE-L": "sacrebleu"}  # fmt: skip
SIDES = ("peer", "ours")
# load above which a row is not published: what waits for a core hurts the slower side more; a GPU's host has idle ones
QUIET = 2.0 if DEVICE == "cpu" else (os.cpu_count() or 2) / 2
SETTINGS = """\
Both sides: the same random weights, images, prompt and reward function; LoRA r 16 on q, k, v, o; KL on; AdamW,
learning rate 1e-6; one update per rollout; exactly T new tokens (EOS is barred until then); temperature 1, no
truncation. TRL: per_device_train_batch_size = B x G, num_generations = G, beta 0.04, gradient_checkpointing off
unless said (faster; its default is on), bf16 for 7b, transformers' generation, everything else its default. Ours:
micro_batch = B. Peak memory: on the CPU the highest resident size less the size after loading, on a GPU all that was
allocated. Reward pass: as many pairs, random weights of BERT-base size; the packages have their models loaded and get
one pair a call; ours knows the references from earlier updates."""


@dataclass
class Bench:
    size: str = "mini"
    """mini or 7b (sides.py)"""
    cases: tuple[str, ...] = ("step", "sampling", "loss", "rewards", "group", "prompt")
    """step, sampling, loss: the standard case; compile: sampling and step with rollout.compile; group, prompt: how each
    grows with G and with the image tokens; rewards: against their packages"""
    repeats: int = 5
    """timed repeats of each side in the standard case; of all else 3 at most"""


class Load:
    """How many processes and threads of the whole machine want a core, on average while a side runs: at most `threads`
    of them are its own. What is more than that waits for a core, and lengthens what is measured."""

    def __init__(self):
        self.seen: list[int] = []

    def watch(self, ended: threading.Event) -> None:
        while not ended.wait(0.25):
            self.seen.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # less this thread

    @contextlib.contextmanager
    def measured(self):
        ended = threading.Event()
        thread = threading.Thread(target=self.watch, args=(ended,))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def mean(self) -> float:
        return round(statistics.fmean(self.seen), 1) if self.seen else 0.0


class SideFailed(Exception):
    """A side ended before its time, for want of memory for example."""


class Side:
    """A process that runs one side of a case, as sides.py in `place` has it, when it is told to."""

    def __init__(self, name: str, case: Case, place: Path = HERE):
        changed = {key: value for key, value in asdict(case).items() if value != getattr(Case, key)}
        flags = [word for key, value in changed.items() for word in (f"--{key}", *[str(value)] * (value is not True))]
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up and stop the process
        self.process = subprocess.Popen(
            [sys.executable, str(place / "sides.py"), name, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"},
        )  # fmt: skip
        self.read("ready")

    def read(self, expect: str = "") -> str:
        line = self.process.stdout.readline().strip()
        if not line or expect and line != expect:
            self.process.communicate()
            self.errors.seek(0)
            errors = self.errors.read().rstrip()
            print(f"{' '.join(self.process.args[1:])} failed:\n{errors[-3000:]}", file=sys.stderr)
            raise SideFailed(f"{self.process.args[2]} failed: {errors.splitlines()[-1][:100] if errors else 'no word'}")
        return line

    def run(self) -> float:
        """Seconds of one repeat."""
        self.tell("go")
        return float(self.read())

    def end(self) -> int:
        """Stop it; its peak memory in bytes."""
        self.tell("stop")
        peak = int(self.read())
        self.process.communicate()
        return peak

    def tell(self, word: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: the read that follows says why
            self.process.stdin.write(word + "\n")
            self.process.stdin.flush()


@functools.cache
def measure_alone(name: str, case: Case, repeats: int) -> tuple[list[float], int, float]:
    """(seconds of each repeat, peak in bytes, load) of one side; measured once, also where it stands in two rows."""
    side, load = Side(name, case), Load()
    try:
        with load.measured():
            seconds = [side.run() for _ in range(repeats)]
        return seconds, side.end(), load.mean()
    finally:
        side.process.kill()


def compare_alone(peer: str, ours: str, case: Case, repeats: int) -> dict:
    """As `compare`, one side after the other: two 7B models would not fit at once."""
    both = [measure_alone(name, case, repeats) for name in (peer, ours)]
    seconds, peak, load = (dict(zip(SIDES, values, strict=True)) for values in zip(*both, strict=True))
    return {"case": asdict(case), "seconds": seconds, "peak": peak, "load": max(load.values())}


def compare(peer: str, ours: str, case: Case, repeats: int) -> dict:
    """Seconds of both sides, repeat by repeat in turn, and their peaks."""
    seconds, sides, load = {"peer": [], "ours": []}, {}, Load()
    try:
        for name, side in zip(SIDES, (peer, ours), strict=True):
            sides[name] = Side(side, case)
        for _ in range(repeats):
            for name, side in sides.items():
                with load.measured():
                    seconds[name].append(side.run())
        peak = {name: side.end() for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.process.kill()  # the one that is left when the other failed
    return {"case": asdict(case), "seconds": seconds, "peak": peak, "load": load.mean()}


def standard_of(bench: Bench) -> Case:
    """The case that all others differ from in one thing."""
    return Case(bench.size) if bench.size == "mini" else Case("7b", studies=8, checkpointing=True)


def short(bench: Bench) -> int:
    """Repeats of what stands beside the standard case."""
    return min(bench.repeats, 3)


def cases_of(bench: Bench) -> list[tuple[str, str, str, Case]]:
    """(label, peer, ours, case) of everything that runs as sides.py's processes; the standard case first."""
    standard, rows = standard_of(bench), []
    for name in (name for name in bench.cases if name in PAIRS):
        peer, ours, label = PAIRS[name]
        rows.append((label, peer, ours, standard))
        if name == "loss" and bench.size == "mini":
            rows.append((GROUPER[2], *GROUPER[:2], standard))
        if name == "step" and bench.size == "mini":
            label = "the same, gradient checkpointing on both sides"
            rows.append((label, peer, ours, replace(standard, checkpointing=True)))
    if "compile" in bench.cases:
        rows += [(label, peer, ours, standard) for peer, ours, label in COMPILED.values()]
    for what, change, label in GROWTH:
        if what in bench.cases:
            rows += [(f"{SHORT[name]}, {label}", *PAIRS[name][:2], replace(standard, **change)) for name in PAIRS]
    for part, package in REWARDS.items() if "rewards" in bench.cases else ():
        label = f"reward pass, {part}: {package} pair by pair / ours"
        rows.append((label, "package_rewards", "our_rewards", replace(standard, reward=part)))
    return rows


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f} to {max(values):.{digits}f}]"


def row_of(label: str, result: dict | None, missing: str = "") -> str:
    """A line of the table for {"seconds": ..., "peak": ...} of both sides; None: `missing` says why."""
    if result is None or result["load"] > QUIET:
        missing = missing or f"not published: load {result['load']}"
        return f"| {label} | {missing} |" + " |" * 6
    seconds, peak = result["seconds"], result["peak"]
    ratios = [a / b for a, b in zip(seconds["peer"], seconds["ours"], strict=True)]
    cells = [label, *(spread(seconds[name]) for name in SIDES), f"**{spread(ratios)}**"]
    cells += [f"{peak[name] / 2**20:,.0f}" for name in SIDES]
    cells += [f"{peak['ours'] / peak['peer']:.2f}" if peak["peer"] else "", str(result["load"])]
    return f"| {' | '.join(cells)} |"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def bandwidth() -> float:
    """Bytes a second that copying a large tensor reads and writes, on the GPU or with the sides' CPU threads."""
    source = torch.ones(2**28 if DEVICE == "cuda" else 2**26, device=DEVICE)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        start = clock()
        target.copy_(source)
        best = min(best, clock() - start)
    return 2 * source.numel() * source.element_size() / best


def sampling_bound(label: str, case: Case, seconds: float) -> str:
    """Our sampling beside the least it could take: weights and caches read once for each token of a row."""
    shape, itemsize = shape_of(case.size), 4 if case.size == "mini" else 2
    h, f, k = shape.hidden, shape.inner, shape.key
    weights = (shape.layers * (2 * h * h + 2 * h * k + 3 * h * f) + h * shape.vocabulary) * itemsize
    cached = case.studies * (case.image_tokens * case.views + case.group * case.tokens / 2)  # tokens, half-way through
    speed, tokens = bandwidth(), case.studies * case.group * case.tokens
    least = case.tokens * (weights + cached * shape.layers * 2 * k * itemsize) / speed
    share = f"{100 * least / seconds:.0f}% of the bound set by reading weights and caches once a step"
    speed = f"at {speed / 1e9:.0f} GB/s (a large copy's speed)"
    return f"{label}, ours: {tokens / seconds:,.0f} tokens/s, prefill included, {share} {speed}"


def rows(bench: Bench):
    """Yields (label, result of both sides or None, why there is none), in the table's order."""
    rewards = []
    for label, peer, ours, case in cases_of(bench):
        package = {"trl_step": "trl", "prefix_grouper_loss": "prefix_grouper",
                   "package_rewards": REWARDS.get(case.reward)}.get(peer)  # fmt: skip
        if package and not find_spec(package):
            yield label, None, f"{package} is not installed here"
            continue
        try:
            side_by_side = compare if case.size == "mini" else compare_alone
            result = side_by_side(peer, ours, case, bench.repeats if case == standard_of(bench) else short(bench))
            rewards += [result] * bool(case.reward)
            yield label, result, ""
        except SideFailed as error:
            yield label, None, str(error)
    if rewards:
        seconds = {name: [sum(x) for x in zip(*(r["seconds"][name] for r in rewards), strict=True)] for name in SIDES}
        peak = {name: max(r["peak"][name] for r in rewards) for name in SIDES}
        load = max(r["load"] for r in rewards)
        yield "reward pass, the above together", {"seconds": seconds, "peak": peak, "load": load}, ""


def main(bench: Bench) -> None:
    torch.set_num_threads(Case.threads)
    names = ["torch", "transformers", "peft", *(n for n in ("trl", "prefix_grouper") if find_spec(n))]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    title = {"mini": "LLaVA-mini", "7b": "LLaVA-Med-7B geometry, random weights"}[bench.size]
    lines = [f"# {title}: speed and memory", "",
             f"{machine()}; {versions}; {bench.repeats} repeats of the standard case, {short(bench)} of all else, "
             f"both sides in turn after a warm-up of each; median and range.", "",
             "| case | peer, s | ours, s | peer / ours | peer, MiB | ours, MiB | ours / peer | load |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    some = [] if bench.cases == Bench.cases else list(bench.cases)  # a part does not replace the whole table
    results, notes, path = [], [], HERE / "results" / "-".join([bench.size, *some])
    path.parent.mkdir(exist_ok=True)
    for label, result, missing in rows(bench):
        lines.append(row_of(label, result, missing))
        print(lines[-1], flush=True)
        if result and result["load"] <= QUIET:
            results.append({"label": label} | result)
        if result and result["load"] <= QUIET and label in (PAIRS["sampling"][2], COMPILED["sampling"][2]):
            notes.append(sampling_bound(label, standard_of(bench), statistics.median(result["seconds"]["ours"])))
        # after every row: what has been measured survives a time limit
        text = "\n".join([*lines, "", *notes, "", f"The standard case: {asdict(standard_of(bench))}", "", SETTINGS])
        path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    print("\n".join(["", *notes, "", f"written: {path}.md and .json"]))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
