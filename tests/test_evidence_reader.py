"""The evaluation's reader: hand-written sentences for each rule, and everything the phantom writes read back."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from evidence.reader import read_report, truth_counts
from phantom import world as phantom
from phantom.assets import labelled_texts
from phantom.config import PhantomConfig
from phantom.findings import LABELS, finding_of
from phantom.oracle import oracle_similarity
from phantom.text import AUTHORS, NORMAL_TEMPLATE

CFG = PhantomConfig()


# labelled by hand, before the rules were held against them: columns kind, text, stated, denied
SENTENCES = list(csv.DictReader(Path(__file__).with_name("reader_sentences.csv").open(encoding="utf-8", newline="")))


def labels_of(pairs):
    return {f"{finding}_{side}" if side else finding for finding, side in pairs}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a small left pleural effusion.", "effusion_left"),
        ("No left effusion but small right effusion.", "effusion_right"),
        ("Heart size is normal.", ""),
        ("The heart is not enlarged.", ""),
        ("The heart is mildly enlarged.", "cardiomegaly"),
        ("Pulmonary vessels are enlarged.", ""),
        ("Cardiomegaly without edema.", "cardiomegaly"),
        ("Possible left lower lobe consolidation.", "consolidation_left"),
        ("A right nodule cannot be excluded.", "lesion_right"),
        ("Right pneumothorax is not excluded.", "pneumothorax_right"),
        ("Pneumothorax is excluded.", ""),
        ("A left effusion is not seen.", ""),
        ("No effusion, consolidation, or pneumothorax.", ""),
        ("No pleural effusion or left pneumothorax; right rib fracture.", "fracture_right"),
        ("no pneumothorax, left rib fracture.", "fracture_left"),
        ("No effusion and a small left nodule.", "lesion_left"),
        ("No effusion and pneumothorax.", ""),
        ("The lungs are clear without focal consolidation.", ""),
        ("Lungs are free of edema or atelectasis.", ""),
        ("Bilateral pleural effusions.", "effusion_left effusion_right"),
        ("Left and right basilar atelectasis.", "atelectasis_left atelectasis_right"),
        ("Effusions on both sides.", "effusion_left effusion_right"),
        ("Nodule in the left upper lobe.", "lesion_left"),
        ("Right effusion and a nodule in the left lung.", "effusion_right lesion_left"),
        ("On the right, there is a pneumothorax.", "pneumothorax_right"),
        ("Pleural effusion, left.", "effusion_left"),
        ("Left effusion, fracture.", "effusion_left fracture"),
        ("The right costophrenic angle is blunted.", "effusion_right"),
        ("A pleural line is seen with a small left pneumothorax.", "pneumothorax_left"),
        ("No change in the left effusion.", "effusion_left"),
        ("Left pacemaker in place, left effusion.", "device effusion_left"),
        ("Left effusion. Small effusion again noted. IMPRESSION: left pleural effusion", "effusion_left"),
        ("Left effusion without pneumothorax, but right fracture.", "effusion_left fracture_right"),
        ("No acute disease with edema.", "edema"),
        ("<report>FINDINGS: no edema IMPRESSION: edema</report>", "edema"),
        ("No right pleural effusion. Left pleural effusion.", "effusion_left"),
    ],
)
def test_stated(text, expected):
    assert labels_of(read_report(text).stated) == set(expected.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart size is normal.", "cardiomegaly"),
        ("The cardiomediastinal silhouette is within normal limits.", "cardiomegaly"),
        ("No effusion, consolidation or edema.", "effusion consolidation edema"),
        ("No right pleural effusion.", "effusion_right"),
        ("The osseous structures are intact.", "fracture"),
        ("The lungs are clear.", "edema consolidation atelectasis lesion"),
        ("A left effusion is not seen.", "effusion_left"),
        ("The heart is not normal.", ""),
        ("No edema. Pulmonary edema.", ""),
    ],
)
def test_denied(text, expected):
    assert labels_of(read_report(text).denied) == set(expected.split())


@pytest.mark.parametrize("row", SENTENCES, ids=lambda row: f"{row['kind']}: {row['text']}")
def test_hard_sentences(row):
    reading = read_report(row["text"])
    assert labels_of(reading.stated) == set(row["stated"].split())
    assert labels_of(reading.denied) == set(row["denied"].split())


def test_hard_sentences_say_the_same_in_a_report_of_two_sections():
    """Around each sentence stands one that says something else, so that nothing may leak over a border."""
    for row in SENTENCES:
        if row["kind"] != "two sections" and "device" not in row["stated"] + row["denied"]:
            reading = read_report(f"FINDINGS: Pacemaker in place. {row['text']} IMPRESSION: Pacemaker. {row['text']}")
            assert labels_of(reading.stated) == {"device", *row["stated"].split()}, row["text"]
            assert labels_of(reading.denied) == set(row["denied"].split()), row["text"]


def test_each_kind_of_hard_sentence_stands_there_several_times():
    kinds = Counter(row["kind"] for row in SENTENCES)
    assert len(kinds) == 18 and min(kinds.values()) >= 3 and len({row["text"] for row in SENTENCES}) == len(SENTENCES)


def test_unread_counts_only_sentences_that_say_nothing_known():
    reading = read_report("FINDINGS: The lungs are clear. Blue the seventh and. IMPRESSION: No acute abnormality.")
    assert (reading.sentences, reading.unread) == (3, 1)
    assert (read_report("").sentences, read_report("...").unread, read_report("FINDINGS: IMPRESSION:").sentences) == (
        0, 0, 0)  # fmt: skip
    tagged = read_report("<report>FINDINGS: No edema. IMPRESSION: Edema.</report>")
    assert (tagged.sentences, tagged.unread) == (2, 0)
    normal = read_report(NORMAL_TEMPLATE)
    assert not normal.stated and normal.unread == 0 and normal.sentences == 5


def test_truth_counts_by_hand():
    text = "Left effusion. Possible edema. Right nodule. Atelectasis. Left effusion. No pneumothorax."
    count = truth_counts(text, ["effusion_left", "lesion_left", "atelectasis_left", "atelectasis_right", "device"])
    assert count == {"stated": 4, "true": 5, "correct": 2, "hallucinated": 2, "omitted": 3, "wrong_side": 1,
                     "sentences": 6, "unread": 0}  # fmt: skip


def test_bilateral_for_one_side_is_no_wrong_side():
    count = truth_counts("Bilateral effusions.", ["effusion_left"])
    assert (count["correct"], count["hallucinated"], count["wrong_side"], count["omitted"]) == (1, 1, 0, 0)
    assert truth_counts("An effusion.", [])["hallucinated"] == 1
    assert truth_counts("", ["edema"])["omitted"] == 1


def test_counts_add_up_on_shuffled_reports():
    rng = np.random.default_rng(0)
    texts = [phantom.write_report(phantom.sample_findings(rng, CFG), rng, CFG, True)[0] for _ in range(100)]
    for text in texts:
        labels = [label for label in LABELS if rng.random() < 0.2]
        count = truth_counts(text, labels)
        assert count["stated"] == count["correct"] + count["hallucinated"]
        assert count["true"] == count["correct"] + count["omitted"] == len(labels)
        assert count["wrong_side"] <= count["hallucinated"]


def test_garbled_text_does_not_break_the_reader():
    rng = np.random.default_rng(1)
    words = " ".join(labelled_texts(CFG, 1, 60)[0]).split()
    for _ in range(200):
        reading = read_report(" ".join(rng.choice(words, 30)))
        assert reading.unread <= reading.sentences and not reading.stated & reading.denied


@pytest.mark.parametrize("kind", ["references", "random findings", "captions"])
def test_everything_the_phantom_writes_is_read_back(kind):
    wrong = unread = sentences = 0
    for i in range(2000):
        rng = np.random.default_rng([21, i])
        findings = phantom.sample_findings(rng, CFG)
        if kind == "random findings":
            chosen = sorted(rng.choice(len(LABELS), int(rng.integers(0, 7)), replace=False))
            findings = [finding_of(LABELS[k], rng) for k in chosen]
        if kind == "captions":
            text, said = phantom.write_caption(findings, rng, CFG)
        else:
            text, said = phantom.write_report(findings, rng, CFG, kind == "references", author=i % len(AUTHORS))
        reading = read_report(text)
        wrong += labels_of(reading.stated) != set(said)
        unread, sentences = unread + reading.unread, sentences + reading.sentences
    assert wrong == 0 and unread == 0 and sentences >= 2000


def test_the_oracle_prefers_what_the_image_shows():
    labels = {"a": ["effusion_left"], "b": []}
    true, wrong, clear = "Left pleural effusion.", "Right pleural effusion and edema.", "The lungs are clear."
    s = oracle_similarity(labels)([None, None], ["a", "b"], [[true, wrong, clear], [true, wrong, clear]])
    assert s[0, 0] == pytest.approx(1) and s[0, 1] < 1e-3 and s[0, 2] < 1e-3
    assert s[1, 2] == pytest.approx(1) and s[1, 0] < 1e-3  # nothing shown, nothing stated
    both = oracle_similarity(labels)([None], ["a"], [["Left pleural effusion and edema."]])
    assert both[0, 0] == pytest.approx(2 / 3, abs=1e-3)  # 1 correct of 2 stated and 1 true
