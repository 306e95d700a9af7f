"""The table of what text rewards make of sentences that differ in one thing, with scorers that are plain functions."""

from pathlib import Path

import numpy as np
import pandas as pd

from evidence.divergence import divergence
from rewards import Scorers

PAIRS = pd.read_csv(Path(__file__).parents[1] / "evidence/divergence.csv")


def test_means_by_kind_by_hand():
    def label(texts):  # knows an effusion, and no side
        return np.array([["effusion" in text and "no" not in text] + [False] * 13 for text in texts])

    def halves(candidates, references):
        return [0.5 * (c == r) + 0.25 * c.startswith("no") for c, r in zip(candidates, references, strict=True)]

    rows = [("side", "a left effusion", "a right effusion"), ("negation", "effusion", "no effusion"),
            ("side", "a left effusion", "a left effusion")]  # fmt: skip
    pairs = pd.DataFrame([("our", *row) for row in rows], columns=list(PAIRS))
    means, each = divergence(pairs, Scorers(label, halves, lambda c, r: [1.0, 0.0, 0.5], None))
    assert list(means) == ["English", "differs", "bleu4", "rouge_l", "bertscore", "chexbert", "radgraph"]
    assert means[["English", "differs"]].to_numpy().tolist() == [["our", "side"], ["our", "negation"]]
    # ROUGE-L of 2 in 3 words is 2/3 and of 1 in 2 against 1 in 1 too; the label stays where a side changes
    np.testing.assert_allclose(means.iloc[:, 3:], [[250 / 3, 25, 100, 75], [200 / 3, 25, 0, 0]])
    assert each["bertscore"].tolist() == [0, 25, 50] and each["reference"].tolist() == [row[1] for row in rows]


def test_every_kind_has_pairs_that_differ():
    kinds = PAIRS.groupby(["English", "differs"]).size()
    assert len(kinds) == 8 and (kinds == 3).all() and (PAIRS["reference"] != PAIRS["candidate"]).all()
