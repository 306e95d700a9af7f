"""Where built assets lie, and that each is built once: `phantom:base` or `tiny:base` in a config means "that folder".

`phantom:` is the made-up hospital, `tiny:` models of the data set that the config names (tiny/build.py). An asset
depends on its recipe alone (phantom.config.Recipe): its builder gets nothing else, one CPU
thread and a seeded generator, so it ends in the same bytes whatever else a run's settings say and whoever else builds.
It is written beside its place and renamed when complete. This module knows no builder: assets.py has all of them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from config import Config
from formats.files import inside, read_json
from phantom.config import Recipe
from running.folder import atomic_folder, lock, writing
from running.weights import check_model, check_open_clip, check_torch_file, loading, require

NAMES = ("data", "data_clean", "base", "base_pooled", "expert", "expert_noisy", "expert_50", "expert_100", "expert_150",
         "expert_200", "labeller")  # fmt: skip
TINY = ("tiny:base", "tiny:expert", "tiny:labeller")
Builders = Mapping[str, Callable[[Recipe, Path], object]]  # name -> function(recipe, folder to fill)


def recipe_of(cfg: Config, world: str = "phantom") -> Recipe:
    """What the assets of a run depend on: `assets_seed`, and the tables `phantom` and `assets` or `data` and `tiny`."""
    tables = (cfg.data, cfg.tiny) if world == "tiny" else (cfg.phantom, cfg.assets)
    return Recipe(*tables, cfg.assets_seed)


def asset_dir(cfg: Config, world: str = "phantom") -> Path:
    """The folder of these settings' assets: the same recipe shares it, others never mix with it. A data set is known by
    its texts and labels, wherever it lies."""
    parts = dataclasses.asdict(recipe_of(cfg, world))
    if world == "tiny":
        data, parts["data"] = cfg.data, [cfg.data.target, cfg.data.sft_split, cfg.data.val_split, cfg.data.limit]
        tables = [Path(data.path, name) for name in ("annotation.json", data.labels, "reports.csv") if name]
        parts["data"] += [hashlib.sha256(path.read_bytes()).hexdigest() for path in tables if path.is_file()]
    key = json.dumps(list(parts.values()), sort_keys=True)
    return Path(cfg.assets_dir) / f"{world}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def place_of(cfg: Config, name: str) -> Path:
    """The folder of the asset `name`, "base" (the phantom's) or "tiny:base"."""
    world, _, short = name.rpartition(":")
    return asset_dir(cfg, world or "phantom") / short


def resolve(cfg: Config, needs: Collection[str] = (), builders: Builders | None = None) -> Config:
    """Replace every `phantom:NAME` or `tiny:NAME` by its folder, which is built where it is missing and NAME is in
    `needs`, or what stands there before NAME's `_`: "expert" is all the experts.

    ValueError for a name that is none of NAMES, a path that leads out of its folder, and a folder that is damaged.
    """

    def place(value):
        if not str(value).startswith(("phantom:", "tiny:")):
            return value
        name, _, rest = value.removeprefix("phantom:").partition("/")
        if name not in NAMES + TINY:
            raise ValueError(f"{value}: unknown; known are {', '.join([*(f'phantom:{n}' for n in NAMES), *TINY])}")
        path, short = inside(place_of(cfg, name), rest, value), name.removeprefix("tiny:")
        if {short, short.split("_")[0]} & {*needs}:
            ensure(cfg, name, builders)
        return str(path)

    tables = {name: dataclasses.replace(table, **{key: place(value) for key, value in vars(table).items()})
              for name, table in vars(cfg).items() if name in ("data", "model", "scorers")}  # fmt: skip
    return dataclasses.replace(cfg, **tables)


def check_asset(folder: Path) -> None:
    """ValueError, one line, for an asset that is not whole: a file is missing, empty or cut off."""
    with loading(f"{folder} is damaged", "delete it, and it is built anew"):
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
            if folder.name == "labeller":
                check_torch_file(folder / "chexbert.pth")
            else:
                require(folder, "processor_config.json")


def ensure(cfg: Config, name: str, builders: Builders) -> Path:
    """Build asset `name` unless it is there; returns its folder. ValueError for one that is damaged."""
    folder = place_of(cfg, name)
    if folder.exists():
        check_asset(folder)
        return folder
    if name not in ("data", "labeller", *TINY):  # the labeller learns from texts of its own, `tiny:` from cfg.data
        ensure(cfg, "data", builders)
    with lock(folder.with_name(f"{folder.name}.lock"), wait=True):  # two processes may want the same asset
        if not folder.exists():
            print(f"building {folder}", flush=True)
            large, threads = name in ("data", "tiny:labeller"), torch.get_num_threads()
            size = 200_000_000 if large else 7_500_000  # with the defaults
            torch.set_num_threads(1)  # more would add up in another order, and end in other bits
            with writing(folder, size), atomic_folder(folder) as unfinished, torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.assets_seed)
                builders[name](recipe_of(cfg, name.rpartition(":")[0] or "phantom"), unfinished)
            torch.set_num_threads(threads)
    return folder
