"""The run folder: what a stage writes, and how an interrupted one goes on.

    <run>/<stage>/config.json     the resolved config; a later start with other settings is refused
                  metrics.jsonl   one row per policy update k, also as TensorBoard events in tb/
                  samples.jsonl   groups of candidates with every reward
                  checkpoint.pt   adapter, optimizer, RNG state, number of updates done: one file, replaced atomically
                  adapter/        the finished policy, for `peft.PeftModel.from_pretrained`; its presence = stage done

After a kill, rows written since the last checkpoint are dropped and written again, so each k stands once.
"""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config import Config, to_dict
from data import Study

# fields that may change between a run's start and its continuation: they touch the weights by float rounding at most
FREE_FIELDS = ("stage", "run", "name", "assets_dir", "save_every", "val_every", "sample_every", "eval", "fsdp",
               "sft.micro_batch", "grpo.micro_batch", "grpo.micro_group", "model.gradient_checkpointing")  # fmt: skip


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
        raise ValueError(
            f"another process is writing to {path.parent}: wait for it, or choose another --name"
        ) from None
    return file


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    tmp = path.with_name(f"{path.name}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


def flatten(tree: dict, where: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = {}
    for key, value in tree.items():
        items |= flatten(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return items


def claim_folder(folder: Path, cfg: Config) -> None:
    """Write the resolved config, or check that the folder's earlier one agrees; ValueError naming a difference."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoint.pt", "adapter"))
    if not path.exists() or not begun:  # a start that failed before its first update binds nobody
        return write_text(path, json.dumps(to_dict(cfg), indent=2) + "\n")
    default, new = flatten(to_dict(Config())), flatten(to_dict(cfg))
    old = default | flatten(json.loads(path.read_text()))  # a field added since had its default's meaning
    for key in sorted(old.keys() | new.keys()):
        if not {key, key.split(".")[0]} & set(FREE_FIELDS) and old.get(key) != new.get(key):
            raise ValueError(
                f"{folder} was started with {key} = {old.get(key)}, now it is {new.get(key)}: "
                f"give the old value, choose another --run or --name, or delete the folder"
            )


def save_checkpoint(folder: Path, model, optimizer, step: int) -> None:
    """Everything the next update depends on, in one file."""
    state = {
        "step": step,
        "adapter": get_peft_model_state_dict(model, adapter_name="default"),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
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


def adapter_state(adapter: Path) -> dict:
    """trainer_state.json of an adapter folder, {} for an adapter that was made elsewhere."""
    path = Path(adapter) / "trainer_state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def adapter_folder(path: str) -> Path:
    """The adapter folder that `init_from` names, itself or the stage folder around it."""
    inside = Path(path) / "adapter"
    return inside if inside.is_dir() else Path(path)


class Log:
    """metrics.jsonl, samples.jsonl and TensorBoard of one stage; does nothing on processes other than the first."""

    def __init__(self, folder: Path, last_k: int, active: bool = True):
        self.folder, self.active = folder, active
        if active:
            for name in ("metrics.jsonl", "samples.jsonl"):
                keep_rows(folder / name, last_k)
            self.tensorboard = SummaryWriter(str(folder / "tb"), purge_step=last_k + 1)

    def write(self, k: int, row: dict[str, float], sample: dict | None = None) -> None:
        """Append the row of update k, and a group of candidates where one is given."""
        if not self.active:
            return
        append(self.folder / "metrics.jsonl", {"k": k} | row)
        if sample is not None:
            append(self.folder / "samples.jsonl", sample)
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, k)

    def close(self) -> None:
        if self.active:
            self.tensorboard.close()


def append(path: Path, row: dict) -> None:
    """Add one line to a .jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_rows(path: Path, last_k: int) -> None:
    """Drop the rows after update `last_k`, and a last line that a kill cut short: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        write_text(path, "".join(line for line in lines if json.loads(line)["k"] <= last_k))


def average(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Mean of each metric over all studies of all processes."""
    names = dict.fromkeys(name for part in parts for name in part)
    values = {name: [v for part in parts for v in part.get(name, [])] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items()}


def sample_record(
    batch: list[Study], outputs: list[list[str]], rewards: Tensor, parts: dict[str, Tensor], k: int
) -> dict:
    """The first study's candidates with every reward."""
    rows = [
        {"text": text, "reward": rewards[0, i].item()} | {name: values[0, i].item() for name, values in parts.items()}
        for i, text in enumerate(outputs[0])
    ]
    return {"k": k, "id": batch[0].id, "reference": batch[0].report, "candidates": rows}
