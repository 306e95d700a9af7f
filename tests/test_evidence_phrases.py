"""Phrases marked by truth: by hand, and that they are the text letter by letter and agree with the reader's counts."""

import numpy as np
import pytest

from evidence.phrases import MARKS, WORST, mark_report, sentence_spans
from evidence.reader import truth_counts
from phantom.config import PhantomConfig
from phantom.findings import LABELS
from phantom.world import make_study

SHORT = {"right": "+", "invented": "x", "wrong side": "<>", "denied": "-"}


def marked(text: str, labels: str) -> tuple[str, str]:
    """(the phrases that say something false or right as "+left effusion|xedema", the omitted labels)."""
    phrases, omitted = mark_report(text, labels.split())
    assert "".join(text[p.start : p.end] for p in phrases) == text and all(p.start < p.end for p in phrases)
    return "|".join(SHORT[p.mark] + text[p.start : p.end] for p in phrases if p.mark != "plain"), " ".join(omitted)


@pytest.mark.parametrize(
    ("text", "labels", "expected", "omitted"),
    [
        ("A small left pleural effusion.", "effusion_left", "+A small left pleural effusion", ""),
        ("Left effusion.", "", "xLeft effusion", ""),
        ("Left effusion.", "effusion_right", "<>Left effusion", "effusion_right"),
        ("Right rib fracture and left rib fracture.", "fracture_left", "xRight rib fracture|+left rib fracture", ""),
        ("Heart enlarged, possible edema with a mass.", "edema", "xHeart enlarged|+possible edema|xa mass", ""),
        ("No edema. The lungs are clear.", "lesion_left", "-The lungs are clear", "lesion_left"),
        ("No effusion or pneumothorax.", "effusion_left", "-No effusion", "effusion_left"),
        ("No left effusion, right effusion.", "effusion_right", "+right effusion", ""),
        ("No right effusion.", "effusion_left", "", "effusion_left"),
        ("Bilateral effusions.", "effusion_left", "xBilateral effusions", ""),
        ("Bilateral effusions.", "effusion_left effusion_right", "+Bilateral effusions", ""),
        ("An effusion.", "effusion_left effusion_right", "+An effusion", "effusion_right"),
        ("A nodular lesion on the left.", "lesion_left", "+A nodular lesion on the left", ""),
        ("On the right, a nodule.", "lesion_right", "+On the right, a nodule", ""),
        ("A left effusion is not excluded.", "effusion_left", "+A left effusion is not excluded", ""),
        ("<report>FINDINGS: edema IMPRESSION:\nEdema</report>", "edema", "+edema|+Edema", ""),
        ("The heart  is\tenlarged.", "cardiomegaly", "+The heart  is\tenlarged", ""),
        ("Left  and right effusion.", "effusion_left", "xLeft  and right effusion", ""),
        ("İ left effusion", "effusion_left", "+İ left effusion", ""),
        ("The heart is larger than normal.", "cardiomegaly", "+The heart is larger than normal", ""),
        ("The left effusion is gone and the heart is large.", "", "xThe left effusion is gone and the heart is large",
         ""),
        ("", "edema effusion_left", "", "edema effusion_left"),
        ("...", "", "", ""),
    ],
)  # fmt: skip
def test_phrases_by_hand(text, labels, expected, omitted):
    assert marked(text, labels) == (expected, omitted)


def test_labels_stand_with_their_phrase():
    phrases, _ = mark_report("Edema and left effusion, no nodule.", ["edema"])
    assert [p.labels for p in phrases if p.labels] == [("edema",), ("effusion_left",), ("lesion",)]


def test_sentences_stand_where_the_reader_finds_them():
    text = "<report>FINDINGS: No edema.\n Heart normal; IMPRESSION: Edema.</report>"
    assert [text[a:b] for a, b in sentence_spans(text)] == ["No edema", "Heart normal", "Edema"]


def agree(text: str, labels: list[str]) -> None:
    phrases, omitted = mark_report(text, labels)
    counts, marks = truth_counts(text, labels), {phrase.mark for phrase in phrases}
    assert "".join(text[p.start : p.end] for p in phrases) == text and all(p.start < p.end for p in phrases)
    assert len(omitted) == counts["omitted"]
    assert bool(marks & {"invented", "wrong side"}) == (counts["hallucinated"] > 0), (text, labels)
    assert "wrong side" not in marks or counts["wrong_side"]
    if counts["stated"] and not counts["hallucinated"]:
        assert "right" in marks


def test_marks_agree_with_the_counts():
    """Reports and captions of the phantom, held against their own truth and another study's; then garbled words."""
    cfg, rng = PhantomConfig(), np.random.default_rng(0)
    studies = [make_study(cfg, 1, split, i)[1:] for split in ("base", "test") for i in range(60)]
    for (row, truth), (_, other) in zip(studies, studies[1:] + studies[:1], strict=True):
        agree(row["report"], truth["labels"])
        agree(row["report"], other["labels"])
    words = "no left right bilateral effusion nodule or , . with edema the heart enlarged lungs clear not seen".split()
    for _ in range(300):
        labels = [LABELS[i] for i in rng.choice(len(LABELS), 3, replace=False)]
        agree(" ".join(rng.choice(words, 12)), labels)


def test_every_mark_has_a_symbol_and_a_colour_of_its_own():
    assert set(WORST) == set(MARKS)
    for column in zip(*MARKS.values(), strict=True):
        assert len(set(column)) == len(MARKS)
