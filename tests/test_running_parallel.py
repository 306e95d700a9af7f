"""torchrun: however many processes share a batch, the gradient, the candidates and the metrics are those of one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_images, randomise

from config import Config, ModelConfig
from model import load_policy
from running import parallel

WORKER = Path(__file__).with_name("parallel_worker.py")


def command(*torchrun: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, str(WORKER)]


def start(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base_dir):
    """Base, policy adapter, another one as reference, five images."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "base").symlink_to(base_dir)
    for seed, name in enumerate(("adapter", "reference")):
        model, _ = load_policy(Config(model=ModelConfig(path=str(base_dir)), device="cpu"), new_lora=True)
        randomise(model, seed=seed)
        model.save_pretrained(folder / name)
    for i, image in enumerate(make_images(5)):
        image.save(folder / f"study{i}.png")
    return folder


def run(folder: Path, processes: int, *words: str) -> dict:
    finish(start([*command("--standalone", "--nproc-per-node", str(processes)), str(folder), *words]))
    return torch.load(folder / f"result_{processes}.pt", weights_only=True)


def assert_same(got: dict, expected: dict) -> None:
    """Gradient, candidates, metrics and evaluation texts of two runs of the same batch."""
    assert expected["gradient"].norm() > 1e-3
    assert (got["gradient"] - expected["gradient"]).norm() <= 1e-6 * max(1, expected["gradient"].norm())
    assert got["candidates"] == expected["candidates"] and got["split"] == expected["split"]
    assert got["row"].keys() == expected["row"].keys()
    for name, value in expected["row"].items():
        assert got["row"][name] == pytest.approx(value, abs=1e-5), name


WRONG = [{"WORLD_SIZE": "abc"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "0"},
         {"WORLD_SIZE": "2", "RANK": "x"}, {"LOCAL_RANK": "x"},
         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}]  # fmt: skip


@pytest.mark.parametrize("variables", WRONG, ids=str)
def test_variables_of_a_cluster_without_torchrun_are_one_line(monkeypatch, variables):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start by torchrun.* `unset WORLD_SIZE LOCAL_RANK`") as caught:
        parallel.start("cpu")
    assert "\n" not in str(caught.value)


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own, there are 2 .*torchrun"):
        parallel.start("auto")


@pytest.mark.parametrize("device", ["junk", "", "meta", "cuda:99", "gpu", "cpu:x"])
def test_a_device_that_cannot_be_used_is_one_line(device):
    with pytest.raises(ValueError, match=f"^device {device}: .*; use --device auto or cpu$"):
        parallel.start(device)


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, 1, "whole")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_a_batch_without_changing_it(folder, alone, processes):
    """Five studies: shares of 3 and 2, or of 2, 1, 1 and 1, so nothing divides evenly."""
    assert len(alone["candidates"]) == len(alone["split"]) == 5 and alone["sharded"] == 0
    lengths = {len(text.split()) for group in alone["candidates"].values() for text in group}
    assert len(lengths) > 1
    assert_same(run(folder, processes, "whole"), alone)


@pytest.mark.slow
def test_a_base_spread_over_processes_gives_the_same_numbers(folder):
    expected, got = run(folder, 1, "fsdp"), run(folder, 2, "fsdp")
    assert expected["sharded"] == 0 and got["sharded"] > 10
    assert_same(got, expected)


@pytest.mark.slow
def test_two_nodes_on_the_loopback(folder, alone):
    """Two torchrun agents meet at a rendezvous, one process each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "valor"]
    words += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    agents = [start([*command(*words), str(folder), "whole"]) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert_same(torch.load(folder / "result_2.pt", weights_only=True), alone)


@pytest.mark.slow
def test_a_crashed_process_ends_the_run_with_an_error(folder):
    process = start([*command("--standalone", "--nproc-per-node", "2"), str(folder), "whole", "crash"])
    began = time.monotonic()
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and ("SIGKILL" in text or "exitcode:-9" in text.replace(" ", ""))
    assert time.monotonic() - began < 60


HANG = """
import sys, time
from datetime import timedelta
from running import parallel

parallel.UPDATE = timedelta(seconds=3)
parallel.start("cpu")
time.sleep(6 * (parallel.rank() == 0))  # builds an asset, say
parallel.barrier()
print("past the barrier", flush=True)
time.sleep(200 * (parallel.rank() == 1))
parallel.gather(parallel.rank())
print("past the update", flush=True)
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("x" * 2000), f"run.py: {'x' * 1500}"),
        (OSError("gone"), "run.py: gone"),
        (torch.OutOfMemoryError("full.\nmore"), "run.py: full. Lower the stage's micro_batch or grpo.micro_group; in "
         "evaluation, eval.batch_size."),
        (KeyboardInterrupt(), "run.py: interrupted; the same command goes on"),
    ],
)  # fmt: skip
def test_a_script_ends_with_one_line_for_what_its_user_can_mend(error, said):
    @parallel.script("run.py", "the same command goes on")
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == said


def test_a_scripts_own_faults_are_no_line():
    @parallel.script("run.py")
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.slow
def test_a_hung_process_ends_the_run_while_one_that_works_alone_does_not(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    words = [*command("--standalone", "--nproc-per-node", "2")[:-1], str(tmp_path / "hang.py")]
    began = time.monotonic()
    text = start(words, PYTHONPATH=str(WORKER.parents[1])).communicate(timeout=150)[0]
    assert "past the barrier" in text and "past the update" not in text
    assert time.monotonic() - began < 100
