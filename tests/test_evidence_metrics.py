"""metrics.py and meteor.py: text metrics against pycocoevalcap, truth counts by hand, the bootstrap."""

import math
import shutil
import sys

import numpy as np
import pytest

from evidence import meteor, metrics, protocols
from scorers.chexbert import CHEXPERT_LABELS, FIVE

TEXTS = [
    ("The heart is enlarged. No effusion.", "The heart is mildly enlarged. No pleural effusion is seen."),
    ("The lungs are clear.", "The lungs are clear."),
    ("Left effusion, left effusion, left effusion.", "There is a small left effusion."),
    ("Nothing", "A large right pneumothorax is present."),
    ("", "No acute disease."),
]


def summarise(stats, resamples):
    return metrics.summarise({"row": stats}, CHEXPERT_LABELS, resamples, 0)["row"]


def bootstrap(function, stats, resamples, seed):
    drawn = metrics.resample({"row": stats}, resamples, np.random.default_rng(seed))
    return metrics.interval(function(drawn["row"]))


def bleu_rows(pairs):
    return np.array([metrics.bleu_stats(c, r) for c, r in pairs], float)


# ---------------------------------------------------------------------------------------------------- text metrics


@pytest.mark.parametrize(
    ("candidate", "reference", "tokens"),
    [
        ("No X-ray, 1.5 cm.\nL/R", "Clear", ("no x - ray , 1 . 5 cm . l / r", "clear")),  # prose
        ("no effusion .", "no effusion .  .", ("no effusion .", "no effusion .  .")),  # in tokens already
        ("1.5 cm x-ray .", "B-lines of 1.5 cm .", ("1.5 cm x-ray .", "b-lines of 1.5 cm .")),
        ("x-ray .", "An x-ray.", ("x - ray .", "an x - ray .")),  # one of them prose: both alike
        ("", "a", ("", "a")),
    ],
)
def test_raw_tokens(candidate, reference, tokens):
    assert protocols.tokens(candidate, reference) == tokens


@pytest.mark.parametrize(
    ("report", "iu_xray", "mimic"),
    [
        ("Clear lungs. No effusion.", "clear lungs . no effusion .", ...),
        ("1. XXXX's T-spine, (old). 2. B/l [x].. 3. 1.5 cm", "xxxxs t-spine old . bl x . 15 cm .", ...),
        ("no effusion .  .", "no effusion . .", ...),
        ("A.\nB.", "a b .", "a . b ."),  # the line break is no end of a sentence in the first
        ("FINDINGS:  clear___  now", "findings clear now .", ...),
        ("", ".", ...),
    ],
)
def test_r2gen_cleans_both_sides(report, iu_xray, mimic):
    assert protocols.tokens(report, report, "r2gen") == (iu_xray, iu_xray)
    assert protocols.tokens(report, report, "r2gen-mimic") == ((iu_xray if mimic is ... else mimic),) * 2


def test_r2gen_cuts_a_reference_one_token_before_a_candidate():
    for protocol, length in (("r2gen", 60), ("r2gen-mimic", 100)):
        candidate, reference = protocols.tokens("word " * 200, "word " * 200, protocol)
        assert (len(candidate.split()), len(reference.split())) == (length, length - 1)


def test_bleu_statistics_by_hand():
    assert metrics.bleu_stats("a b a b", "a b c a b") == [4, 2, 0, 0, 4, 3, 2, 1, 4, 5]
    assert metrics.bleu_stats("", "a") == [0] * 9 + [1]
    # matches 4/4 and 2/3, brevity exp(1 - 5/4)
    two = metrics.bleu(bleu_rows([("a b a b", "a b c a b")]))[0, 1]
    assert two == pytest.approx(math.sqrt(2 / 3) * math.exp(-0.25), abs=1e-8)


def test_mean_bleu_by_hand():
    """A corpus of two: precisions 5/6, 3/4, 2/3 and 1/2, 6 words against 7; the mean of the corpus' four BLEUs."""
    sums = bleu_rows([("a b c d e", "a b c d f"), ("g", "g h")]).sum(0)
    each = [5 / 6, (5 / 8) ** (1 / 2), (5 / 12) ** (1 / 3), (5 / 24) ** (1 / 4)]
    mean = metrics.METRICS["bleu_mean"][1](np.stack([sums, 2 * sums]))
    assert mean == pytest.approx(np.exp(1 - 7 / 6) * sum(each) / 4, abs=1e-8)


def test_rouge_by_hand():
    p, r = 2 / 3, 2 / 4
    assert metrics.rouge_l("a x b", "a b c d") == pytest.approx(2.44 * p * r / (r + 1.44 * p))
    assert metrics.rouge_l("", "") == metrics.rouge_l("", "a") == metrics.rouge_l("a", "b") == 0
    assert metrics.rouge_l("no effusion .", "no effusion .  .") == pytest.approx(0.7176, abs=5e-5)  # 5 blank-parted
    assert metrics.rouge_l("no effusion . .", "no effusion . .") == 1


def test_corpus_and_pair_scores_equal_pycocoevalcap():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    rng = np.random.default_rng(0)
    long = [" ".join(["a", *rng.choice(["a", "b", "c", ""], size)]) for size in (0, 7, 40, 90, 200)]  # double blanks
    pairs = [protocols.tokens(c, r) for c, r in TEXTS] + [(c, r) for c in long for r in long]
    given = {i: [c] for i, (c, _) in enumerate(pairs)}
    wanted = {i: [r] for i, (_, r) in enumerate(pairs)}
    corpus, each = bleu.Bleu(4).compute_score(wanted, given, verbose=0)
    stats = bleu_rows(pairs)
    assert metrics.bleu(stats.sum(0)).tolist() == corpus and metrics.bleu(stats).T.tolist() == each  # to the last bit
    assert [metrics.rouge_l(c, r) for c, r in pairs] == rouge.Rouge().compute_score(wanted, given)[1].tolist()


def test_meteor_of_the_jars_statistics():
    """The jar's own lines and scores for three pairs; their corpus score is the score of the summed line."""
    lines = [
        "9 11 5 7 3 3 4 4 0 0 0 0 0 0 0 0 0 0 0 0 4 7 7",
        "4 5 1 3 1 1 1 1 0 0 0 0 0 0 0 0 0 0 0 0 2 2 2",
        "0 2 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        "10 14 4 9 3 3 2 2 0 0 0 0 0 0 0 0 0 0 0 0 5 5 5",
    ]
    stats = np.array([line.split() for line in lines], float)
    each = [0.3222416527736763, 0.17486338797814208, 0.0, 0.1856540084388186]
    np.testing.assert_allclose(meteor.corpus_meteor(stats), each, atol=1e-12)
    assert meteor.corpus_meteor(stats.sum(0)) == pytest.approx(0.21821789746924167, abs=1e-12)


def test_without_java_there_is_no_meteor_but_everything_else(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scorer = meteor.Meteor()
    stats = metrics.collect([["a b"], ["c"]], ["a", "c"], meteor=scorer)
    assert "meteor" not in stats and stats["bleu"].shape == (2, 10)
    assert "no `java` on PATH" in scorer.note and "\n" not in scorer.note


JAR = """import sys
for line in sys.stdin:
    words = line.split()
    if "deadly" in words:
        sys.exit(1)
    print(*range(23), flush=True)
"""


@pytest.fixture
def jar(tmp_path, monkeypatch):
    """A stand-in for the Java process that dies of the word "deadly"."""
    (tmp_path / "jar.py").write_text(JAR)
    monkeypatch.setattr(meteor, "COMMAND", [sys.executable, str(tmp_path / "jar.py")])
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/java")


def test_a_meteor_process_that_dies_costs_meteor_alone(jar):
    """And only of the reports at hand: the next ones get a new process."""
    scorer, texts = meteor.Meteor(), [["fine"], ["a deadly report"], ["fine"]]
    stats = metrics.collect(texts, ["one", "two", "three"], meteor=scorer)
    assert "meteor" not in stats and stats["bleu"].shape == (3, 10) and stats["length"][:, 0].tolist() == [1, 3, 1]
    assert "ended after 1 of 3 reports" in scorer.note
    stats = metrics.collect([["fine"], ["fine"]], ["one", "two"], meteor=scorer)
    assert stats["meteor"].tolist() == [list(range(23))] * 2


@pytest.mark.parametrize("odd", ["a\nb", "a ||| b", "|||", ". , ;", "", "\0", "\ud800", "\u2028\x85", "word " * 14_000])
def test_no_text_shifts_an_answer_or_ends_the_process(jar, odd):
    """Each pair is one short line with two texts, whatever they hold."""
    scorer = meteor.Meteor()
    assert scorer([odd, "c"], ["d", odd]).shape == (2, 23)
    asked = scorer.line("d", odd)
    assert asked.count("\n") == 1 and asked.count("|||") == 2 and len(asked.split()) <= 3 + meteor.LONGEST + 1
    assert bool(scorer.note) == (len(odd) > 5000)


# ------------------------------------------------------------------------------------------------------- label F1


def test_label_scores_by_hand():
    candidates, references = np.zeros((3, 14), bool), np.zeros((3, 14), bool)
    candidates[[0, 1, 2], 1] = True  # Cardiomegaly: one right, two wrong
    references[0, 1] = True
    references[2, 9] = True  # Pleural Effusion: missed
    sums = metrics.label_stats(candidates, references).sum(0)
    precision, recall, f1 = np.nan_to_num(metrics.label_scores(sums))
    assert (precision[1], recall[1], f1[1]) == pytest.approx((1 / 3, 1, 0.5))
    assert f1[9] == f1[0] == precision[0] == recall[0] == 0

    def value(name):
        return metrics.METRICS[name][1](sums)

    assert (value("precision_micro"), value("recall_micro"), value("f1_micro")) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (value("f1_macro"), value("f1_macro_5")) == pytest.approx((0.5 / 14, 0.5 / 5))
    assert value("f1_micro_5") == value("f1_micro")  # all that is stated is among the five
    assert math.isnan(metrics.METRICS["f1_micro"][1](np.zeros(42)))


def test_the_five_labels_are_chexberts():
    assert {CHEXPERT_LABELS[place] for place in metrics.FIVE} == set(FIVE)


def test_label_scores_equal_scikit_learns():
    from sklearn.metrics import precision_recall_fscore_support as oracle

    rng = np.random.default_rng(0)
    candidates, references = rng.random((40, 14)) < 0.3, rng.random((40, 14)) < 0.2
    candidates[:, 3] = references[:, 3] = references[:, 6] = candidates[:, 11] = False  # nothing, or on one side only
    stats = {"length": np.ones((40, 2)), "labels": metrics.label_stats(candidates, references)}
    result = summarise(stats, 50)
    each = np.array(oracle(references, candidates, average=None, zero_division=0))
    found = [[row[key] for row in result["per_label"].values()] for key in ("precision", "recall", "f1", "support")]
    np.testing.assert_allclose(found, each, atol=1e-12)
    for suffix, places in (("", list(range(14))), ("_5", metrics.FIVE)):
        for average in ("micro", "macro"):
            wanted = oracle(references[:, places], candidates[:, places], average=average, zero_division=0)[:3]
            names = [f"{measure}_{average}{suffix}" for measure in ("precision", "recall", "f1")]
            assert [result[name]["value"] for name in names] == pytest.approx(wanted, abs=1e-12)
            assert all(result[name]["lo"] <= result[name]["value"] <= result[name]["hi"] for name in names)


# ----------------------------------------------------------------------------------------------------------- truth


def test_truth_rates_by_hand():
    """Four reports: right, wrong side, invented (said twice), silent. Stated 4 = 1 + 1 + 2, true 5."""
    labels = [["effusion_left"], ["effusion_right"], [], ["edema", "cardiomegaly", "device"]]
    texts = [
        "There is a left pleural effusion.",
        "There is a left pleural effusion.",
        "There is a right pneumothorax. Possible edema. There is a right pneumothorax.",
        "The lungs are clear.",
    ]
    stats = metrics.collect([[t] for t in texts], texts, labels=labels)
    result = summarise(stats, 50)
    expected = {"stated": 4, "hallucinated": 3, "true": 5, "omitted": 4, "wrong_side": 1, "correct": 1, "unread": 0}
    assert {key: result["counts"][key] for key in expected} == expected
    assert result["hallucination_rate"]["value"] == pytest.approx(3 / 4)
    assert result["omission_rate"]["value"] == pytest.approx(4 / 5)
    assert result["wrong_side_rate"]["value"] == pytest.approx(1 / 4)
    assert result["sided_f1"]["value"] == pytest.approx(2 * 1 / (4 + 5))
    assert result["unread_share"]["value"] == 0


def test_hallucination_at_an_equal_number_of_stated_findings_by_hand():
    """Three findings are in the images, so three pairs count. Of two samples each, both state one true and one false
    pair, and one states two true ones and a false one, of which the third place takes a third each."""
    labels = [["effusion_left", "edema"], ["device"]]
    texts = [
        ["Left effusion. Large heart. Cardiomegaly.", "Left effusion. Cardiomegaly. Edema."],
        ["There is a pacemaker.", "There is a right pneumothorax."],
    ]
    stats = metrics.collect(texts, ["a", "b"], labels=labels)
    assert stats["levels"].tolist() == [[0, 1, 1, 12, 0, 1], [0, 1, 0, 13, 1, 0]]
    result = summarise(stats, 50)["equal_hallucination"]
    assert result["value"] == pytest.approx((1 + 1 / 3) / 3) and result["lo"] <= 4 / 9 <= result["hi"] + 1e-9
    drawn_twice = stats["levels"][[0, 0]].sum(0)  # 4 places: 2 true and 2 false stated by both fill them
    assert metrics.equal_hallucination(np.stack([drawn_twice, stats["levels"][1]])) == pytest.approx([2 / 4, 1 / 2])
    assert metrics.equal_hallucination(np.array([2.0, 0, 28, 0])) == pytest.approx(28 / 30)  # by chance
    assert math.isnan(metrics.equal_hallucination(np.array([0.0, 0, 14, 1])))
    assert metrics.collect([["Edema."]], ["x"], labels=[[]])["levels"].tolist() == [[0, 0, 14, 1]]


def test_a_policy_that_says_more_of_the_same_order_hallucinates_no_more_at_n():
    said, more = np.array([2.0, 3, 5, 50, 4, 1]), np.array([0.0, 2, 3, 5, 0, 50, 4, 1])  # each pair by one sample more
    assert metrics.equal_hallucination(more) == metrics.equal_hallucination(said) == pytest.approx((1 + 4 * 4 / 7) / 10)


@pytest.mark.parametrize(
    ("text", "labels", "stated"),
    [
        ("Left effusion. Edema.", [], {"effusion_left", "edema"}),
        ("Effusion.", ["effusion_right"], {"effusion_right"}),
        ("Effusion.", ["edema"], {"effusion_left"}),
        ("Effusion. Right effusion.", ["effusion_left"], {"effusion_right"}),
        ("Bilateral effusions, no edema.", [], {"effusion_left", "effusion_right"}),
    ],
)
def test_stated_labels(text, labels, stated):
    assert metrics.stated_labels(text, labels) == stated


def test_each_mean_is_of_its_own_family():
    """What metrics.toml says, by the values that collect is given: each family has another."""
    fixed = {name: lambda candidates, references, value=value: [value] * len(candidates)
             for value, name in enumerate(("bertscore", "radgraph", "green", "ratescore"), 2)}  # fmt: skip
    stats = metrics.collect([["no effusion . no effusion ."]], ["no edema ."], formats=[[0.25]], **fixed)
    stats["forced"] = np.array([[0.5, 1.0]])
    found = {name: float(metrics.METRICS[name][1](stats[metrics.METRICS[name][0]].sum(0))) for name in (
        "bertscore", "radgraph_f1", "green", "ratescore", "forced_choice", "format_rate", "length", "repetition_rate",
        "rouge_l")}  # fmt: skip
    rouge = metrics.rouge_l("no effusion . no effusion .", "no edema .")
    assert [*found.values()] == [2, 3, 4, 5, 0.5, 0.25, 6, 1, rouge] and 0 < rouge < 1


def test_nothing_stated_is_nan_not_zero():
    stats = metrics.collect([["Clear."]], ["Clear."], labels=[[]])
    result = summarise(stats, 20)
    assert math.isnan(result["hallucination_rate"]["value"]) and math.isnan(result["hallucination_rate"]["lo"])


# ------------------------------------------------------------------------------------------- collect and summarise


def test_samples_of_a_study_are_summed_and_functions_get_flat_lists():
    texts = [["a b", "a"], ["c", "c c c"]]
    labelled = {"a b": 1, "a": 0, "c": 1, "c c c": 0, "r0": 1, "r1": 0}

    def label(batch):
        return np.array([[labelled[text]] + [0] * 13 for text in batch], bool)

    def pairwise(candidates, references):
        assert references == ["r0", "r0", "r1", "r1"]
        return [len(text.split()) for text in candidates]

    stats = metrics.collect(
        texts, ["r0", "r1"], formats=[[1.0, 0.0], [1.0, 1.0]], label=label, bertscore=pairwise, radgraph=pairwise
    )
    assert stats["length"].tolist() == [[3, 2], [4, 2]]
    assert stats["format"].tolist() == [[1, 2], [2, 2]]
    assert stats["bertscore"].tolist() == stats["radgraph"].tolist() == [[3, 2], [4, 2]]
    assert stats["labels"][:, [0, 14, 28]].tolist() == [[1, 0, 1], [0, 1, 0]]
    result = summarise(stats, 100)
    assert result["length"]["value"] == pytest.approx(7 / 4) and result["n"] == 2
    assert result["f1_micro"]["value"] == pytest.approx(2 / (2 + 1 + 1))
    first = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert result["per_label"][CHEXPERT_LABELS[0]] == first
    assert "meteor" not in result and "sided_f1" not in result
    assert 0 <= result["bleu_1"]["lo"] <= result["bleu_1"]["value"] < 1e-6  # nothing in common


def test_bootstrap_covers_the_mean_and_is_deterministic():
    def mean(sums):
        return metrics.divide(sums[..., 0], sums[..., 1])

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        values = rng.normal(3.0, 1.0, 80)
        stats = np.stack([values, np.ones(80)], 1)
        lo, hi = bootstrap(mean, stats, 300, seed=1)
        assert lo < values.mean() < hi
        assert (hi - lo) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(80), rel=0.25)
        covered += lo < 3.0 < hi
    assert 33 <= covered <= 40
    assert bootstrap(mean, stats, 300, seed=1) == (lo, hi)
    assert bootstrap(mean, stats, 300, seed=2) != (lo, hi)


def test_bootstrap_resamples_whole_studies():
    """Eight equal samples of a study tell as much as one: the interval must not shrink."""
    rng = np.random.default_rng(0)
    one = np.stack([rng.normal(size=50), np.ones(50)], 1)
    function = metrics.METRICS["length"][1]
    assert bootstrap(function, 8 * one, 200, 0) == pytest.approx(bootstrap(function, one, 200, 0))


def test_bootstrap_of_a_ratio_drops_empty_resamples():
    stats = np.array([[1.0, 1.0], [0.0, 0.0]])
    assert bootstrap(metrics.METRICS["length"][1], stats, 50, 0) == (1.0, 1.0)


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    stats = rng.integers(0, 9, (30, 1)).astype(float)
    monkeypatch.setattr(metrics, "AT_ONCE", 100)  # three at a time
    found = metrics.resample({"x": stats}, 4, np.random.default_rng(5))["x"]
    draws = np.random.default_rng(5).multinomial(len(stats), np.full(len(stats), 1 / len(stats)), size=4)
    np.testing.assert_array_equal(found, draws @ stats)
