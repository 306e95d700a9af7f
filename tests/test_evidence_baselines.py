"""The baselines without RL: by hand on texts, and each on a tiny run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import Config
from data import Study
from evidence import baselines
from evidence.metrics import stated_labels
from evidence.reader import truth_counts


def rng():
    return np.random.default_rng(0)


def test_the_majority_is_more_than_half_of_the_samples():
    samples = ["Edema. Left effusion.", "Edema. Right effusion.", "Left effusion. Cardiomegaly.", "No finding. Edema."]
    assert baselines.majority(samples, rng()) == ["edema"]  # left effusion: 2 of 4 is no majority
    assert baselines.majority(samples[:3], rng()) == ["edema", "effusion_left"]


def test_what_is_written_out_states_exactly_the_labels():
    labels = ["effusion_left", "edema", "fracture_right", "device"]
    text = baselines.write_out(labels, Config(), rng())
    counts = truth_counts(text, labels)
    assert counts["correct"] == 4 and counts["hallucinated"] == counts["omitted"] == 0
    assert stated_labels(text, rng=rng()) == {*labels}
    assert stated_labels("There is an effusion.", rng=rng()) <= {"effusion_left", "effusion_right"}


def test_retrieval_takes_the_most_similar_report(monkeypatch):
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}
    expert = SimpleNamespace(image_features=lambda images, ids: torch.tensor([vectors[i] for i in ids]),
                             text_features=lambda texts: torch.tensor([vectors[t] for t in texts]))  # fmt: skip
    monkeypatch.setattr(baselines, "read_image", lambda path: path)
    studies = [Study(name, ["x.png"], "", "test") for name in "ab"]
    assert baselines.retrieve(expert, studies, ["c", "b", "c"]) == ["c", "b"]
    assert baselines.retrieve(expert, studies, ["b", "a"]) == ["a", "b"]


def test_each_is_made_of_what_was_evaluated_and_what_lacks_is_named(tmp_path, monkeypatch):
    studies = [Study(str(i), ["x.png"], "", "test", labels=[]) for i in range(2)]
    cfg = Config(run=str(tmp_path))
    with pytest.raises(ValueError, match="no .*base/reports.jsonl: first evaluate.py --run"):
        baselines.write_baselines(cfg, studies, tmp_path)
    for name, samples in (("base", ["Edema."]), ("sft", ["Edema.", "Left effusion.", "Edema. Left effusion."])):
        (tmp_path / name).mkdir()
        rows = [{"id": str(i), "report": "Edema.", "samples": samples} for i in range(2)]
        (tmp_path / name / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def similarity(images, ids, groups):
        return torch.tensor([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]])

    monkeypatch.setattr(baselines, "read_image", lambda path: path)
    monkeypatch.setattr(baselines, "load_expert", lambda path: SimpleNamespace(similarity=similarity))
    monkeypatch.setattr(baselines, "retrieve", lambda expert, studies, reports: reports[:2])
    monkeypatch.setattr(baselines, "load_studies", lambda cfg, split: [Study("", [], f"{split} {i}", "") for i in "01"])
    found = baselines.write_baselines(cfg, studies, tmp_path)
    assert list(found) == list(baselines.BASELINES)
    assert found["best_of"] == ["Left effusion.", "Edema."]
    assert found["retrieved"] == ["sft 0", "sft 1"] and found["retrieved_clean"] == ["expert 0", "expert 1"]
    assert truth_counts(found["base_grammar"][0], ["edema"])["correct"] == 1
    assert truth_counts(found["majority"][1], ["edema", "effusion_left"])["correct"] == 2
    (tmp_path / "sft" / "reports.jsonl").write_text('{"id": "0", "report": "x", "samples": ["x"]}\n')
    with pytest.raises(ValueError, match="no samples of study 1: evaluate it with --eval.samples above 0"):
        baselines.write_baselines(cfg, studies, tmp_path)
