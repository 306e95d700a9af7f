"""Paired comparison: values by hand, pairing by seed and study, intervals that know what they rest on."""

import io
import json
import pickle

import numpy as np
import pytest

from evidence import compare
from evidence.metrics import TRUTH_KEYS


def truth(stated, hallucinated):
    """(n, 8) truth statistics of n studies."""
    table = np.zeros((len(stated), len(TRUTH_KEYS)))
    table[:, TRUTH_KEYS.index("stated")] = stated
    table[:, TRUTH_KEYS.index("hallucinated")] = hallucinated
    return {"greedy/truth": table}


def write(root, seed, name, stated, hallucinated, ids=None, **settings):
    folder = root / str(seed) / "eval" / "test" / name
    folder.mkdir(parents=True)
    np.savez(folder / "stats.npz", **truth(stated, hallucinated))
    settings = {"seed": seed, "n": len(stated), "split": "test"} | settings
    (folder / "results.json").write_text(json.dumps({"settings": settings}))
    ids = ids or [str(i) for i in range(len(stated))]
    (folder / "reports.jsonl").write_text("".join(json.dumps({"id": i}) + "\n" for i in ids))


def test_differences_by_hand():
    a = {0: truth([2, 2], [1, 1]), 1: truth([4, 4], [1, 1])}  # 2/4 = .5 and 2/8 = .25
    b = {0: truth([2, 2], [0, 1]), 1: truth([4, 4], [1, 2])}  # 1/4 = .25 and 3/8 = .375
    found = compare.estimate(b, "greedy/hallucination_rate", minus=a)
    assert found["seeds"] == {0: pytest.approx(-0.25), 1: pytest.approx(0.125)}
    assert found["mean"] == pytest.approx(-0.0625)
    assert found["lo"] <= -0.25 and found["hi"] >= 0.125  # a resample may hold one seed alone


def test_the_same_policy_differs_by_exactly_nothing():
    rng = np.random.default_rng(0)
    runs = {s: truth(rng.integers(1, 5, 30), rng.integers(0, 2, 30)) for s in range(3)}
    found = compare.estimate(runs, "greedy/hallucination_rate", minus=runs)
    assert (found["mean"], found["lo"], found["hi"]) == (0, 0, 0)


def test_pairing_removes_what_the_studies_share():
    """Studies differ a lot, the policies by the same little in each: a paired interval is narrow, an unpaired not."""
    stated, wrong = np.full(200, 10), np.tile([0, 9], 100)
    a, b = {0: truth(stated, wrong + 1)}, {0: truth(stated, wrong)}
    paired = compare.estimate(b, "greedy/hallucination_rate", minus=a)
    alone = compare.estimate(b, "greedy/hallucination_rate")
    assert paired["hi"] - paired["lo"] < 1e-9 and paired["mean"] == pytest.approx(-0.1)
    assert alone["hi"] - alone["lo"] > 0.1


def test_seeds_that_disagree_widen_the_interval():
    same = {s: truth([10] * 50, [3, 4] * 25) for s in range(4)}
    mixed = {s: truth([10] * 50, [3 + 2 * (s % 2), 4 + 2 * (s % 2)] * 25) for s in range(4)}
    widths = [found["hi"] - found["lo"] for found in
              (compare.estimate(runs, "greedy/hallucination_rate") for runs in (same, mixed))]  # fmt: skip
    assert widths[1] > 5 * widths[0]


def test_the_bootstrap_is_the_percentiles_of_its_resamples():
    runs = {0: truth([1, 1, 1, 1], [0, 0, 1, 1])}
    draws = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), size=compare.RESAMPLES)
    by_hand = draws[:, 2:].sum(axis=1) / 4
    found = compare.estimate(runs, "greedy/hallucination_rate")
    assert [found["lo"], found["hi"]] == pytest.approx(np.percentile(by_hand, (2.5, 97.5)))


def test_the_table_shows_every_seed_and_the_sign(tmp_path):
    for seed, (before, after) in {0: (5, 3), 1: (6, 5), 4: (4, 1)}.items():
        write(tmp_path, seed, "without", [10] * 8, [before] * 8)
        write(tmp_path, seed, "with", [10] * 8, [after] * 8)
    write(tmp_path, 9, "without", [10] * 8, [5] * 8)
    table = compare.compare((f"{tmp_path}/*/without", f"{tmp_path}/*/with"), "test")
    [row] = [line.split() for line in table.splitlines() if "halluc." in line]
    assert row[:3] == ["halluc.", "%", "-20.0"] and row[5] == "*" and row[-3:] == ["-20.0", "-10.0", "-30.0"]
    assert "seeds 0, 1, 4" in table and "on one side only: seeds 9" in table
    one = compare.compare((f"{tmp_path}/0/without", f"{tmp_path}/0/with"), "test")
    assert "over studies only" in one and "one seed" in one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["b", "a"]}, "another 'ids'"),
        ({"split": "val"}, "another 'split'"),
        ({"seed": 3}, "no seed in common"),
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path, change, message):
    write(tmp_path / "x", 0, "a", [1, 1], [0, 0], ids=["a", "b"])
    change = {"ids": ["a", "b"]} | change
    write(tmp_path / "y", change.pop("seed", 0), "b", [1, 1], [0, 0], **change)
    with pytest.raises(ValueError, match=message):
        compare.compare((f"{tmp_path}/x/*/a", f"{tmp_path}/y/*/b"), "test")


def test_a_policy_that_was_not_evaluated_is_named_with_the_command(tmp_path):
    with pytest.raises(ValueError, match="python evaluate.py --run .* --policy stage2 --split test"):
        compare.load_runs(str(tmp_path / "stage2"), "test")
    with pytest.raises(ValueError, match="two policies"):
        compare.compare(("a",), "test")


@pytest.mark.parametrize("pattern", ["runs/none*/stage2", "", "."])
def test_a_pattern_that_matches_nothing_is_one_line_without_a_command_to_run(tmp_path, monkeypatch, pattern):
    """An empty one must not read the table of all policies that may lie in the folder."""
    (tmp_path / "eval" / "test").mkdir(parents=True)
    (tmp_path / "eval" / "test" / "results.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "eval" if pattern else tmp_path)
    with pytest.raises(ValueError, match="has no results") as stop:
        compare.load_runs(pattern, "test")
    assert "\n" not in str(stop.value) and ("*" not in pattern or "it matches no evaluated policy" in str(stop.value))


def npz(**arrays):
    np.savez(file := io.BytesIO(), **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("results.json", text) for text in (b"", b"{", b"[]", b"{}", b"[" * 3000, b'{"settings": 1}', b"\xff")),
        ("results.json", b'{"settings": {"seed": "0", "n": 2, "split": "test"}}'),
        ("results.json", b'{"settings": {"seed": [0], "n": 2, "split": "test"}}'),
        *(("reports.jsonl", text) for text in (b"{", b"[]\n", b"\xff")),
        *(("stats.npz", content) for content in (b"", b"PK\x03\x04", npz(**truth([1, 1], [0, 0]))[:-50])),
        ("stats.npz", pickle.dumps(truth([1, 1], [0, 0]))),
        ("stats.npz", npz(**{"greedy/truth": np.array([{}, {}])})),  # objects are pickled
        ("stats.npz", npz(**{"greedy/truth": np.ones((2, 7))})),  # of another version
        ("stats.npz", npz(**{"greedy/truth": np.ones((3, 8))})),  # of other studies
    ],
)
def test_damaged_files_are_one_line_with_the_path(tmp_path, name, content):
    for policy in "ab":
        write(tmp_path, 0, policy, [1, 1], [0, 0])
    path = tmp_path / "0/eval/test/b" / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name) as stop:
        compare.compare((f"{tmp_path}/0/a", f"{tmp_path}/0/b"), "test")
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)
