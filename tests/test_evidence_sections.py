"""The reader: what FINDINGS and IMPRESSION say of each other, and repeated sentences; each number by hand."""

import math

import numpy as np
import pytest

from evidence import metrics
from evidence.reader import SECTION_KEYS, repeats, section_counts, split_sections
from evidence.tables import columns
from phantom import world as phantom
from phantom.config import PhantomConfig
from phantom.text import NORMAL_TEMPLATE


def report(findings, impression):
    return f"FINDINGS: {findings} IMPRESSION: {impression}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # reports, disagreeing, stated, contradicted, impression_only
        (report("Left effusion. No edema.", "Left effusion."), (1, 0, 1, 0, 0)),
        (report("Left effusion.", "Left effusion and right nodule."), (1, 1, 2, 0, 1)),
        (report("Left effusion. Edema.", "Left effusion."), (1, 1, 2, 0, 0)),
        (report("No left effusion.", "Left effusion."), (1, 1, 1, 1, 1)),
        (report("No pleural effusion.", "Left effusion."), (1, 1, 1, 1, 1)),  # in general
        (report("The lungs are clear.", "Left nodule and edema."), (1, 1, 2, 2, 2)),
        (report("Cardiomegaly. Left effusion.", "Heart size is normal. No effusion."), (1, 1, 2, 2, 0)),
        (report("No right effusion.", "Left effusion."), (1, 1, 1, 0, 1)),  # another side
        (report("Left effusion.", "Right effusion."), (1, 1, 2, 0, 1)),
        (report("Left effusion.", "Pleural effusion."), (1, 0, 1, 0, 0)),  # a side in one section alone
        (report("Pleural effusion.", "Left effusion."), (1, 0, 1, 0, 0)),
        (report("Left effusion.", "Bilateral effusions."), (1, 1, 2, 0, 1)),
        (report("Possible left effusion.", "Left effusion is unlikely."), (1, 1, 1, 1, 0)),
        (report("No edema. Edema.", "Edema."), (1, 0, 1, 0, 0)),  # inside one section it counts as stated
        (NORMAL_TEMPLATE, (1, 0, 0, 0, 0)),
        ("IMPRESSION: Edema. FINDINGS: No edema.", (1, 1, 1, 1, 1)),
        ("findings: Edema. Impression : Edema.", (1, 0, 1, 0, 0)),
        ("FINDINGS: Edema. IMPRESSION: Edema. FINDINGS: Left nodule.", (1, 1, 2, 0, 0)),
        ("FINDINGS: Edema. No edema.", (0, 0, 0, 0, 0)),  # not applicable
        ("IMPRESSION: Edema.", (0, 0, 0, 0, 0)),
        ("left effusion, right nodule.", (0, 0, 0, 0, 0)),
    ],
)
def test_sections_by_hand(text, expected):
    assert section_counts(text) == list(expected) and len(expected) == len(SECTION_KEYS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report("Edema. No effusion. edema .", "Edema."), True),
        (report("Left effusion.", "Pacemaker. Edema. Pacemaker."), True),
        (report("Left effusion.", "Left effusion."), False),  # each section says it once
        (report("Left effusion. Small left effusion.", "Edema."), False),
        ("Edema. Edema.", True),
        ("FINDINGS: Edema. IMPRESSION: None. FINDINGS: Edema.", True),  # two sections of one name are one
        ("1. Edema. 2. Effusion, 1. IMPRESSION: 1. 1.", False),
        ("", False),
    ],
)
def test_repetition_by_hand(text, expected):
    assert repeats(text) is expected


def test_sections_are_split_at_their_headers():
    assert split_sections("x FINDINGS: a. Impression: b") == {"": "x ", "findings": " a. ", "impression": " b"}
    assert split_sections("a") == {"": "a"}


def test_rates_are_ratios_of_sums_over_studies():
    """Two studies of two samples: of three reports with sections two disagree; of six findings one is contradicted and
    four are in the IMPRESSION alone; one report of four repeats itself."""
    texts = [
        [report("No edema.", "Edema. Left nodule. Edema."), report("Left effusion.", "Left effusion.")],
        [report("Left effusion.", "Left effusion, right nodule and cardiomegaly."), "edema."],
    ]
    stats = metrics.collect(texts, ["a", "b"], labels=[[], []])
    assert stats["sections"].tolist() == [[2, 1, 3, 1, 2], [1, 1, 3, 0, 2]]
    assert stats["repeats"].tolist() == [[1, 2], [0, 2]]
    assert {name: values.shape[1] for name, values in stats.items()}["sections"] == metrics.WIDTHS["sections"]
    row = metrics.summarise({"sampled": stats}, (), 50, 0)["sampled"]
    names = ("section_disagreement_rate", "contradicted_rate", "impression_only_rate", "repetition_rate")
    assert [row[name]["value"] for name in names] == pytest.approx([2 / 3, 1 / 6, 4 / 6, 1 / 4])
    assert row["sections"] == dict(zip(SECTION_KEYS, (3, 2, 6, 1, 4), strict=True))
    assert {column.key.split("/")[1] for column in columns("sections")} == set(names)


def test_without_sections_nothing_is_claimed():
    row = metrics.summarise({"greedy": metrics.collect([["edema."]], ["edema."], labels=[[]])}, (), 20, 0)["greedy"]
    assert math.isnan(row["section_disagreement_rate"]["value"]) and math.isnan(row["contradicted_rate"]["value"])
    assert row["repetition_rate"]["value"] == 0
    assert "sections" not in metrics.collect([["edema."]], ["edema."])  # the reader is for exact labels' reports


def test_references_agree_with_themselves():
    for i in range(300):
        rng = np.random.default_rng([3, i])
        text = phantom.write_report(phantom.sample_findings(rng, PhantomConfig()), rng, PhantomConfig(), True)[0]
        reports, disagreeing, _, contradicted, _ = section_counts(text)
        assert (reports, disagreeing, contradicted) == (1, 0, 0) and not repeats(text)
