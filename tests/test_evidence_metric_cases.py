"""Scores of public systems and the test vectors of public packages, where they are at hand beside the project."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import rewards
from config import DataConfig
from evaluate import normal_template
from evidence import meteor, metrics
from evidence.judge import Wanted
from scorers.chexbert import CHEXPERT_LABELS

SHARED = Path(os.environ.get("VALOR_SHARED") or Path(__file__).parents[2] / "shared" / "data")
PAIRS = SHARED / "metrics_iu_xray"
pytestmark = pytest.mark.skipif(not (SHARED / "metrics").is_dir(), reason=f"no metric cases at {SHARED}")


def vectors(name):
    return json.loads((SHARED / "metrics" / name).read_text(encoding="utf-8"))


def pairs(system):
    return [json.loads(line) for line in (PAIRS / f"{system}.jsonl").read_text(encoding="utf-8").splitlines()]


SYSTEMS = ["candidate_number_sft", "fixed_template", "logprob_selector", "qwen_dino_sft_beam3",
           "retrieval_top50_clinical_oracle", "template_sentence_fusion"]  # fmt: skip


@pytest.mark.parametrize("system", SYSTEMS)
def test_bleu_and_rouge_of_every_pair_and_of_the_corpus(system):
    rows = pairs(system)
    found = metrics.collect([[row["candidate"]] for row in rows], [row["reference"] for row in rows])
    stats, rouge = found["bleu"], found["rouge_l"][:, 0]
    wanted = [[row["pycoco"][f"Bleu_{n}"] for n in range(1, 5)] for row in rows]
    assert metrics.bleu(stats).tolist() == wanted  # to the last bit
    assert rouge.tolist() == [row["pycoco"]["ROUGE_L"] for row in rows]
    corpus = vectors("iu_xray_corpus_scores.json")[system]["by_half_recomputed_here"]["dev"]
    assert corpus["n"] == len(rows)
    np.testing.assert_allclose(
        [*metrics.bleu(stats.sum(0)), np.mean(rouge)],
        [*(corpus[f"Bleu_{n}"] for n in range(1, 5)), corpus["ROUGE_L"]], atol=1e-12, rtol=0,
    )  # fmt: skip


@pytest.mark.skipif(not (SHARED / "iu_xray").is_dir(), reason=f"no IU X-Ray at {SHARED}")
@pytest.mark.parametrize(("protocol", "expected"), [("raw", 18.60), ("r2gen", 20.21)])
def test_bleu_4_of_the_normal_template_on_iu_xray(protocol, expected):
    """R2Gen's protocol is worth 1.6 points to a text that says nothing about any image."""
    rows = json.loads((SHARED / "iu_xray" / "annotation.json").read_text(encoding="utf-8"))["test"]
    wanted = Wanted("test", [], [row["report"] for row in rows], None)
    texts = [[normal_template(wanted, DataConfig(target="findings"))]] * len(rows)
    sums = metrics.collect(texts, wanted.references, protocol=protocol)["bleu"].sum(0)
    assert 100 * metrics.bleu(sums)[3] == pytest.approx(expected, abs=0.005)


def test_bleu_4_of_radevals_pairs():
    """Eight invented pairs, scored by RadEval on words split at blanks."""
    for case in vectors("radeval_divergence_scores.json")["divergence"]:
        found = metrics.bleu(np.array(metrics.bleu_stats(case["hyp"], case["ref"]), float))[3]
        assert found == pytest.approx(case["scores"]["bleu"], rel=1e-6)


@pytest.mark.slow  # the jar takes a quarter of a minute to load
def test_meteor_of_several_references_as_published():
    """METEOR takes a candidate's best reference; a corpus is scored on the sums of what remains."""
    scorer = meteor.Meteor()
    if scorer(["a"], ["a"]) is None:
        pytest.skip(scorer.note)
    for case in vectors("nlgeval_pycoco_vectors.json")["cases"]:
        rows = [scorer([hyp] * len(refs), refs) for hyp, refs in zip(case["hyps"], case["refs"], strict=True)]
        best = [row[meteor.corpus_meteor(row).argmax()] for row in rows]
        assert meteor.corpus_meteor(np.sum(best, axis=0)) == pytest.approx(case["expected"]["METEOR"], abs=1e-5)


@pytest.mark.parametrize("system", ["fixed_template", "qwen_dino_sft_beam3"])
def test_published_label_scores_from_their_counts(system):
    """Published CheXbert counts of 382 reports give the published precision, recall and F1 of labels and averages."""
    published = vectors("iu_xray_corpus_scores.json")[system]["published_chexbert"]
    rows = [published["per_label"][name] for name in CHEXPERT_LABELS]
    sums = np.array([row[count] for count in ("tp", "fp", "fn") for row in rows], float)
    wanted = [[row[key] for row in rows] for key in ("precision", "recall", "f1")]
    np.testing.assert_allclose(np.nan_to_num(metrics.label_scores(sums)), wanted, atol=1e-12)
    assert metrics.METRICS["f1_macro"][1](sums) == pytest.approx(published["macro_f1"], abs=1e-12)
    for key in ("precision", "recall", "f1"):
        micro = metrics.METRICS[f"{key}_micro"][1](sums)
        assert np.nan_to_num(micro) == pytest.approx(published["micro"][key], abs=1e-12)


def test_sacrebleu_gives_its_vectors():
    """The package behind the BLEU reward, on the numbers of its own tests."""
    import sacrebleu

    cases = vectors("sacrebleu_vectors.json")
    for case in cases["corpus_bleu"]:
        assert sacrebleu.corpus_bleu(case["hyps"], case["refs"], **case["kwargs"]).score == pytest.approx(
            case["expected"], abs=1e-6
        )
    sentence = cases["sentence_bleu"]
    for case in sentence["cases"]:
        found = sacrebleu.sentence_bleu(
            sentence["hyp"], [sentence["ref"]], use_effective_order=sentence["use_effective_order"],
            **{key: case[key] for key in ("smooth_method", "smooth_value", "lowercase", "tokenize")},
        )  # fmt: skip
        assert found.score == pytest.approx(case["expected"], abs=sentence["tol"])


def test_rouge_score_gives_its_vectors():
    from rouge_score.rouge_scorer import RougeScorer

    cases = vectors("rouge_score_vectors.json")["cases"]
    for case in cases:
        score = RougeScorer([case["type"]], use_stemmer=case["use_stemmer"]).score(case["target"], case["prediction"])
        for key in ("precision", "recall", "fmeasure"):
            assert getattr(score[case["type"]], key) == pytest.approx(case[key], abs=1e-5)
    ours = [case for case in cases if case["type"] == "rougeL" and not case["use_stemmer"]]
    found = rewards.rouge_l([case["prediction"] for case in ours], [case["target"] for case in ours])
    assert len(ours) == 5 and found == pytest.approx([case["fmeasure"] for case in ours], abs=1e-5)
