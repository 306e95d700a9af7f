"""Where the phantom's assets lie, and that each is built once: `phantom:base` in a config means "that folder".

An asset depends on its recipe alone (phantom.config.Recipe): its builder gets nothing else, one CPU thread and a seeded
generator, so it ends in the same bytes whatever else a run's settings say and whoever else builds. It is written beside
its place and renamed when complete. This module knows no builder: assets.py has all of them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from config import Config
from formats.files import inside, read_json
from phantom.config import Recipe
from running.folder import atomic_folder, lock, writing
from running.weights import check_model, check_open_clip, check_torch_file, require

Name = Literal["data", "data_clean", "base", "base_pooled", "expert", "expert_noisy", "expert_50", "expert_100",
               "expert_150", "expert_200", "labeller"]  # fmt: skip
NAMES = get_args(Name)
Builders = Mapping[Name, Callable[[Recipe, Path], object]]  # name -> function(recipe, folder to fill)


def recipe_of(cfg: Config) -> Recipe:
    """What the assets of a run depend on: the tables `phantom` and `assets`, and `assets_seed`."""
    return Recipe(cfg.phantom, cfg.assets, cfg.assets_seed)


def asset_dir(cfg: Config) -> Path:
    """The folder of these settings' assets: the same recipe shares it, others never mix with it."""
    key = json.dumps(list(dataclasses.asdict(recipe_of(cfg)).values()), sort_keys=True)
    return Path(cfg.assets_dir) / f"phantom-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def resolve(cfg: Config, needs: Collection[str] = (), builders: Builders | None = None) -> Config:
    """Replace every `phantom:NAME` path by its folder, which is built where it is missing and NAME is in `needs`, or
    what stands there before NAME's `_`: "expert" is all the experts.

    ValueError for a name that is none of NAMES, a path that leads out of its folder, and a folder that is damaged.
    """

    def place(value):
        if not str(value).startswith("phantom:"):
            return value
        name, _, rest = value.removeprefix("phantom:").partition("/")
        if name not in NAMES:
            raise ValueError(f"{value}: unknown; known are {', '.join(f'phantom:{known}' for known in NAMES)}")
        path = inside(asset_dir(cfg) / name, rest, value)
        if {name, name.split("_")[0]} & {*needs}:
            ensure(cfg, name, builders)
        return str(path)

    tables = {name: dataclasses.replace(table, **{key: place(value) for key, value in vars(table).items()})
              for name, table in vars(cfg).items() if name in ("data", "model", "scorers")}  # fmt: skip
    return dataclasses.replace(cfg, **tables)


def check_asset(folder: Path) -> None:
    """ValueError, one line, for an asset that is not whole: a file is missing, empty or cut off."""
    try:
        for path in folder.glob("*.json"):
            if not read_json(path):
                raise ValueError(f"{path}: empty")
        if folder.name.startswith("data"):
            require(folder, "annotation.json")
            studies = (folder / "truth.jsonl").read_bytes().count(b"\n")
            if len(os.listdir(folder / "images")) < studies:
                raise ValueError(f"images: less than {studies} folders")
        elif folder.name.startswith("expert"):
            check_open_clip(folder)
        else:
            check_model(folder)
            require(folder, "processor_config.json" if folder.name.startswith("base") else "chexbert.pth")
        if folder.name == "labeller":
            check_torch_file(folder / "chexbert.pth")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}): delete it, and it is built anew") from error


def ensure(cfg: Config, name: Name, builders: Builders) -> Path:
    """Build asset `name` unless it is there; returns its folder. ValueError for one that is damaged."""
    folder = asset_dir(cfg) / name
    if folder.exists():
        check_asset(folder)
        return folder
    if name not in ("data", "labeller"):  # the labeller learns from texts of its own
        ensure(cfg, "data", builders)
    with lock(folder.with_name(f"{name}.lock"), wait=True):  # two processes may want the same asset
        if not folder.exists():
            print(f"building {folder}", flush=True)
            size, threads = 200_000_000 if name == "data" else 7_500_000, torch.get_num_threads()  # with the defaults
            torch.set_num_threads(1)  # more would add up in another order, and end in other bits
            with writing(folder, size), atomic_folder(folder) as unfinished, torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.assets_seed)
                builders[name](recipe_of(cfg), unfinished)
            torch.set_num_threads(threads)
    return folder
