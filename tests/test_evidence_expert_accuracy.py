"""How well an expert orders candidates, by hand."""

import json
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


def test_it_samples_a_group_of_each_study_and_keeps_each_experts_accuracy(tmp_path, monkeypatch):
    """The policy and the expert are stand-ins; a half blind expert is the same one with a large error."""
    studies = [Study(str(i), ["x.png"], "", "val", labels=["edema"]) for i in range(60)]
    cfg = expert_accuracy.AccuracyConfig(run=str(tmp_path), experts=("phantom:expert", "phantom:expert+9"))
    said = ["<think>no</think>Edema.", "Fracture on the left."] * (cfg.rollout.group_size // 2)
    right = torch.tensor([[1.0, 0.0] * (cfg.rollout.group_size // 2)])

    def similarity(images, ids, groups):
        assert groups[0][:2] == ["Edema.", "Fracture on the left."]
        return right.expand(len(ids), -1)

    for name, value in {
        "begin": lambda *_: cfg, "resolve": lambda cfg, needs: cfg, "load_studies": lambda data, split: studies,
        "one_policy": lambda run, name: (name, run / name / "adapter"), "load_policy": lambda cfg, adapter: (0, 0),
        "generate_split": lambda model, processor, studies, cfg, samples, what: [said[:samples] for _ in studies],
        "load_expert": lambda name: SimpleNamespace(similarity=similarity), "read_image": lambda path: path,
        "strip_tags": lambda text: text.removeprefix("<think>no</think>"),
    }.items():  # fmt: skip
        monkeypatch.setattr(expert_accuracy, name, value)
    expert_accuracy.main()
    first, second = (json.loads(expert_accuracy.accuracy_file(tmp_path, name).read_text()) for name in cfg.experts)
    assert first == {"value": 1, "lo": 1, "hi": 1} and 0.4 < second["value"] < 0.7
    assert expert_accuracy.accuracy_file(tmp_path, "a/b:c+0.1").name == "a_b_c+0.1.json"
    studies[0] = Study("0", ["x.png"], "", "val")
    with pytest.raises(SystemExit, match="has no exact labels"):
        expert_accuracy.main()
