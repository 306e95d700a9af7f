"""Paired comparison of evaluated policies over the same studies and seeds, with intervals over both.

    python evaluate.py --compare runs/phantom/stage1_continued runs/phantom/stage2           # one seed
    python evaluate.py --compare 'runs/seeds/*/stage1_continued' 'runs/seeds/*/stage2'       # several, paired by seed

Per metric: the difference to the first policy, seed by seed, its mean over the seeds and a 95% percentile interval.
One bootstrap resample draws studies with replacement (the same ones for both policies and for every seed) and, where
there are several, seeds with replacement: a gain must hold over other patients *and* over other runs. An interval from
five seeds is rough; from one seed it says nothing about runs at all, and the output says so.
"""

import glob
import json
from pathlib import Path

import numpy as np

from evidence.metrics import METRICS

RESAMPLES = 2000
# (metric, row of statistics, shown name, factor)
COMPARED = (
    ("bleu_4", "greedy", "BLEU-4", 100),
    ("rouge_l", "greedy", "ROUGE-L", 100),
    ("meteor", "greedy", "METEOR", 100),
    ("meteor_exact_stem", "greedy", "METEOR ex.+st.", 100),
    ("bertscore", "greedy", "BERTScore", 100),
    ("f1_micro", "greedy", "CheXbert F1", 100),
    ("radgraph_f1", "greedy", "RadGraph F1", 100),
    ("green", "greedy", "GREEN", 100),
    ("ratescore", "greedy", "RaTEScore", 100),
    ("sided_f1", "greedy", "sided F1", 100),
    ("hallucination_rate", "greedy", "hallucinated %", 100),
    ("omission_rate", "greedy", "omitted %", 100),
    ("wrong_side_rate", "greedy", "wrong side %", 100),
    ("format_rate", "greedy", "format %", 100),
    ("length", "greedy", "words", 1),
    ("sided_f1", "sampled", "sampled F1", 100),
    ("hallucination_rate", "sampled", "sampled halluc. %", 100),
)
Runs = dict[int, dict[str, np.ndarray]]  # seed -> {"<row>/<family>": (n studies, k)}


def load_runs(pattern: str, split: str) -> tuple[Runs, dict]:
    """Statistics by seed of the evaluated policies that `pattern` names, and the settings they share.

    pattern: a stage's folder (`runs/phantom/stage2`), a run's (its last stage is taken), or a glob of such folders.
    ValueError for what was not evaluated, for a seed that occurs twice and for settings that differ.
    """
    place = Path(pattern)
    if glob.glob(str(place / "eval" / split)):  # a whole run
        place = place / "stage2"
    found = sorted(glob.glob(str(place.parent / "eval" / split / place.name / "results.json")))
    if not found:
        raise ValueError(
            f"--compare: {pattern} has no results on split '{split}'; first run: "
            f"python evaluate.py --run {place.parent} --policy {place.name} --split {split}"
        )
    runs, shared = {}, None
    for path in map(Path, found):
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        seed = settings.pop("seed")
        rows = path.with_name("reports.jsonl").read_text(encoding="utf-8").splitlines()
        settings["ids"] = [json.loads(row)["id"] for row in rows]
        if seed in runs:
            raise ValueError(f"--compare: {pattern}: seed {seed} occurs twice ({path.parent})")
        difference = [key for key in settings if shared is not None and settings[key] != shared.get(key)]
        if difference:
            raise ValueError(f"--compare: {path} was evaluated with another '{difference[0]}' than {found[0]}")
        with np.load(path.with_name("stats.npz"), allow_pickle=False) as arrays:
            runs[seed] = dict(arrays)
        shared = settings
    return runs, shared


def resample(n: int, seeds: int, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """(how often each study is drawn (R, n), which seeds are drawn (R, seeds)); the same for the same arguments."""
    rng = np.random.default_rng(0)
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples), rng.integers(seeds, size=(resamples, seeds))


def per_seed(runs: Runs, seeds: list[int], metric: str, row: str, draws: np.ndarray) -> np.ndarray:
    """(seeds, R) values of a metric over each drawing of studies; draws (R, n). All ones: the metric itself."""
    family, function = METRICS[metric]
    return np.stack([function(draws @ runs[seed][f"{row}/{family}"]) for seed in seeds])


def estimate(runs: Runs, metric: str, row: str, minus: Runs | None = None) -> dict | None:
    """{"mean", "lo", "hi", "seeds": {seed: value}} of a metric, or of its paired difference to `minus`.

    None where the metric was not measured. Resamples without a value (no finding stated) are left out.
    """
    compared = [runs] if minus is None else [runs, minus]
    seeds = sorted(set.intersection(*(set(r) for r in compared)))
    key = f"{row}/{METRICS[metric][0]}"
    if not all(key in r[seed] for r in compared for seed in seeds):
        return None
    n = len(runs[seeds[0]][key])
    draws, picks = resample(n, len(seeds))
    draws = np.concatenate([np.ones((1, n), dtype=int), draws])  # the first "resample" is the data itself
    values = per_seed(runs, seeds, metric, row, draws)  # (S, 1 + R)
    if minus is not None:
        values = values - per_seed(minus, seeds, metric, row, draws)
    drawn = np.take_along_axis(values[:, 1:].T, picks, axis=1).mean(axis=1)  # (R,)
    drawn = drawn[~np.isnan(drawn)]
    lo, hi = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (np.nan, np.nan)
    shown = {seed: float(value) for seed, value in zip(seeds, values[:, 0], strict=True)}
    return {"mean": float(values[:, 0].mean()), "lo": float(lo), "hi": float(hi), "seeds": shown}


def compare(patterns: tuple[str, ...], split: str) -> str:
    """The table of `--compare`: every later policy against the first. ValueError when they share no seed or study."""
    if len(patterns) < 2:
        raise ValueError("--compare needs two policies or more")
    (base, base_settings), *others = [load_runs(pattern, split) for pattern in patterns]
    blocks = []
    for pattern, (runs, settings) in zip(patterns[1:], others, strict=True):
        difference = [key for key in settings if settings[key] != base_settings.get(key)]
        if difference:
            raise ValueError(f"--compare: {pattern} and {patterns[0]} were evaluated with another '{difference[0]}'")
        blocks.append(f"{pattern}\n  minus {patterns[0]}\n{difference_table(runs, base, settings)}")
    return "\n\n".join(blocks)


def difference_table(runs: Runs, base: Runs, settings: dict) -> str:
    """Mean difference, 95% interval and every seed's difference, metric by metric."""
    seeds, lonely = sorted(runs.keys() & base.keys()), sorted(runs.keys() ^ base.keys())
    if not seeds:
        raise ValueError(f"--compare: no seed in common ({sorted(runs)} and {sorted(base)})")
    over = f"{settings['n']} studies of '{settings['split']}' and seeds {', '.join(map(str, seeds))}"
    lines = [f"  paired over {over}; 95% bootstrap intervals over {'both' if len(seeds) > 1 else 'studies only'}"]
    if lonely:
        lines.append(f"  left out, evaluated on one side only: seeds {', '.join(map(str, lonely))}")
    if len(seeds) == 1:
        lines.append("  one seed: whether another run would show the same, this cannot say")
    lines.append(f"  {'':<18}{'mean':>7}  {'95% interval':<16}each seed")
    for metric, row, name, factor in COMPARED:
        found = estimate(runs, metric, row, minus=base)
        if found is not None:
            interval = f"[{factor * found['lo']:+.1f}, {factor * found['hi']:+.1f}]"
            each = "  ".join(f"{factor * value:+.1f}" for value in found["seeds"].values())
            clear = "*" if found["lo"] > 0 or found["hi"] < 0 else " "
            lines.append(f"  {name:<18}{factor * found['mean']:>+7.1f}{clear} {interval:<16}{each}")
    return "\n".join([*lines, "  * the interval excludes 0"])
