"""Minutes, not seconds: real kills, several processes, an install in a clean clone. Run by `make test-slow`."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

# Small enough to repeat, long enough that the policy writes tagged impressions: without readable reports every
# reward is 0, no RL update changes a weight, and a comparison of weights says nothing.
SETTINGS = """
save_every = 3
device = "cpu"
[phantom]
expert = 48
base = 48
sft = 24
train = 24
val = 8
test = 8
[assets]
vision_steps = 10
base_steps = 150
expert_steps = 8
labeller_steps = 8
[data]
target = "impression"
[rewards]
k_clin = 2
required_sections = []
[sft]
steps = 60
batch_size = 12
lr = 1e-2
[grpo]
batch_size = 4
[rollout]
group_size = 4
max_new_tokens = 32
[stage1]
steps = 10
[stage2]
steps = 10
"""


def start(cwd: Path, *flags: str, processes: int = 1) -> subprocess.Popen:
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += [str(ROOT / "train.py"), "--config", str(cwd / "micro.toml"), *flags]
    with (cwd / "log.txt").open("a") as log:
        return subprocess.Popen(words, cwd=cwd, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                start_new_session=True)  # fmt: skip


def finish(cwd: Path, *flags: str, processes: int = 1) -> None:
    assert start(cwd, *flags, processes=processes).wait(timeout=600) == 0, (cwd / "log.txt").read_text()[-3000:]


def new_folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    (root / name / "micro.toml").write_text(SETTINGS)
    return root / name


def weights(cwd: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of every asset and stage, by file."""
    found = {}
    for path in sorted([*cwd.glob("assets/*/*/*.safetensors"), *cwd.glob("runs/phantom/*/adapter/*.safetensors")]):
        found["/".join(path.relative_to(cwd).parts[-3:])] = load_file(path)
    return found


def rows(cwd: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (cwd / "runs" / "phantom" / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all stages that nothing interrupts."""
    cwd = new_folder(tmp_path_factory.mktemp("slow"), "whole")
    finish(cwd, "--stage", "all")
    return cwd


def in_progress(cwd: Path, what: str) -> bool:
    """Whether the build of asset `what`, or the training of stage `what`, has begun and left something on disk."""
    if what in ("data", "base", "expert", "labeller"):
        return any(cwd.glob(f"assets/*/{what}.tmp"))
    return (cwd / "runs" / "phantom" / what / "metrics.jsonl").exists()


def test_killed_at_random_moments_the_run_ends_with_the_same_bits(whole, tmp_path):
    cwd, chance = new_folder(tmp_path, "killed"), random.Random(time.time_ns())
    for what in ("data", "base", "expert", "labeller", "sft", "stage1", "stage2", "stage2"):
        process = start(cwd, "--stage", "all")
        while not in_progress(cwd, what) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, {"base": 8.0, "sft": 4.0}.get(what, 1.5)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(cwd, "--stage", "all")
    expected, got = weights(whole), weights(cwd)
    assert expected.keys() == got.keys() and len(expected) >= 6
    for name, tensors in expected.items():
        assert tensors.keys() == got[name].keys()
        assert all(torch.equal(tensors[key], got[name][key]) for key in tensors), name
    for stage, steps in (("sft", 60), ("stage1", 10), ("stage2", 10)):
        assert len(rows(cwd, stage)) == steps
        assert len({row["k"] for row in rows(cwd, stage)}) == steps  # each k once
    moved = [not torch.equal(a, expected["stage1/adapter/adapter_model.safetensors"][k])
             for k, a in expected["sft/adapter/adapter_model.safetensors"].items()]  # fmt: skip
    assert any(moved)  # the comparison says something: RL did change weights


def test_two_processes_train_as_one(whole, tmp_path):
    cwd = new_folder(tmp_path, "two")
    shutil.copytree(whole / "assets", cwd / "assets")
    (cwd / "runs" / "phantom").mkdir(parents=True)
    shutil.copytree(whole / "runs" / "phantom" / "sft", cwd / "runs" / "phantom" / "sft")
    finish(cwd, "--stage", "1", processes=2)  # as many updates, for the same learning rates
    one, two = rows(whole, "stage1"), rows(cwd, "stage1")
    assert len(two) == len(one) == 10
    for a, b in zip(one[:3], two[:3], strict=True):
        for name in ("reward/total", "reward/bertscore", "length", "kl", "grad_norm", "loss"):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-3), name


def test_two_processes_evaluate_as_one(whole):
    flags = ["--run-dir", "runs/phantom", "--policy", "sft", "--eval.samples", "1", "--eval.bootstrap", "20"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    folder, results = whole / "runs" / "phantom" / "eval" / "test", []
    for launcher in ([], torchrun):
        words = [sys.executable, *launcher, str(ROOT / "evaluate.py"), *flags]
        done = subprocess.run(words, cwd=whole, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        texts = [json.loads(line) for line in (folder / "sft" / "reports.jsonl").read_text().splitlines()]
        results.append((json.loads((folder / "results.json").read_text()), texts))
        shutil.rmtree(folder)
    assert len(results[0][1]) == 8 and results[0] == results[1]


def test_the_sweep_over_seeds_ends_in_tables_and_figures(whole, tmp_path):
    """Some arms for two seeds, killed on the way and started again."""
    cwd = new_folder(tmp_path, "sweep")
    shutil.copytree(whole / "assets", cwd / "assets")
    words = [sys.executable, "-m", "evidence.sweep", "--config", str(cwd / "micro.toml"), "--seeds", "0", "1"]
    words += ["--sft.steps", "30", "--stage1.steps", "3", "--stage2.steps", "2"]
    words += ["--arms", "stage1_continued", "valor", "oracle_expert", "noisy_expert"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a module is started by its name, in another folder
    process = subprocess.Popen(words, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 300
    while not (cwd / "runs" / "seeds" / "0" / "stage1" / "adapter").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert not re.search(r"seed 0: stage1 +\d", done.stdout)  # finished before the kill: not done again
    results = json.loads((cwd / "results" / "phantom.json").read_text())
    assert results["seeds"] == [0, 1] and {"fixed_template", "majority", "stage1"} <= results["arms"].keys()
    assert {"phantom.md", "counts.npz", "curves.png", "arms.png"} <= {path.name for path in (cwd / "results").iterdir()}
    for arm in ("valor", "oracle_expert", "noisy_expert"):
        for metric in ("greedy/bleu_4", "sampled/equal_hallucination", "sampled/prior_spill"):
            assert len(results["arms"][arm][metric]["seeds"]) == 2


def test_the_readme_commands_work_in_a_clean_clone(tmp_path):
    """`make` sets up its own environment from nothing; the short demo runs in it."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(["make", "smoke"], cwd=clone, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (clone / "runs" / "smoke" / "eval" / "test" / "results.md").exists()
    for stage in ("sft", "stage1", "stage1_continued", "stage2"):
        assert (clone / "runs" / "smoke" / stage / "adapter" / "adapter_model.safetensors").exists()
