"""How well an expert orders candidates, by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import Study
from evidence import expert_accuracy


def test_pairs_by_hand():
    """Of three candidates with truths 0, .5, .5 two pairs differ: one is ordered right, one is a tie."""
    found = expert_accuracy.ordered_pairs(np.array([[0.1, 0.2, 0.1], [3.0, 2.0, 1.0]]), np.array([[0, 0.5, 0.5]] * 2))
    assert found.tolist() == [[1.5, 2], [0, 2]]
    assert expert_accuracy.ordered_pairs(np.ones((1, 3)), np.ones((1, 3))).tolist() == [[0, 0]]


def test_an_expert_that_knows_is_always_right_and_a_blind_one_is_at_chance(monkeypatch):
    monkeypatch.setattr(expert_accuracy, "read_image", lambda path: path)
    labels = [["edema"], ["effusion_left"]] * 40
    studies = [Study(str(i), ["x.png"], "", "val", labels=known) for i, known in enumerate(labels)]
    groups = [["Edema.", "Left effusion.", "Right effusion. Edema.", "Edema. Left effusion."] for _ in studies]

    def knows(images, ids, groups):
        f1 = expert_accuracy.f1
        return torch.tensor([[f1(expert_accuracy.truth_counts(text, labels[int(i)])) for text in group]
                             for i, group in zip(ids, groups, strict=True)])  # fmt: skip

    assert expert_accuracy.accuracy(knows, studies, groups) == {"value": 1, "lo": 1, "hi": 1}
    blind = expert_accuracy.accuracy(lambda images, ids, groups: torch.zeros(len(ids), 4), studies, groups)
    assert blind["value"] == 0.5


def test_without_candidates_it_says_what_makes_them(tmp_path, monkeypatch):
    cfg = expert_accuracy.AccuracyConfig(run=str(tmp_path))
    monkeypatch.setattr(expert_accuracy, "settings", lambda *_: cfg)
    monkeypatch.setattr(expert_accuracy, "resolve", lambda cfg, needs: SimpleNamespace(data=None))
    monkeypatch.setattr(expert_accuracy, "load_studies", lambda data, split: [Study("a", ["x"], "", "val")])
    with pytest.raises(SystemExit, match="no samples of study a: first evaluate.py --run .* --eval.samples 8"):
        expert_accuracy.main()
