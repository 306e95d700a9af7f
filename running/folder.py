"""The run folder: what a stage writes, and how an interrupted one goes on.

    <run>/<stage>/config.json     the resolved config; a later start with other settings is refused
                  metrics.jsonl   one row per policy update k, also as TensorBoard events in tb/
                  samples.jsonl   groups of candidates with every reward (both: running/log.py)
                  checkpoint.pt   adapter, optimizer, RNG state, number of updates done: one file, replaced atomically
                  adapter/        the finished policy, for `peft.PeftModel.from_pretrained`; its presence = stage done

A second start with the same command goes on from the checkpoint and ends with the same weights, bit by bit; with
dropout in Stage 0 on the CPU and in one process only, as other generators are not kept.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from config import Config, flatten, from_recorded, to_dict
from formats.files import read_json

# fields that may change between a run's start and its continuation: they touch the weights by float rounding at most
FREE_FIELDS = (
    "stage", "run", "name", "assets_dir", "save_every", "val_every", "sample_every", "eval", "fsdp", "device",
    "threads", "sft.micro_batch", "grpo.micro_batch", "grpo.micro_group", "model.gradient_checkpointing",
)  # fmt: skip


@contextlib.contextmanager
def atomic_folder(folder: Path):
    """A fresh folder to write into that becomes `folder` when the block ends well."""
    tmp = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    yield tmp
    os.replace(tmp, folder)


def lock(path: Path, wait: bool):
    """Hold `path` for this process: an open file, freed when it is closed or the process dies.

    Where another process holds it: wait, or raise ValueError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing to {path.parent}: wait for it, or choose another --run") from None
    return file


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    tmp = path.with_name(f"{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def claim_folder(folder: Path, cfg: Config) -> None:
    """Write the resolved config, or check that the folder's earlier one agrees; ValueError naming a difference."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoint.pt", "adapter"))
    if not path.exists() or not begun:  # a start that failed before its first update binds nobody
        return write_text(path, json.dumps(to_dict(cfg), indent=2) + "\n")
    recorded, ignored = from_recorded(path, Config())
    if ignored:
        print(f"{path}: settings of an earlier version are ignored: {', '.join(ignored)}")
    old, new = flatten(to_dict(recorded)), flatten(to_dict(cfg))
    for key, value in new.items():
        if not {key, key.split(".")[0]} & set(FREE_FIELDS) and old[key] != value:
            raise ValueError(f"{folder} was started with {key} = {old[key]}, now it is {value}: give the old value, "
                             "choose another --run or --name, or delete the folder")  # fmt: skip


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Everything the next update depends on, in one file."""
    adapter = get_peft_model_state_dict(model, adapter_name="default")
    state = {"step": step, "adapter": adapter, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save(state, folder / "checkpoint.pt.tmp")
    os.replace(folder / "checkpoint.pt.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Restore the last checkpoint; returns the number of updates done, 0 without one."""
    if not (folder / "checkpoint.pt").exists():
        return 0
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    set_peft_model_state_dict(model, state["adapter"], adapter_name="default")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def save_adapter(folder: Path, model, state: dict) -> None:
    """`folder/adapter` in PEFT's format plus trainer_state.json (`k`, where the next stage goes on)."""
    with atomic_folder(folder / "adapter") as tmp:
        model.save_pretrained(str(tmp), selected_adapters=["default"])
        (tmp / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")


def last_k(adapter: Path) -> int:
    """k of an adapter's last policy update, from its trainer_state.json; 0 for an adapter that was made elsewhere."""
    path = Path(adapter) / "trainer_state.json"
    return read_json(path).get("k", 0) if path.exists() else 0


def adapter_folder(path: str) -> Path:
    """The adapter folder that `init_from` or `reference` names, itself or the stage folder around it."""
    inside = Path(path) / "adapter"
    return inside if inside.is_dir() else Path(path)
