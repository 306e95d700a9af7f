"""Statistics over seeds and studies: every number by hand, and intervals that cover what they say."""

import math

import numpy as np
import pytest

from evidence import statistics
from evidence.metrics import TRUTH_KEYS
from evidence.statistics import estimate, holm, marks, seeds_needed, t_interval, trend


def truth(stated, hallucinated):
    """(n, 8) truth statistics of n studies."""
    table = np.zeros((len(stated), len(TRUTH_KEYS)))
    table[:, TRUTH_KEYS.index("stated")] = stated
    table[:, TRUTH_KEYS.index("hallucinated")] = hallucinated
    return {"greedy/truth": table}


def lengths(values):
    """(n, 2) statistics whose metric is the mean of `values`."""
    return {"greedy/length": np.stack([values, np.ones(len(values))], axis=1)}


def test_differences_by_hand():
    a = {0: truth([2, 2], [1, 1]), 1: truth([4, 4], [1, 1])}  # 2/4 = .5 and 2/8 = .25
    b = {0: truth([2, 2], [0, 1]), 1: truth([4, 4], [1, 2]), 5: truth([1, 1], [0, 0])}  # 1/4 = .25 and 3/8 = .375
    found = estimate(b, "greedy/hallucination_rate", minus=a)
    assert found["seeds"] == {0: pytest.approx(-0.25), 1: pytest.approx(0.125)}  # 5 is no pair
    assert found["mean"] == pytest.approx(-0.0625) and found["lo"] < -0.25 and found["hi"] > 0.125
    assert estimate({9: a[0]}, "greedy/hallucination_rate", minus=b) is None
    assert estimate(b, "sampled/hallucination_rate") is None


def test_the_seeds_part_by_hand():
    """1, 2, 3 on studies that make no difference: 2 +- 4.3027 / sqrt(3); p of t = 2 sqrt(3) at 2 degrees: .0742."""
    lo, hi, p = t_interval(np.array([[1.0] * 5, [2.0] * 5, [3.0] * 5]))
    assert (lo, hi) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-5) and p == pytest.approx(0.0742, abs=1e-4)


def test_the_studies_part_by_hand():
    """Seeds that are all alike leave a t interval over the studies, 1, 2, 3, 4: 2.5 +- 3.1824 sqrt(5 / 3 / 4); and no
    number of such seeds narrows it."""
    for seeds in (2, 7):
        found = estimate({seed: lengths([1.0, 2, 3, 4]) for seed in range(seeds)}, "greedy/length")
        assert (found["lo"], found["hi"]) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5)


def test_both_parts_by_hand():
    """Seeds 1, 2, 3: variance of the mean 1/3 at 2 degrees; studies that all seeds share: 5/12 at 3 degrees. Together
    3/4 at .75^2 / (1/18 + 25/432) = 4.9592 degrees, whose quantile is 2.57706."""
    found = estimate({s: lengths(np.array([1.0, 2, 3, 4]) + s - 1.5) for s in (0, 1, 2)}, "greedy/length")
    assert found["mean"] == 2 and list(found["seeds"].values()) == [1, 2, 3]
    assert found["hi"] - 2 == pytest.approx(2.57706 * math.sqrt(0.75), abs=1e-4)


def test_the_same_policy_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    runs = {s: truth(rng.integers(1, 5, 30), rng.integers(0, 2, 30)) for s in range(3)}
    found = estimate(runs, "greedy/hallucination_rate", minus=runs)
    assert (found["mean"], found["lo"], found["hi"], found["p"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("deviations", [(1, 0, 0.5), (0.5, 0.5, 0.5), (0, 1, 0.3), (0.1, 0.3, 0.1), (0, 0, 1)])
def test_five_seeds_cover_93_to_97_percent(deviations):
    """Paired differences of a known mean, from runs, studies that all seeds share, and the rest: deviations of a seed's
    mean over 40 studies. Each policy's own studies differ far more than the policies do."""
    rng, n, covered, times, (run, study, rest) = np.random.default_rng(0), 40, 0, 1200, deviations
    for _ in range(times):
        studies, before = rng.normal(0, study * n**0.5, n), rng.normal(50, 20, (5, n))
        change = 3.0 + rng.normal(0, run, (5, 1)) + studies + rng.normal(0, rest * n**0.5, (5, n))
        a, b = ({s: lengths(values[s]) for s in range(5)} for values in (before, before + change))
        found = estimate(b, "greedy/length", minus=a)
        covered += found["lo"] <= 3 <= found["hi"]
    assert 0.93 < covered / times < 0.97


def test_pairing_removes_what_the_studies_share():
    """Studies differ a lot, the policies by the same little in each: a paired interval is narrow, an unpaired not."""
    stated, wrong = np.full(200, 10), np.tile([0, 9], 100)
    for seeds in (1, 3):
        a, b = ({s: truth(stated, wrong + more) for s in range(seeds)} for more in (1, 0))
        paired = estimate(b, "greedy/hallucination_rate", minus=a)
        alone = estimate(b, "greedy/hallucination_rate")
        assert paired["hi"] - paired["lo"] < 1e-6 and paired["mean"] == pytest.approx(-0.1)
        assert alone["hi"] - alone["lo"] > 0.1


def test_one_seed_is_the_percentiles_of_resampled_studies():
    runs = {0: truth([1, 1, 1, 1], [0, 0, 1, 1])}
    draws = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), size=statistics.RESAMPLES)
    by_hand = draws[:, 2:].sum(axis=1) / 4
    found = estimate(runs, "greedy/hallucination_rate")
    assert [found["lo"], found["hi"]] == pytest.approx(np.percentile(by_hand, (2.5, 97.5))) and found["p"] is None


def test_a_study_without_which_nothing_is_stated_is_left_out():
    runs = {s: truth([4, 0, 0], [1 + s, 0, 0]) for s in range(2)}
    found = estimate(runs, "greedy/hallucination_rate")
    assert found["hi"] - found["mean"] == pytest.approx(12.7062 * 0.125, abs=1e-4)  # 1/4, 1/2: the seeds' part alone
    nothing = estimate({s: truth([0, 0], [0, 0]) for s in range(2)}, "greedy/hallucination_rate")
    assert math.isnan(nothing["mean"]) and math.isnan(nothing["lo"]) and math.isnan(nothing["p"])


def test_holm_by_hand():
    """Sorted .01, .03, .04: 3 x .01, 2 x .03, and not below it; at most 1; what was not measured counts nothing."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": None, "c": math.nan, "d": 0.7}) == {"a": 1, "d": 1}
    assert holm({"a": 0.02, "b": None}) == {"a": 0.02} and holm({}) == {}


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (2.0, 5)])
def test_seeds_for_80_percent_power_are_g_powers(effect, seeds):
    """"Difference between two dependent means", two-sided 5%, by G*Power 3.1; the effect in standard deviations."""
    assert seeds_needed([7.0, 9.0, 11.0], 2 * effect) == seeds


def test_seeds_needed_at_the_ends():
    assert seeds_needed([1.0, 1.0, 1.0], 3) == seeds_needed([1.0, 1.1, 0.9], 300) == 2
    assert seeds_needed([0.0, 1.0, 2.0], 0.01) is seeds_needed([1.0], 3) is seeds_needed([1.0, 2.0], 0) is None


ROW = {"row": "a", "hypothesis": "h", "metric": "greedy/length", "minus": "z", "degree": 1, "holds_if": "above 0"}


def on_a_line(values):
    """{arm: {seed: lengths}} of {arm: a value of each seed}, alike in four studies."""
    return {arm: {s: lengths([value] * 4) for s, value in enumerate(of)} for arm, of in values.items()}


def test_a_slope_and_its_threshold_by_hand():
    """Gains of a and b over z, which says 10: -1, 1 and -1, 2 and -2, 2 at accuracies .6 and .8: slopes 10, 15, 20,
    so 15 +- 4.3027 x 5 / sqrt(3). Where a line is 0, its interval over the seeds has 0: Fieller's quadratic."""
    arms = on_a_line({"z": [10, 10, 10], "a": [9, 9, 8], "b": [11, 12, 12]})
    accuracy = {"a": dict.fromkeys(range(3), 0.6), "b": dict.fromkeys(range(3), 0.8)}
    found = trend(arms, ROW | {"arms": ["a", "b"]}, accuracy)
    assert found["found"]["mean"] == pytest.approx(15) and found["found"]["hi"] == pytest.approx(27.42, abs=0.01)
    assert [*found["found"]["seeds"].values()] == pytest.approx([10, 15, 20]) and found["verdict"] == "holds"
    slopes, heights = np.array([10, 15, 20]), np.array([-7, -10, -14])  # at 0: -1 - .6 x 10, ...
    assert found["line"] == pytest.approx([15, heights.mean()])
    assert found["places"] == pytest.approx({"a": 0.6, "b": 0.8})
    v, t = np.cov(slopes, heights) / 3, 4.30265  # (b x + a)^2 = t^2 var(b x + a)
    roots = np.roots([15**2 - t**2 * v[0, 0], 2 * (15 * heights.mean() - t**2 * v[0, 1]),
                      heights.mean() ** 2 - t**2 * v[1, 1]])  # fmt: skip
    assert sorted(found["zero"]) == pytest.approx(sorted(roots), abs=1e-3)
    assert found["zero"][0] < 31 / 45 < found["zero"][1]


def test_a_slope_that_may_be_nothing_locates_no_threshold():
    arms = on_a_line({"z": [10, 10], "a": [9, 11], "b": [11, 10]})
    found = trend(arms, ROW | {"arms": ["a", "b"], "at": [0.6, 0.8]}, {})
    assert found["zero"] is None and found["verdict"] == "open" and found["n_seeds"] == 2
    assert trend(arms, ROW | {"arms": ["a", "c"], "at": [0, 1]}, {}) is None  # c has not run
    assert trend(arms, ROW | {"arms": ["a", "b"]}, {"a": {0: 0.6, 1: 0.7}, "b": {0: 0.7}}) is None  # one seed measured
    assert trend({arm: {0: of[0]} for arm, of in arms.items()}, ROW | {"arms": ["a", "b"], "at": [0, 1]}, {}) is None


def test_a_peak_is_a_quadratic_term_below_0():
    """1 - (x - .5)^2 has -1, in each seed, and no threshold."""
    at = [0, 0.1, 0.5, 1]
    arms = on_a_line({"z": [5, 7]} | {f"x{x}": [6 - (x - 0.5) ** 2, 8 - (x - 0.5) ** 2] for x in at})
    row = ROW | {"arms": [f"x{x}" for x in at], "at": at, "degree": 2, "holds_if": "below 0"}
    found = trend(arms, row, {})
    assert found["line"] == pytest.approx([-1, 1, 0.75]) and found["verdict"] == "holds" and found["zero"] is None


def test_marks():
    def of(lo, hi):
        return marks({"lo": lo, "hi": hi}, 0.03)

    assert (of(0.01, 0.05), of(-0.05, -0.01), of(-0.02, 0.02), of(0.01, 0.02)) == ("*", "*", "=", "*=")
    assert of(-0.01, 0.03) == of(math.nan, math.nan) == marks({"lo": -0.01, "hi": 0.01}, 0) == ""
