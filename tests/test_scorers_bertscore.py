"""BERTScore on a tiny random encoder, against the package."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from tiny_bert import sentences, write_bert

from scorers import bertscore

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT folder: config, tokenizer, weights."""
    path = tmp_path_factory.mktemp("bert")
    write_bert(path)
    return path


def test_bertscore(folder, capsys):
    score = bertscore.load_bertscore(folder, 1)
    texts = sentences(12)
    assert score(texts, texts) == pytest.approx([1.0] * 12, abs=1e-5)
    got = score(["", texts[0], " ", texts[0], texts[1], texts[0]], [texts[0], "", "", texts[2], texts[2], texts[2]])
    assert got[:3] == [0, 0, 0] and 0 < got[3] < 1 and got[3] == got[5] != got[4]
    assert score([], []) == []
    assert score.truncated == 0
    long = sentences(1, seed=3, most=30)[0] + " left" * 600
    assert score([long], [long]) == pytest.approx([1.0], abs=1e-5) and score.truncated == 1
    assert score([long], [long + " pneumothorax"]) == pytest.approx([1.0], abs=1e-5)  # behind the cut
    assert score.truncated == 3 and capsys.readouterr().out.count("longer than 512 tokens") == 1


def test_bertscore_equals_the_package(folder):
    from bert_score import BERTScorer

    ours, theirs = sentences(70, seed=4), sentences(70, seed=5)
    scorer = BERTScorer(model_type=str(folder), num_layers=2, device="cpu")
    scorer._tokenizer.model_max_length = 512
    expected = scorer.score(ours, theirs)[2].clamp(0, 1).tolist()
    assert bertscore.load_bertscore(folder, 2)(ours, theirs) == pytest.approx(expected, abs=1e-5)


def baseline_file(path, rows):
    path.write_text("LAYER,P,R,F\n" + "".join(f"{layer},.1,.2,{f}\n" for layer, f in enumerate(rows)))
    return str(path)


def test_bertscore_rescaled(folder, tmp_path):
    """(F - b) / (1 - b) as the package does it; what falls below 0 is 0; an empty text stays 0."""
    from bert_score import BERTScorer

    ours, theirs = sentences(40, seed=6), sentences(40, seed=7)
    plain = bertscore.load_bertscore(folder, 2)(ours, theirs)
    middle = float(np.median(plain))
    path = baseline_file(tmp_path / "b.tsv", [0, 0.5, middle])
    got = bertscore.load_bertscore(folder, 2, baseline=path)([*ours, "", "left"], [*theirs, "left", "left"])
    package = BERTScorer(model_type=str(folder), num_layers=2, device="cpu", lang="en", rescale_with_baseline=True,
                         baseline_path=path)  # fmt: skip
    package._tokenizer.model_max_length = 512
    expected = package.score(ours, theirs)[2]
    assert got == pytest.approx([*expected.clamp(0, 1).tolist(), 0, 1], abs=1e-5)
    assert (expected < -0.01).any() and (expected > 0.01).any()
    assert got[:40] == pytest.approx([max(0, (f - middle) / (1 - middle)) for f in plain], abs=1e-5)


def test_bertscore_baselines_of_the_package(folder, tmp_path):
    assert bertscore.baseline_f1("roberta-large", 17, "package") == pytest.approx(0.8315, abs=1e-3)
    assert bertscore.baseline_f1("microsoft/deberta-base", 9, "package") == pytest.approx(0.62694, abs=1e-5)
    (tmp_path / "text.tsv").write_text("LAYER,P,R,F\n2,a,b,c\n")
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    cases = [("package", "No such file"), (str(tmp_path / "absent.tsv"), "No such file"),
             (baseline_file(tmp_path / "short.tsv", [0, 0.5]), "layer 2 of .*KeyError: 2"),
             (str(tmp_path / "text.tsv"), "could not convert string to float"),
             (str(tmp_path / "other.tsv"), "KeyError: 'LAYER'"),
             (baseline_file(tmp_path / "one.tsv", [0, 0, 1]), "must be below 1")]  # fmt: skip
    for baseline, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            bertscore.load_bertscore(folder, 2, baseline=baseline)
        assert "\n" not in str(caught.value) and "bertscore:" in str(caught.value)


def test_bertscore_loads_its_encoder_once(folder, monkeypatch):
    import bert_score.scorer

    calls, get_model = [], bert_score.scorer.get_model
    monkeypatch.setattr(bert_score.scorer, "get_model", lambda *a: calls.append(a) or get_model(*a))
    score = bertscore.load_bertscore(folder, 2)
    score(["left"], ["right"]), score(["left"], ["right"])
    assert len(calls) == 1


def test_bertscore_bad_folder_is_one_line(folder, tmp_path):
    for path, layer in ((folder, 9), (tmp_path, 1)):
        with pytest.raises(ValueError, match=f"bertscore: cannot load layer {layer} of {path}") as caught:
            bertscore.load_bertscore(path, layer)
        assert "\n" not in str(caught.value)
