"""The run folder: what a stage writes, and how an interrupted one goes on.

    <run>/<stage>/config.json     the resolved config; a later start with other settings is refused
                  metrics.jsonl   one row per policy update k, also as TensorBoard events in tb/
                  samples.jsonl   groups of candidates with every reward and token (running/log.py)
                  checkpoint.pt   adapter, optimizer, RNG state, number of updates done: one file, replaced atomically;
                                  the one before it stays, as checkpoint.previous.pt
                  adapter/        the finished policy, for `peft.PeftModel.from_pretrained`; its presence = stage done

A second start with the same command goes on from the checkpoint and ends with the same weights, bit by bit; with
dropout in Stage 0 on the CPU and in one process only, as other generators are not kept. Reports are patients' texts:
what is written here only its owner may read.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError

from config import Config, flatten, from_recorded, to_dict
from formats.files import read_json, require_regular
from running.weights import check_zip, loading, require_finite_tensors, require_placed, tensor_shapes

# fields that may change between a run's start and its continuation: they touch the weights by float rounding at most
FREE_FIELDS = {"stage", "run", "name", "assets_dir", "save_every", "val_every", "sample_every", "eval", "fsdp",
               "device", "threads", "sft.micro_batch", "grpo.micro_batch", "grpo.micro_group", "dpo.micro_batch",
               "model.gradient_checkpointing"}  # fmt: skip
private = functools.partial(os.open, mode=0o600)  # an `opener` for files that nobody but their owner may read
FINISHED = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json")


@contextlib.contextmanager
def writing(path: Path, size: int):
    """Where there is no room: an OSError of one line with `path`, its `size` in bytes, and the bytes that are free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path}: {size:,} bytes cannot be written ({error}; {free:,} are free): make room and start "
                      "again, a run goes on from its last checkpoint") from error  # fmt: skip


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A fresh folder to write into that becomes `folder` when the block ends well."""
    tmp = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # half of it would only fill the disk


def lock(path: Path, wait: bool):
    """Hold `path` for this process: an open file, freed when it is closed or the process dies.

    Where another process holds it: wait, or raise ValueError. A file system without locks is said on a line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    require_regular(path)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing to {path.parent}: wait for it, or choose another --run") from None
    except OSError as error:
        print(f"{path}: not locked ({error.strerror}): see to it that no second process writes to {path.parent}")
    return file


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all; OSError names it and the bytes that it needs."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # of a lone surrogate, which UTF-8 does not know


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.tmp")
    tmp.unlink(missing_ok=True)  # an older one may be readable by all
    try:
        with writing(path, len(data)), open(tmp, "wb", opener=private) as file:
            file.write(data)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def claim_folder(folder: Path, cfg: Config) -> None:
    """Write the resolved config, or check that the folder's earlier one agrees; ValueError naming a difference."""
    folder.mkdir(parents=True, exist_ok=True)
    path, done = folder / "config.json", (folder / "adapter").exists()
    begun = done or any((folder / name).exists() for name in ("metrics.jsonl", "checkpoint.pt"))
    if begun and not path.exists() and not done:
        raise ValueError(f"{path} is gone, which says how this stage began: put it back, or delete the folder")
    if not path.exists() or not begun:  # a start that failed before its first update binds nobody
        return write_text(path, json.dumps(to_dict(cfg), indent=2) + "\n")
    recorded, ignored = from_recorded(path, Config())
    if ignored:
        print(f"{path}: settings of an earlier version are ignored: {', '.join(ignored)}")
    old, new, given = flatten(to_dict(recorded)), flatten(to_dict(cfg)), flatten(read_json(path))
    bound = [key for key in new if not {key, key.split(".")[0]} & FREE_FIELDS]
    added = [f"{key} = {new[key]}" for key in bound if key not in given]
    if added and not done:  # a part of the stage was trained before they were there
        print(f"{path} does not know these settings, with which it goes on: {', '.join(added)}")
    for key in bound:
        if old[key] != new[key] and (done or key in given):
            raise ValueError(f"{folder} was started with {key} = {old[key]}, now it is {new[key]}: give the old value, "
                             "choose another --run or --name, or delete the folder")  # fmt: skip


def save_checkpoint(folder: Path, model, optimizer, stage: int | str, k: int, step: int) -> None:
    """Everything the next update depends on, in one file, after `step` updates of the stage, the last of them k."""
    adapter = get_peft_model_state_dict(model, adapter_name="default")
    state = {"stage": stage, "k": k, "step": step, "adapter": adapter, "optimizer": optimizer.state_dict(),
             "rng": torch.get_rng_state()}  # fmt: skip
    torch.save(state, buffer := io.BytesIO())  # not to the disk: torch has no words for a full one
    path = folder / "checkpoint.pt"
    write_bytes(new := folder / "checkpoint.new.pt", buffer.getbuffer())
    if path.exists():
        os.replace(path, folder / "checkpoint.previous.pt")
    os.replace(new, path)


def load_checkpoint(folder: Path, model, optimizer, stage: int | str, steps: int, init: Path | None):
    """Restore the last checkpoint that is there, of a stage of `steps` updates that began from adapter `init`.

    Returns (k of the last policy update before the stage, updates of the stage done: 0 without a checkpoint).
    ValueError, one line, for a damaged file or one that is not this stage's.
    """
    k0, paths = last_k(init) if stage else 0, [folder / f"checkpoint{which}.pt" for which in ("", ".previous")]
    path = next(filter(Path.exists, paths), None)
    if path is None:
        return k0, 0
    advice = "delete it: the stage goes on from the checkpoint before it, save_every updates earlier, or begins anew"
    with loading(f"{path}: damaged or not this stage's", advice):
        require_regular(path)
        check_zip(path)  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, own = state["step"], get_peft_model_state_dict(model, adapter_name="default")
        if type(step) is not int or not 0 < step <= steps or (state["stage"], state["k"]) != (stage, k0 + step):
            raise ValueError(f"update {step}, k = {state['k']} of stage {state['stage']}, but stage {stage} has "
                             f"{steps} updates from k = {k0 + 1} on")  # fmt: skip
        moments = state["optimizer"]["state"]
        tensors = state["adapter"] | {f"{i}.{name}": x for i, row in moments.items() for name, x in row.items()}
        for i, x in enumerate(optimizer.param_groups[0]["params"]):
            own |= {f"{i}.step": torch.tensor(0.0), f"{i}.exp_avg": x, f"{i}.exp_avg_sq": x}
        found, wanted = ({f"{k} {[*x.shape]} {x.dtype}" for k, x in held.items()} for held in (tensors, own))
        require_placed(wanted - found, found - wanted, "its tensors")
        require_finite_tensors(tensors, "weights")
        set_peft_model_state_dict(model, state["adapter"], adapter_name="default")
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
    return k0, step


def save_adapter(folder: Path, model, state: dict) -> None:
    """`folder/adapter` in PEFT's format plus trainer_state.json (`k`, where the next stage goes on)."""
    size = sum(x.nbytes for x in get_peft_model_state_dict(model, adapter_name="default").values())
    with writing(folder / "adapter", size), atomic_folder(folder / "adapter") as tmp:
        model.save_pretrained(str(tmp), selected_adapters=["default"])
        (tmp / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")


def is_done(folder: Path) -> bool:
    """Whether a stage's folder holds its finished policy; ValueError for half of one, which no kill leaves behind."""
    adapter = folder / "adapter"
    lacking = [name for name in FINISHED if not (adapter / name).is_file()]
    if lacking and os.path.lexists(adapter):
        raise ValueError(f"{adapter}: no {lacking[0]}: delete it, and the stage goes on from its checkpoint")
    if not lacking:
        tensor_shapes(adapter / "adapter_model.safetensors")  # is it whole?
    return not lacking


def last_k(adapter: Path) -> int:
    """k of an adapter's last policy update, from its trainer_state.json; 0, and a line, for one made elsewhere."""
    path = Path(adapter) / "trainer_state.json"
    if not path.exists():
        print(f"{adapter}: no trainer_state.json, as of a policy made elsewhere: k counts from 0")
        return 0
    k = read_json(path).get("k")
    if type(k) is not int or not 0 <= k < 2**53:
        raise ValueError(f"{path}: k is {k!r}, no number of policy updates: put the file back as it was")
    return k


def adapter_folder(path: str) -> Path:
    """The adapter folder that `init_from` or `reference` names, itself or the stage folder around it."""
    inside = Path(path) / "adapter"
    return inside if inside.is_dir() else Path(path)
