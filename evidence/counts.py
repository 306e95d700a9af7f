"""Per-study counts of every arm and seed in one compressed file: all that the tables of a sweep are made of.

counts.npz holds "<arm>/<row>/<family>", (seeds, n studies, k) as metrics.collect counts them, in the smallest integers
that hold them; ROUGE-L, BERTScore and other fractions are float16. "settings" is JSON: seeds by arm, ids of the studies
and what the tables say beside numbers. The sweep makes its own tables from this file, so whoever recomputes them
(`python -m evidence.sweep --recompute results/counts.npz`) gets the same digits.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch

from evidence.compare import check_alike, load_runs
from evidence.expert_accuracy import accuracy_file
from evidence.metrics import METRICS
from evidence.protocols import NOTES
from evidence.statistics import Runs
from evidence.tables import columns
from formats.files import read_json, read_jsonl
from running.folder import write_bytes
from running.weights import check_zip


def write_counts(
    path: Path, root: Path, seeds: list[int], split: str, about: dict[str, str], assets: list[Path],
    experts: dict[str, str],
) -> None:  # fmt: skip
    """Collect a sweep's evaluated runs, a folder per seed in `root`: the base and the arms `about` {arm: what it is}.

    assets: the folders of small models, one a world. experts {arm: its expert}: their accuracy is kept where it was
    measured. ValueError for an arm without a result for any of the seeds.
    """
    keys, arms, shared = [column.key.split("/") for column in columns("pairs")], {}, None
    for arm in ["base", *about]:
        found, settings = load_runs(str(root / "*" / arm), split)
        shared = shared or settings
        check_alike(arm, settings, "base", shared)
        arms[arm] = {seed: found[seed] for seed in seeds if seed in found}
        if not arms[arm]:
            raise ValueError(f"{arm} has no result for any of the seeds {', '.join(map(str, seeds))}")
    arms["fixed_template"] = {
        seed: {name.replace("template/", "greedy/"): stats[name] for name in stats if name.startswith("template/")}
        for seed, stats in arms["base"].items()
    }
    wanted = {f"{row}/{METRICS[metric][0]}" for row, metric in keys}
    arrays = {f"{arm}/{name}": _small(np.stack([stats[name] for stats in runs.values()])) for arm, runs in arms.items()
              for name in sorted(wanted) if all(name in stats for stats in runs.values())}  # fmt: skip
    settings = {
        "seeds": {arm: list(runs) for arm, runs in arms.items()}, "about": about, "ids": shared["ids"],
        "split": shared["split"], "studies": shared["n"], "torch": torch.__version__,
        "protocol": NOTES[shared["eval"].get("protocol", "raw")],
        "assets": {f"{world.name}/{p.parent.name}": json.loads(p.read_text())
                   for world in assets for p in sorted(world.glob("*/quality.json"))},
        "kinds": kinds_of(shared["ids"], assets[0] / "data" / "truth.jsonl") if len(assets) == 1 else {},
        "accuracy": {arm: {seed: read_json(file)["value"] for seed in seeds
                           if (file := accuracy_file(root / str(seed), expert)).exists()}
                     for arm, expert in experts.items()},
    }  # fmt: skip
    file = io.BytesIO()
    np.savez_compressed(file, settings=np.array(json.dumps(settings)), **arrays)
    write_bytes(path, file.getbuffer())


def kinds_of(ids: list[str], exact: Path) -> dict[str, list[bool]]:
    """{kind of reference: whether each study has it}, of the phantom: nobody knows which real references are true."""
    if not exact.exists():
        return {}
    truth = {row["id"]: row for row in read_jsonl(exact)}
    pairs = [(set(truth[i]["stated"]), set(truth[i]["labels"])) for i in ids]
    return {"reference states exactly what the image shows": [stated == true for stated, true in pairs],
            "reference hallucinates": [bool(stated - true) for stated, true in pairs]}  # fmt: skip


def read_counts(path: Path) -> tuple[dict[str, Runs], dict]:
    """({arm: {seed: {"<row>/<family>": (n, k)}}}, settings) of `write_counts`' file; ValueError for a damaged one."""
    try:
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        settings = json.loads(str(arrays.pop("settings")))
        runs = {arm: {seed: {} for seed in seeds} for arm, seeds in settings["seeds"].items()}
        for name, values in arrays.items():
            arm, _, key = name.partition("/")
            for seed, of in zip(settings["seeds"][arm], values.astype(float), strict=True):
                runs[arm][seed][key] = of
        settings["accuracy"] = {arm: {int(seed): value for seed, value in found.items()}
                                for arm, found in settings.get("accuracy", {}).items()}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no file of counts ({error}); make it again by python -m evidence.sweep") from None
    return runs, settings


def _small(values: np.ndarray) -> np.ndarray:
    """Counts as the smallest unsigned integers that hold them, anything else as float16."""
    whole = values.min() >= 0 and (values == np.rint(values)).all()
    return values.astype(np.min_scalar_type(int(values.max())) if whole else np.float16)
