"""Where the phantom's assets lie, and that each is built once: `phantom:base` in a config means "that folder".

An asset depends on its recipe alone (phantom.config.Recipe): its builder gets nothing else, one CPU thread and a seeded
generator. So the same recipe ends in the same bytes, whatever else the run's settings say and whoever else builds.
A build is written beside its place and renamed when complete: an interrupted one starts anew and ends the same.

This module knows no builder: who wants an asset built brings them along. assets.py has all of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from config import Config
from phantom.config import Recipe
from running.folder import atomic_folder, lock

Name = Literal["data", "base", "expert", "expert_noisy", "labeller"]
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
    """Replace every `phantom:NAME` path by its folder, which is built where it is missing and NAME is in `needs`.

    ValueError for a name that is none of NAMES.
    """

    def place(value):
        if not str(value).startswith("phantom:"):
            return value
        name, _, inside = value.removeprefix("phantom:").partition("/")
        if name not in NAMES:
            raise ValueError(f"{value}: unknown; known are {', '.join(f'phantom:{known}' for known in NAMES)}")
        if name in needs:
            ensure(cfg, name, builders)
        return str(asset_dir(cfg) / name / inside)

    def placed(table):
        return dataclasses.replace(table, **{key: place(value) for key, value in vars(table).items()})

    return dataclasses.replace(cfg, data=placed(cfg.data), model=placed(cfg.model), scorers=placed(cfg.scorers))


def ensure(cfg: Config, name: Name, builders: Builders) -> Path:
    """Build asset `name` unless it is there; returns its folder."""
    folder = asset_dir(cfg) / name
    if folder.exists():
        return folder
    if name not in ("data", "labeller"):  # the labeller learns from texts of its own
        ensure(cfg, "data", builders)
    with lock(folder.with_name(f"{name}.lock"), wait=True):  # two processes may want the same asset
        if not folder.exists():
            print(f"building {folder}", flush=True)
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # more would add up in another order, and end in other bits
            with atomic_folder(folder) as unfinished, torch.random.fork_rng(devices=[]):
                torch.manual_seed(cfg.assets_seed)
                builders[name](recipe_of(cfg), unfinished)
            torch.set_num_threads(threads)
    return folder
