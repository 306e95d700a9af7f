"""Paired comparison of evaluated policies over the same studies and seeds, with intervals over both.

    python evaluate.py --compare runs/phantom/stage1_continued runs/phantom/stage2           # one seed
    python evaluate.py --compare 'runs/seeds/*/stage1_continued' 'runs/seeds/*/valor'       # several, paired by seed

Per metric: the difference to the first policy, seed by seed, its mean over the seeds and a 95% percentile interval.
One bootstrap resample draws studies with replacement (the same ones for both policies and for every seed) and, where
there are several, seeds with replacement: a gain must hold over other patients *and* over other runs. An interval from
five seeds is rough; from one seed it says nothing about runs at all, and the output says so.
"""

import glob
from pathlib import Path
from textwrap import indent

import numpy as np

from evidence.metrics import METRICS, interval, resample
from evidence.protocols import NOTES
from evidence.tables import columns, draw, load_stats, read_result
from formats.files import read_jsonl

RESAMPLES = 2000
Runs = dict[int, dict[str, np.ndarray]]  # seed -> {"<row>/<family>": (n studies, k)}


def load_runs(pattern: str, split: str) -> tuple[Runs, dict]:
    """Statistics by seed of the evaluated policies that `pattern` names, and the settings they share.

    pattern: a stage's folder (`runs/phantom/stage2`), a run's (its stage2 is taken), or a glob of such folders.
    ValueError for what was not evaluated or is damaged, for a seed that occurs twice and for settings that differ.
    """
    place = Path(pattern)
    if glob.glob(str(place / "eval" / split)):  # a whole run
        place = place / "stage2"
    found = sorted(glob.glob(str(place.parent / "eval" / split / place.name / "results.json")))
    if not found:
        command = f"; first run: python evaluate.py --run {place.parent} --policy {place.name} --split {split}"
        named = place.name and not glob.has_magic(pattern)
        raise ValueError(f"--compare: '{pattern}' has no results on split '{split}'"
                         + (command if named else ": it matches no evaluated policy"))  # fmt: skip
    runs, shared = {}, None
    for path in map(Path, found):
        settings = read_result(path)["settings"]
        seed = settings.pop("seed")
        settings["ids"] = [row.get("id") for row in read_jsonl(path.with_name("reports.jsonl"))]
        shared = shared or settings
        if seed in runs:
            raise ValueError(f"--compare: {pattern}: seed {seed} occurs twice ({path.parent})")
        check_alike(path, settings, found[0], shared)
        runs[seed] = load_stats(path.with_name("stats.npz"), settings["n"])
    return runs, shared


def check_alike(name, settings: dict, other, others: dict) -> None:
    """ValueError when two evaluations differ in what they are of, or in how they were made."""
    for key in settings.keys() | others.keys():
        if settings.get(key) != others.get(key):
            raise ValueError(f"--compare: {name} was evaluated with another '{key}' than {other}")


def estimate(runs: Runs, key: str, minus: Runs | None = None) -> dict | None:
    """{"mean", "lo", "hi", "seeds": {seed: value}} of "<row>/<metric>", or of its paired difference to `minus`.

    None where the metric was not measured. Resamples without a value (no finding stated) are left out.
    """
    compared = [runs] if minus is None else [runs, minus]
    seeds = sorted(set.intersection(*(set(r) for r in compared)))
    row, metric = key.split("/")
    family, function = METRICS[metric]
    key = f"{row}/{family}"
    if not all(key in r[seed] for r in compared for seed in seeds):
        return None
    stats, rng = {(i, seed): r[seed][key] for i, r in enumerate(compared) for seed in seeds}, np.random.default_rng(0)
    drawn = resample(stats, RESAMPLES, rng)  # the same studies for all of them
    picks = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))  # which seeds
    each = {of: function(np.vstack([stats[of].sum(0), drawn[of]])) for of in stats}  # the data, then its resamples
    values = np.stack([each[0, seed] - each[1, seed] if minus else each[0, seed] for seed in seeds])  # (S, 1 + R)
    lo, hi = interval(np.take_along_axis(values[:, 1:].T, picks, axis=1).mean(axis=1))
    by_seed = dict(zip(seeds, values[:, 0].tolist(), strict=True))
    return {"mean": float(values[:, 0].mean()), "lo": lo, "hi": hi, "seeds": by_seed}


def spread(found: dict | None, factor: float, sign: str = "") -> str:
    """`31.9 [28.7, 34.9]`, or n/a where nothing was measured."""
    if found is None or found["mean"] is None or np.isnan(found["mean"]):
        return "n/a"
    mean, lo, hi = (f"{factor * found[name]:{sign}.1f}" for name in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"


def compare(patterns: tuple[str, ...], split: str) -> str:
    """The table of `--compare`: every later policy against the first. ValueError when they share no seed or study."""
    if len(patterns) < 2:
        raise ValueError("--compare needs two policies or more")
    (base, base_settings), *others = [load_runs(pattern, split) for pattern in patterns]
    blocks = []
    for pattern, (runs, settings) in zip(patterns[1:], others, strict=True):
        check_alike(pattern, settings, patterns[0], base_settings)
        blocks.append(f"{pattern}\n  minus {patterns[0]}\n{difference_table(runs, base, settings)}")
    return "\n\n".join(blocks)


def difference_table(runs: Runs, base: Runs, settings: dict) -> str:
    """Mean difference, 95% interval and every seed's difference, metric by metric."""
    seeds, lonely = sorted(runs.keys() & base.keys()), sorted(runs.keys() ^ base.keys())
    if not seeds:
        raise ValueError(f"--compare: no seed in common ({sorted(runs)} and {sorted(base)})")
    over = f"{settings['n']} studies of '{settings['split']}' and seeds {', '.join(map(str, seeds))}"
    lines = [f"paired over {over}; 95% bootstrap intervals over {'both' if len(seeds) > 1 else 'studies only'}"]
    if lonely:
        lines.append(f"left out, evaluated on one side only: seeds {', '.join(map(str, lonely))}")
    if len(seeds) == 1:
        lines.append("one seed: whether another run would show the same, this cannot say")
    body = []
    for column in columns("pairs"):
        found = estimate(runs, column.key, minus=base)
        if found is not None:
            clear = "*" if found["lo"] > 0 or found["hi"] < 0 else ""
            each = [f"{column.factor * value:+.1f}" for value in found["seeds"].values()]
            body.append([column.flat, spread(found, column.factor, "+"), clear, *each])
    table = draw(["", "mean [95% interval]", "", *(f"seed {seed}" for seed in seeds)], body)
    protocol = NOTES[settings["eval"].get("protocol", "raw")]
    return indent("\n".join([*lines, table, f"* the interval excludes 0; BLEU, ROUGE-L, METEOR {protocol}"]), "  ")
