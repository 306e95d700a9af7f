"""Paired comparison: pairing by seed and study, what the table says, what is refused."""

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


def test_the_table_shows_every_seed_and_the_sign(tmp_path):
    for seed, (before, after) in {0: (5, 3), 1: (6, 5), 4: (4, 2)}.items():
        write(tmp_path, seed, "without", [10] * 8, [before] * 8)
        write(tmp_path, seed, "with", [10] * 8, [after] * 8)
    write(tmp_path, 9, "without", [10] * 8, [5] * 8)
    table = compare.compare((f"{tmp_path}/*/without", f"{tmp_path}/*/with"), "test")
    [row] = [line.split() for line in table.splitlines() if line.startswith("  halluc.")]
    # -20, -10, -20: deviation 5.7735, mean -16.7 +- 4.3027 x 5.7735 / sqrt(3)
    assert row == ["halluc.", "%", "-16.7", "[-31.0,", "-2.3]", "*", "-20.0", "-10.0", "-20.0"]
    assert "seeds 0, 1, 4;" in table and "t over both" in table and "on one side only: seeds 9" in table
    one = compare.compare((f"{tmp_path}/0/without", f"{tmp_path}/0/with"), "test")
    assert "over studies only" in one and "one seed" in one and "Holm" not in one


def test_primary_metrics_come_first_with_holms_p(tmp_path):
    """Sampled F1 of 10 stated, 10 true, c correct: c / 10. Differences .1, .1, .2: t = 4, p = .0572, and a
    deviation of 5.77 points needs 32 seeds for the margin of 3."""
    for seed, correct in enumerate((1, 1, 2)):
        for name, more in (("without", 0), ("with", correct)):
            write(tmp_path, seed, name, [10] * 4, [5] * 4)
            stats = {"sampled/truth": np.array([[10, 5, 10, 5, 0, 5 + more, 0, 0]] * 4, float)}
            np.savez(tmp_path / f"{seed}/eval/test/{name}/stats.npz", **stats)
    lines = compare.compare((f"{tmp_path}/*/without", f"{tmp_path}/*/with"), "test").splitlines()
    heads = next(i for i, line in enumerate(lines) if "Holm's p" in line)
    assert lines[heads + 1].split()[:6] == ["sampl.", "F1", "+13.3", "[-1.0,", "+27.7]", "0.057"]
    assert lines[heads + 1].split()[6:9] == ["32", "for", "3"]


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


def test_each_seed_may_have_a_world_of_its_own_but_both_sides_the_same(tmp_path):
    for seed in (1, 2):
        for name in ("without", "with"):
            own = {"data": {"path": f"assets/phantom-0000000{seed}/data"}}
            write(tmp_path, seed, name, [10] * 8, [5] * 8, **own)
    assert "seeds 1, 2;" in compare.compare((f"{tmp_path}/*/without", f"{tmp_path}/*/with"), "test")
    write(tmp_path, 1, "elsewhere", [10] * 8, [5] * 8, data={"path": "assets/phantom-00000002/data"})
    with pytest.raises(ValueError, match="elsewhere was evaluated with other small models than .* \\(seed 1\\)"):
        compare.compare((f"{tmp_path}/*/without", f"{tmp_path}/*/elsewhere"), "test")
