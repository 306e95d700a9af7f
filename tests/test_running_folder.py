"""The run folder and its log: damage of every kind is one line, and a full disk costs no bit of a run."""

import contextlib
import errno
import json
import os
import resource
import signal
import stat
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import train
from config import Config, EvalConfig, from_recorded
from running import folder as running_folder
from running.folder import (
    atomic_folder,
    claim_folder,
    is_done,
    last_k,
    load_checkpoint,
    lock,
    save_adapter,
    save_checkpoint,
    write_text,
)
from running.log import Log, append, keep_rows


def small_policy(seed: int = 0, width: int = 8):
    """A LoRA on one layer, and AdamW after one step."""
    torch.manual_seed(seed)
    model = get_peft_model(nn.Sequential(nn.Linear(width, 8)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(3, width)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoint of update 5 of a Stage 0 of 9 updates."""
    save_checkpoint(tmp_path, *small_policy(), stage=0, k=5, step=5)
    return tmp_path


def load(folder: Path, *, stage: int = 0, steps: int = 9, init: Path | None = None, width: int = 8):
    return load_checkpoint(folder, *small_policy(seed=1, width=width), stage, steps, init)


def test_a_checkpoint_comes_back_bit_by_bit(saved):
    theirs, ours = small_policy(), small_policy(seed=1)
    assert not all(map(torch.equal, weights(theirs[0]), weights(ours[0])))
    assert load_checkpoint(saved, *ours, 0, 9, None) == (0, 5)
    assert all(map(torch.equal, weights(theirs[0]), weights(ours[0])))
    moments = [optimizer.state_dict()["state"][0]["exp_avg"] for _, optimizer in (theirs, ours)]
    assert torch.equal(*moments) and load_checkpoint(saved / "none", *ours, 0, 9, None) == (0, 0)


def change(path: Path, edit) -> None:
    state = torch.load(path, weights_only=True)
    edit(state)
    torch.save(state, path)


def first(tensors: dict) -> torch.Tensor:
    return tensors[min(tensors)]


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no zip": lambda path: path.write_text("hello"),
    "a flipped bit": lambda path: path.write_bytes(flipped(path.read_bytes(), -2500)),
    "a flipped weight": lambda path: path.write_bytes(flipped(
        path.read_bytes(), path.read_bytes().index(weights(small_policy()[0])[0].numpy().tobytes()[:16]))),
    "another compression": lambda path: path.write_bytes(as_deflated(path.read_bytes())),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a list": lambda path: torch.save([1, 2], path),
    "a pickle of code": lambda path: torch.save({"step": os.system}, path),
    **{f"no {key}": lambda path, key=key: change(path, lambda state: state.pop(key))
       for key in ("stage", "k", "step", "adapter", "optimizer", "rng")},
    **{f"step {step}": lambda path, step=step: change(path, lambda state: state.update(step=step, k=step))
       for step in (999, 10, 0, -1, 5.0, "5", None, True)},
    "another k": lambda path: change(path, lambda state: state.update(k=4)),
    "another stage": lambda path: change(path, lambda state: state.update(stage=1)),
    "half an adapter": lambda path: change(path, lambda state: state["adapter"].popitem()),
    "a foreign weight": lambda path: change(path, lambda state: state["adapter"].update(x=torch.ones(2))),
    "another shape": lambda path: change(path, lambda state: state["adapter"].update(
        {min(state["adapter"]): torch.ones(3, 3)})),
    "NaN": lambda path: change(path, lambda state: first(state["adapter"]).fill_(float("nan"))),
    "infinite moments": lambda path: change(path, lambda state: first(state["optimizer"]["state"])["exp_avg"].fill_(
        float("inf"))),
    "no moments": lambda path: change(path, lambda state: state["optimizer"]["state"].clear()),
    "a moment's shape": lambda path: change(path, lambda state: state["optimizer"]["state"][0].update(
        exp_avg=torch.ones(1))),
    "another type": lambda path: change(path, lambda state: state["adapter"].update(
        {name: x.to(torch.int32) for name, x in state["adapter"].items()})),
    "no group": lambda path: change(path, lambda state: state["optimizer"]["param_groups"].clear()),
    "rng": lambda path: change(path, lambda state: state.update(rng=torch.zeros(3))),
}  # fmt: skip


def as_deflated(data: bytes) -> bytes:
    """A zip whose first record says that it is compressed, which it is not."""
    data, place = bytearray(data), data.index(b"PK\x01\x02")
    data[place + 10] = data[8] = 8
    return bytes(data)


def flipped(data: bytes, place: int) -> bytes:
    data = bytearray(data)
    data[place] ^= 1
    return bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(saved, damage):
    DAMAGE[damage](saved / "checkpoint.pt")
    with pytest.raises(ValueError, match="checkpoint.pt: damaged or not this stage's .*; delete it: ") as caught:
        load(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_without_a_damaged_checkpoint_the_one_before_it_is_taken(saved):
    save_checkpoint(saved, *small_policy(seed=2), stage=0, k=7, step=7)
    assert load(saved) == (0, 7) and sorted(path.name for path in saved.iterdir()) == [
        "checkpoint.previous.pt", "checkpoint.pt"]  # fmt: skip
    (saved / "checkpoint.pt").unlink()
    theirs, ours = small_policy(), small_policy(seed=1)
    assert load_checkpoint(saved, *ours, 0, 9, None) == (0, 5)
    assert all(map(torch.equal, weights(theirs[0]), weights(ours[0])))


def test_another_base_or_another_stages_steps_do_not_fit(saved):
    for settings in ({"width": 4}, {"steps": 4}):
        with pytest.raises(ValueError, match="not this stage's"):
            load(saved, **settings)


def test_k_goes_on_from_the_predecessor(tmp_path, capsys):
    init = tmp_path / "adapter"
    init.mkdir()
    assert last_k(init) == 0 and "no trainer_state.json" in capsys.readouterr().out  # a policy made elsewhere
    (init / "trainer_state.json").write_text('{"k": 60}')
    assert load(tmp_path, stage=2, init=init) == (60, 0) and capsys.readouterr().out == ""
    save_checkpoint(tmp_path, *small_policy(), stage=2, k=65, step=5)
    assert load(tmp_path, stage=2, init=init) == (60, 5)
    (init / "trainer_state.json").write_text('{"k": 40}')  # the predecessor is another one now
    with pytest.raises(ValueError, match="checkpoint.pt: damaged or not this stage's"):
        load(tmp_path, stage=2, init=init)
    for value in ("{}", '{"k": -1}', '{"k": "60"}', '{"k": true}', '{"k": 1.5}', "[]", "{"):
        (init / "trainer_state.json").write_text(value)
        with pytest.raises(ValueError, match="trainer_state.json: "):
            last_k(init)


def test_a_stage_is_done_only_with_a_whole_adapter(tmp_path):
    assert not is_done(tmp_path)
    save_adapter(tmp_path, small_policy()[0], {"stage": 0, "k": 0, "seed": 0})
    assert is_done(tmp_path)
    adapter = tmp_path / "adapter"
    for name in ("trainer_state.json", "adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).unlink()
        with pytest.raises(ValueError, match=f"{adapter}: no .*: delete it, and the stage goes on"):
            is_done(tmp_path)
    for path in adapter.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no adapter_config.json"):  # an empty folder
        is_done(tmp_path)
    adapter.rmdir()
    adapter.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        is_done(tmp_path)
    adapter.unlink()
    adapter.write_text("")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        is_done(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(running_folder.fcntl, "flock", flock)
    lock(tmp_path / ".lock", wait=False).close()
    assert f"{tmp_path}/.lock: not locked ({os.strerror(code)})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint.pt", "metrics.jsonl", ".lock"])
def test_a_pipe_in_the_folder_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    read = {"checkpoint.pt": lambda: load(tmp_path), "metrics.jsonl": lambda: keep_rows(tmp_path / name, 0, 3),
            ".lock": lambda: lock(tmp_path / name, wait=False)}[name]  # fmt: skip
    with pytest.raises((OSError, ValueError), match=f"{name}: .*not a regular file"):
        read()


def test_a_stage_without_the_settings_it_began_with_does_not_go_on(saved):
    with pytest.raises(ValueError, match="config.json is gone"):
        claim_folder(saved, Config())


def test_a_finished_adapter_has_whole_weights(tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json"):
        (tmp_path / "adapter" / name).touch()
    with pytest.raises(ValueError, match="adapter_model.safetensors: broken or cut off"):
        is_done(tmp_path)


# --------------------------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def no_room(size: int = 1000):
    """No file may grow beyond `size` bytes: as on a full disk, a write ends half-way, with an OSError."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:  # at once: pytest's own log may be longer
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_checkpoint_whole(saved):
    whole = (saved / "checkpoint.pt").read_bytes()
    said = r"checkpoint.new.pt: [\d,]{5,} bytes cannot be written .*free.*: make room"
    with no_room(), pytest.raises(OSError, match=said):
        save_checkpoint(saved, *small_policy(), stage=0, k=6, step=6)
    assert (saved / "checkpoint.pt").read_bytes() == whole and [p.name for p in saved.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_leaves_no_half_adapter(tmp_path):
    model, _ = small_policy(width=512)
    with no_room(), pytest.raises(OSError, match=r"adapter: [\d,]{5,} bytes cannot be written .*free.*: make room"):
        save_adapter(tmp_path, model, {"k": 0})
    assert list(tmp_path.iterdir()) == [] and not is_done(tmp_path)


def test_a_full_disk_is_named_by_the_log_and_repaired_at_the_next_start(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    for k in range(1, 4):
        append(path, {"k": k, "x": "y" * 200})
    with no_room(800), pytest.raises(OSError, match=r"metrics.jsonl: 2\d\d bytes cannot be written"):
        append(path, {"k": 4, "x": "y" * 200})
    assert keep_rows(path, 0, 3) == 3 and [json.loads(line)["k"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().out == ""


def test_a_full_disk_under_tensorboards_thread_is_one_line(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    log = Log(tmp_path, 0, 0)
    with no_room(), pytest.raises(OSError, match="tb: .* bytes cannot be written"):
        for k in range(1, 4):
            log.write(k, {f"a/{i}": 0.5 for i in range(9)})
        log.close()
    assert printed == []


def test_half_a_folder_is_taken_away_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize(("text", "said"), [
    ('{"k": 1}\n{"k": 2}\n{"k": 3}\n{"k": ', None),  # later, and cut short: as after every kill
    ('{"k": 1}\n{"x": 7}\n{"k": 2}\n', "line 2 and 0 others"),
    ('{"k": 2}\n{"k": 1}\n{"k": 2}\n{"k": 1}\n', "line 3 and 1 others"),
    ('{"k": 1}\n[1]\nx\n7\n{"k": "2"}\n{"k": null}\n{"k": 2}\n', "line 2 and 4 others"),
    ('{"k": 0}\n{"k": 1}\n{"k": 2}\n{"k": true}\n', "line 1 and 1 others"),
    ("\n" + '{"a":' * 100_000 + "\n" + '{"k": 1}\n{"k": 2}\n', "line 1 and 1 others"),
], ids=range(6))  # fmt: skip
def test_each_update_keeps_one_row_in_order(tmp_path, capsys, text, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert keep_rows(path, 0, 2) == 2 and path.read_text() == '{"k": 1}\n{"k": 2}\n'
    assert (said is None and capsys.readouterr().out == "") or f"{path}: {said}" in capsys.readouterr().out


def test_lost_rows_are_said(tmp_path, capsys):
    for text, lost in (("", 2), (None, 2), ('{"k": 12}\n', 1), ('{"k": 11}\n{"k": 12}\n', 0)):
        if text is None:
            (tmp_path / "metrics.jsonl").unlink()
        else:
            (tmp_path / "metrics.jsonl").write_text(text)
        Log(tmp_path, 10, 2).close()
        assert (f"the rows of {lost} earlier updates are lost" in capsys.readouterr().out) == bool(lost)


def test_reports_are_for_their_owner_alone(saved):
    for name in ("old.txt", "new.txt.tmp"):
        (saved / name).write_text("readable by all")
    for name in ("old.txt", "new.txt"):
        write_text(saved / name, "a report \ud800")  # half a character, as broken JSON gives it
    append(saved / "samples.jsonl", {"k": 1})
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# ------------------------------------------------------------------------------------------------- recorded settings


@pytest.mark.parametrize("text", ["[]", "7", "null", "{", "", '{"a":' * 100_000 + "1" + "}" * 100_000,
                                  '{"a":' * 100_000, '{"seed": "x"}', '"\\ud800"'], ids=range(9))  # fmt: skip
def test_a_damaged_config_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").write_text("")  # begun
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: ") as caught:
        claim_folder(tmp_path, Config())
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_printed_on_any_terminal(tmp_path):
    (tmp_path / "config.json").write_text('{"\\ud800": 1, "data": {"\\u001b[2J": 2}}')
    assert from_recorded(tmp_path / "config.json", Config())[1] == [r"\ud800", r"data.\x1b[2J"]


def test_a_recorded_config_names_no_program(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eval": {"ratescore": "/bin/evil", "samples": 9}}))
    recorded, ignored = from_recorded(tmp_path / "config.json", Config())
    assert (recorded.eval.ratescore, recorded.eval.samples, ignored) == ("", 9, [])
    mine = Config(eval=EvalConfig(ratescore="/my/python"))
    assert from_recorded(tmp_path / "config.json", mine)[0].eval.ratescore == "/my/python"


# ----------------------------------------------------------------------------------------------------- two processes


def test_a_start_that_the_lock_refuses_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_stage", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(train, "resolve", lambda cfg, needs: cfg)
    folder = tmp_path / "sft"
    with lock(folder / ".lock", wait=False):
        (folder / "config.json").write_text("the other process's")
        with pytest.raises(ValueError, match=f"another process is writing to {folder}"):
            train.train(Config(stage="0", run=str(tmp_path)))
    assert (folder / "config.json").read_text() == "the other process's"


def test_what_another_process_finished_while_we_waited_is_not_trained_again(tmp_path, monkeypatch, capsys):
    def finished_just_now(path: Path, wait: bool):
        save_adapter(path.parent, small_policy()[0], {"stage": 0, "k": 0})
        return lock(path, wait)

    monkeypatch.setattr(train, "lock", finished_just_now)
    monkeypatch.setattr(train, "run_stage", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(train, "resolve", lambda cfg, needs: cfg)
    train.train(Config(stage="0", run=str(tmp_path)))
    assert "sft is complete" in capsys.readouterr().out


def test_a_setting_that_a_begun_stage_did_not_know_is_said_and_may_be_given(tmp_path, capsys):
    """Its learning rate was constant before there was a schedule: whoever goes on can ask for that."""
    claim_folder(tmp_path, Config())
    recorded = json.loads((tmp_path / "config.json").read_text())
    del recorded["grpo"]["lr_scheduler_type"]
    (tmp_path / "config.json").write_text(json.dumps(recorded))
    (tmp_path / "metrics.jsonl").write_text("")
    for kind in ("linear", "constant"):
        cfg = Config()
        cfg.grpo.lr_scheduler_type = kind
        claim_folder(tmp_path, cfg)
        said = f"does not know these settings, with which it goes on: grpo.lr_scheduler_type = {kind}\n"
        assert capsys.readouterr().out.endswith(said)
    cfg.grpo.lr = 1.0
    with pytest.raises(ValueError, match="was started with grpo.lr = "):
        claim_folder(tmp_path, cfg)
    (tmp_path / "adapter").mkdir()
    capsys.readouterr()
    claim_folder(tmp_path, Config())
    assert capsys.readouterr().out == ""  # a finished one goes on with nothing
