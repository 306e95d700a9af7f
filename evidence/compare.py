"""Paired comparison of evaluated policies over the same studies and seeds.

    python evaluate.py --compare runs/phantom/stage1_continued runs/phantom/stage2           # one seed
    python evaluate.py --compare 'runs/seeds/*/stage1_continued' 'runs/seeds/*/valor'       # several, paired by seed

Per metric: the difference to the first policy, its mean over the seeds with a 95% interval, and every seed's. What the
interval rests on, and the p-values: statistics.py. The primary metrics and the margins of "equal": plan.toml.
"""

import glob
import json
import re
from pathlib import Path
from textwrap import indent

from evidence.protocols import NOTES
from evidence.statistics import MARGINS, Runs, estimate, holm, marks, seeds_needed, spread
from evidence.tables import columns, draw, read_policy
from formats.files import read_jsonl

WORLD = re.compile(r"\b(?:phantom|tiny)-[0-9a-f]{8}\b")  # phantom.cache.asset_dir


def load_runs(pattern: str, split: str) -> tuple[Runs, dict]:
    """Statistics by seed of the evaluated policies that `pattern` names, and the settings they share; "worlds": the
    folders of built assets that each seed used, which may be each seed's own.

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
    runs, worlds, shared = {}, {}, None
    for path in map(Path, found):
        settings, stats = read_policy(path)
        seed = settings.pop("seed")
        settings["ids"] = [row.get("id") for row in read_jsonl(path.with_name("reports.jsonl"))]
        spill = path.parents[2] / "spill" / path.parent.name / "results.json"
        if spill.exists():
            settings["spill"], more = read_policy(spill)
            settings["spill"]["seed"] = None
            stats |= more
        text = json.dumps(settings)
        worlds[seed], settings = sorted({*WORLD.findall(text)}), json.loads(WORLD.sub("world", text))
        shared = shared or settings
        if seed in runs:
            raise ValueError(f"--compare: {pattern}: seed {seed} occurs twice ({path.parent})")
        check_alike(path, settings, found[0], shared)
        runs[seed] = stats
    return runs, shared | {"worlds": worlds}


def check_alike(name, settings: dict, other, others: dict) -> None:
    """ValueError when two evaluations differ in what they are of, or in how they were made."""
    for key in (settings.keys() | others.keys()) - {"spill", "worlds"} | settings.keys() & others.keys() - {"worlds"}:
        if settings.get(key) != others.get(key):
            raise ValueError(f"--compare: {name} was evaluated with another '{key}' than {other}")
    worlds = [each.get("worlds", {}) for each in (settings, others)]
    if apart := [seed for seed in worlds[0].keys() & worlds[1].keys() if worlds[0][seed] != worlds[1][seed]]:
        raise ValueError(f"--compare: {name} was evaluated with other small models than {other} (seed {apart[0]})")


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
    """Mean difference, 95% interval, Holm's p, the seeds that a test needs, and every seed, metric by metric."""
    seeds, lonely = sorted(runs.keys() & base.keys()), sorted(runs.keys() ^ base.keys())
    if not seeds:
        raise ValueError(f"--compare: no seed in common ({sorted(runs)} and {sorted(base)})")
    many = len(seeds) > 1
    lines = [f"paired over {settings['n']} studies of '{settings['split']}' and seeds {', '.join(map(str, seeds))}; "
             f"95% intervals, {'t over both' if many else 'bootstrap over studies only'}"]  # fmt: skip
    lines += [f"left out, evaluated on one side only: seeds {', '.join(map(str, lonely))}"] * bool(lonely)
    lines += ["one seed: whether another run would show the same, this cannot say"] * (not many)
    found = {column: of for column in columns("pairs") if (of := estimate(runs, column.key, minus=base))}
    adjusted = holm({column: found[column]["p"] for column in columns("primary") if column in found})
    body = []
    for column, each in found.items():
        margin, by_seed = MARGINS.get(column.key, 0), [*each["seeds"].values()]
        needed, shown = seeds_needed(by_seed, margin), f"{column.factor * margin:g}"
        tests = [f"{adjusted[column]:.3f}" if column in adjusted else "", f"{needed} for {shown}" if needed else ""]
        body.append([column.flat, spread(each, column.factor, "+"), marks(each, margin), *tests * many,
                     *(f"{column.factor * value:+.1f}" for value in by_seed)])  # fmt: skip
    heads = ["", "mean [95% interval]", "", *["Holm's p", "seeds"] * many, *(f"seed {seed}" for seed in seeds)]
    notes = ["* the interval excludes 0; = it lies inside the metric's margin: equal, as far as that goes"]
    notes += [f"Holm's p: over the {len(adjusted)} primary metrics, which come first; seeds: so many would find a "
              "difference as large as the margin with 80% power"] * many  # fmt: skip
    notes += [f"BLEU, ROUGE-L, METEOR {NOTES[settings['eval'].get('protocol', 'raw')]}"]
    return indent("\n".join([*lines, draw(heads, body), *notes]), "  ")
