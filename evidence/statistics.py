"""Differences over seeds and studies: intervals, p-values, Holm, seeds needed; --compare and the sweep alike.

All seeds are judged on the same studies: the value (mostly a paired difference) of seed s on study i is, about, mean +
run s + study i + rest. Its interval is for other runs *and* other studies. The mean's variance: the seeds' variance by
their number, which holds runs and rest, and the part of the studies, which all seeds share: their mean jackknife
covariance [Efron & Stein 1981]. Student's t with degrees of freedom from both parts [Satterthwaite 1946]. A test
simulates the coverage, 94 to 96% at five seeds (t over the seeds alone: 14% where studies decide). One seed: a
percentile bootstrap over studies, which says nothing of other runs.
"""

import math
import tomllib
from collections.abc import Callable
from functools import reduce
from itertools import accumulate
from pathlib import Path

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

from evidence.metrics import METRICS, interval, resample
from formats.files import read_text

Runs = dict[int, dict[str, np.ndarray]]  # seed -> {"<row>/<family>": (n studies, k)}


def read_plan(path: str = "") -> dict:
    """A plan, the phantom's where no path is given: what each comparison and trend of a sweep is for; its "margins"
    {"<row>/<metric>": fraction} are of the primary metrics. ValueError for a file that is no plan."""
    file = Path(path or Path(__file__).with_name("plan.toml"))
    try:
        plan = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not TOML ({error})") from None
    if lacking := [name for name in ("margins", "comparison") if name not in plan]:
        raise ValueError(f"{file}: no plan, as it has no table {lacking[0]!r}")
    return plan


PLAN = read_plan()
MARGINS: dict[str, float] = PLAN["margins"]
RESAMPLES = 2000
MOST_SEEDS = 999
PLACES = np.linspace(0, 1, 1001).tolist()  # pair accuracies at which a threshold is looked for


def estimate(runs: Runs, key: str, minus: Runs | None = None) -> dict | None:
    """{"mean", "lo", "hi", "p", "seeds": {seed: value}} of "<row>/<metric>", or of its paired difference to `minus`.

    lo, hi: 95%. p: two-sided, of a mean of 0; None with one seed. None where no seed, or not each, has it measured.
    """
    compared = [runs] if minus is None else [runs, minus]
    seeds = sorted(set.intersection(*map(set, compared)))
    values = [measured(of, seeds, key, left_out) for of in compared]
    if any(of is None for of in values):
        return None
    if len(seeds) > 1:
        return summary(reduce(np.subtract, values), seeds)
    drawn = [measured(of, seeds, key, lambda x: resample({0: x}, RESAMPLES, np.random.default_rng(0))[0])
             for of in compared]  # fmt: skip
    return summary(reduce(np.subtract, values), seeds, (*interval(reduce(np.subtract, drawn)[0]), None))


def measured(runs: Runs, seeds: list[int], key: str, sums: Callable) -> np.ndarray | None:
    """(S, m): "<row>/<metric>" of the m `sums` (m, k) that a seed's counts (n, k) give; None where there is no seed, or
    one has no such counts."""
    row, metric = key.split("/")
    family, function = METRICS[metric]
    stats = [runs[seed].get(f"{row}/{family}") for seed in seeds]
    return None if not stats or any(of is None for of in stats) else function(np.stack([*map(sums, stats)]))


def left_out(counts: np.ndarray) -> np.ndarray:
    """(n, k) -> (1 + n, k): the sums over all studies, then without each of them."""
    return np.vstack([counts.sum(0), counts.sum(0) - counts])


def summary(values: np.ndarray, seeds: list[int], span: tuple | None = None) -> dict:
    """What `estimate` gives, of values (S, 1 + n) as t_interval takes them; span: another (lo, hi, p) than its."""
    lo, hi, p = span or t_interval(values)
    by_seed = dict(zip(seeds, values[:, 0].tolist(), strict=True))
    return {"mean": float(values[:, 0].mean()), "lo": lo, "hi": hi, "p": p, "seeds": by_seed}


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(lo, hi, p) of the mean of the S seeds' values; (S, 1 + n): of all studies, then without each of the n."""
    values, without = values[:, 0], values[:, 1:]
    without = without[:, ~np.isnan(without).any(axis=0)]  # a study without which nothing is stated
    (seeds, n), mean = without.shape, float(values.mean())
    shared = (n - 1) ** 2 / n * np.cov(without) if n > 1 else np.zeros((seeds, seeds))  # (S, S)
    studies = max(0.0, (shared.sum() - np.trace(shared)) / (seeds * (seeds - 1)))
    variance = (runs := values.var(ddof=1) / seeds) + studies
    if not variance:
        return mean, mean, float(mean == 0)
    freedom = variance**2 / (runs**2 / (seeds - 1) + studies**2 / max(1, n - 1))
    half = float(stdtrit(freedom, 0.975) * math.sqrt(variance))
    return mean - half, mean + half, float(2 * stdtr(freedom, -abs(mean) / math.sqrt(variance)))


def holm(p: dict) -> dict:
    """Holm's step-down adjusted p-values of a family of hypotheses [Holm 1979]; None and NaN are left out."""
    names = sorted((name for name, value in p.items() if value is not None and not math.isnan(value)), key=p.get)
    steps = [min(1.0, (len(names) - rank) * p[name]) for rank, name in enumerate(names)]
    return dict(zip(names, accumulate(steps, max), strict=True))


def seeds_needed(values: list[float], effect: float) -> int | None:
    """The fewest seeds with which a paired t test (two-sided, 5%) finds `effect` with 80% power where differences vary
    as these seeds' `values`: T is noncentral t [Cohen 1988, ch. 2]. None: above MOST_SEEDS, one value, or no effect.

    On the studies at hand: other studies may differ by more, and no number of seeds changes that.
    """
    if len(values) < 2 or not effect:
        return None
    spread = np.std(values, ddof=1)
    n = np.arange(2, MOST_SEEDS + 1)
    limit, away = stdtrit(n - 1, 0.975), np.minimum(37, np.sqrt(n) * effect / max(spread, 1e-12))
    power = 1 - nctdtr(n - 1, away, limit) + nctdtr(n - 1, away, -limit)
    enough = n[~(power < 0.8)]  # scipy's noncentral t is NaN far out, where the power is 1
    return int(enough[0]) if len(enough) else None


def marks(found: dict, margin: float) -> str:
    """`*` where the interval excludes 0, `=` where it lies inside the margin."""
    return "*" * (found["lo"] > 0 or found["hi"] < 0) + "=" * (-margin < found["lo"] and found["hi"] < margin)


def verdict(found: dict, claim: str, margin: float, p: float | None) -> str:
    """Whether a difference is "above 0", "below 0" or "equal" (inside the margin): holds, does not, or open.

    p: of `found`, adjusted where the metric is primary; None, of one seed, leaves all open.
    """
    inside, (lo, hi) = "=" in marks(found, margin), (found["lo"], found["hi"])
    if p is None or math.isnan(found["mean"]):
        return "open"
    if claim == "equal":
        return "holds" if inside else "does not" if lo > margin or hi < -margin else "open"
    lo, hi = {"above 0": (lo, hi), "below 0": (-hi, -lo)}[claim]
    return "holds" if lo > 0 and p < 0.05 else "does not" if hi < 0 or inside else "open"


def verdicts(arms: dict[str, Runs], plan: dict = PLAN) -> list[dict]:
    """A plan's comparisons of arms {name: runs}, each with "found" {metric: estimate}, "p" of the primary metrics
    after Holm, "seeds" compared, and "verdict": it holds where all its criteria do, and does not where one does not."""
    judged, margins = [], plan["margins"]
    for row in plan["comparison"]:
        first, second = (arms.get(arm, {}) for arm in row["arms"])
        found = {key: of for key in {**margins, **row["holds_if"]} if (of := estimate(first, key, minus=second))}
        p = holm({key: found[key]["p"] for key in margins if key in found})
        said = {verdict(found[key], claim, margins.get(key, 0), p.get(key, found[key]["p"])) if key in found
                else "not measured" for key, claim in row["holds_if"].items()}  # fmt: skip
        worst, seeds = min(said, key=("not measured", "does not", "open", "holds").index), first.keys() & second.keys()
        judged.append(row | {"found": found, "p": p, "seeds": len(seeds), "primary": list(margins),
                             "verdict": worst if first and second else "not run"})  # fmt: skip
    return judged


def trend(arms: dict[str, Runs], row: dict, accuracy: dict[str, dict[int, float]]) -> dict | None:
    """A plan's [[trend]]: the gain of its arms over `minus` as a polynomial of where they stand, fitted seed by seed.

    They stand at row["at"], or at the measured `accuracy` of their experts {arm: {seed: share}}. "found": estimate of
    the highest coefficient; "line": mean coefficients, the highest first; "places" {arm: mean}. Of a line, "zero": (lo,
    hi), the places at which the gain's interval has 0, Fieller's set [1954] by inverting the test; None where the
    slope's interval has 0, as the set is then unbounded. None where an arm has not run, or two seeds have not all.
    """
    wanted = [arms.get(name, {}) for name in [*row["arms"], row["minus"]]]
    placed = [] if "at" in row else [accuracy.get(name, {}) for name in row["arms"]]
    seeds = sorted(set.intersection(*map(set, wanted + placed)))
    values = [measured(runs, seeds, row["metric"], left_out) for runs in wanted]
    if len(seeds) < 2 or any(of is None for of in values):
        return None
    at = row.get("at") or [[of[seed] for seed in seeds] for of in placed]
    x = np.array([np.broadcast_to(place, len(seeds)) for place in at], float)  # (A, S)
    gains = np.stack(values[:-1]) - values[-1]  # (A, S, 1 + n)
    fits = np.stack([np.linalg.pinv(np.vander(of, row["degree"] + 1)) for of in x.T])  # (S, degree + 1, A)
    powers = np.einsum("sda,asn->dsn", fits, gains)  # the coefficients, with all studies and without each
    found, zero = summary(powers[0], seeds), None
    if row["degree"] == 1 and (found["lo"] > 0 or found["hi"] < 0):
        tried = {place: t_interval(powers[0] * place + powers[1]) for place in PLACES}
        zero = [place for place, (lo, hi, _) in tried.items() if lo <= 0 <= hi]
    return row | {"found": found, "line": powers[:, :, 0].mean(1).tolist(), "zero": zero and (zero[0], zero[-1]),
                  "places": dict(zip(row["arms"], x.mean(1).tolist(), strict=True)), "n_seeds": len(seeds),
                  "verdict": verdict(found, row["holds_if"], 0, found["p"])}  # fmt: skip


def spread(found: dict | None, factor: float, sign: str = "") -> str:
    """`31.9 [28.7, 34.9]`, or n/a where nothing was measured."""
    if found is None or found["mean"] is None or np.isnan(found["mean"]):
        return "n/a"
    mean, lo, hi = (f"{factor * found[name]:{sign}.1f}" for name in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"
