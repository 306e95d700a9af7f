"""The curves of a run for its page, as points of SVG, and its unusual updates."""

import itertools
import re
from statistics import fmean, median

import numpy as np

from evidence.group import Stage

# of metrics.jsonl: not the mean of r_vis, which is 1/2 whatever happens, nor that of the format twice
CURVES = r"(reward/(?!visual|format)|val/)|(kl|length|format_rate|entropy|spread/total)$"
SMOOTH, FAR = 9, 6  # updates in a running mean or median; median distances from it that make an update unusual
RULE = (f"KL or reward more than {FAR} times as far from the median of its {SMOOTH} neighbours as is usual in its "
        "stage; updates with the clinical reward, of another scale, are neighbours of each other alone.")  # fmt: skip


def pick(items: list, most: int) -> list:
    """At most `most` of the items, evenly spread, always with the first and the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


def charts(stages: list[Stage], groups: list[dict]) -> list[dict]:
    """A chart of 300 x 100 units for each number of CURVES: every stage's values and running mean, dots for groups."""
    updates, found = [row["k"] for stage in stages for row in stage.metrics], []
    first, last = min(updates, default=0), max(updates, default=1)
    keys = {key for stage in stages for row in stage.metrics for key in row if re.match(CURVES, key)}
    for key in sorted(keys, key=lambda key: (key.split("/")[0] != "reward", "total" not in key, key)):
        tables = [[(row["k"], row[key]) for row in stage.metrics if key in row] for stage in stages]
        low, high = (bound(y for table in tables for _, y in table) for bound in (min, max))

        def place(x: float, y: float = 0.0, low=low, high=high) -> tuple[float, float]:
            return round(300 * (x - first) / max(last - first, 1), 1), round(100 * (high - y) / ((high - low) or 1), 1)

        lines = []
        for table in tables:
            near = [table[max(0, i - SMOOTH // 2) : i + SMOOTH // 2 + 1] for i in range(len(table))]
            mean = [(x, fmean(y for _, y in some)) for (x, _), some in zip(table, near, strict=True)]
            paths = [[place(*point) for point in pick(some, 400)] for some in (table, mean)]
            lines.append([" ".join(f"{x} {y}" for x, y in path) for path in paths])
        dots = [(g, *place(g["k"], g["metrics"][key])) for g in groups if key in g["metrics"]]
        starts = {place(stage.metrics[0]["k"])[0]: stage.title for stage in stages}  # of two branches, the later name
        found.append({"key": key, "low": low, "high": high, "lines": lines, "dots": dots, "first": first, "last": last,
                      "starts": starts.items()})  # fmt: skip
    return found


def unusual(stages: list[Stage], groups: list[dict]) -> list[tuple[Stage, int, str, dict | None]]:
    """(stage, update, what is unusual by RULE, the recorded group nearest to it)."""
    found = []
    for stage, key, clinical in itertools.product(stages, ("kl", "reward/total"), (False, True)):
        some = [row for row in stage.metrics if key in row and ("reward/chexbert" in row) == clinical]
        near = [some[max(0, i - SMOOTH // 2) : i + SMOOTH // 2 + 1] for i in range(len(some))]
        off = [row[key] - median(x[key] for x in rows) for row, rows in zip(some, near, strict=True)]
        far, mine = FAR * median([abs(x) for x in off] or [0]), [g for g in groups if g["stage"] is stage]
        for k, value, x in ((row["k"], row[key], x) for row, x in zip(some, off, strict=True) if abs(x) > far > 0):
            group = min(mine, key=lambda g: abs(g["k"] - k), default=None)  # noqa: B023
            found.append((stage, k, f"{key} {value:.3f}, {x:+.3f} from the median around it", group))
    return sorted(found, key=lambda entry: entry[1])
