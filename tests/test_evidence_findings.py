"""The reader of real reports, by hand; on the real references where they are; and what is built on it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_data import config

import data
from config import Config, DataConfig
from evidence import judge, metrics
from evidence.findings import SENTENCES, finding_counts, read_findings
from evidence.reader import label_of
from formats.gold import FINDINGS
from rewards import wrap

REAL = Path(__file__).parents[2] / "shared" / "data" / "iu_xray"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The heart is normal in size. The lungs are clear.", set()),
        ("The heart is mildly enlarged.", {"cardiomegaly"}),
        ("Heart size is not enlarged.", set()),
        ("Stable cardiomegaly without focal consolidation or effusion.", {"cardiomegaly"}),
        ("No pneumothorax, pleural effusion, or focal airspace disease.", set()),
        ("No pneumothorax. Small left pleural effusion.", {"effusion_left"}),
        ("There is no pneumothorax, but there is a small right effusion.", {"effusion_right"}),
        ("Bilateral pleural effusions and bibasilar atelectasis.",
         {"effusion_left", "effusion_right", "atelectasis_left", "atelectasis_right"}),
        ("A pleural effusion is not seen.", set()),
        ("A pericardial effusion.", set()),
        ("The lungs are hyperexpanded with flattening of the diaphragms.", {"hyperinflation"}),
        ("Calcified granuloma in the right lower lobe.", {"granuloma_right"}),
        ("There is a calcified pulmonary nodule.", {"granuloma"}),  # and no nodule that matters
        ("There is a 1 cm nodule in the lingula.", {"nodule_left"}),
        ("Degenerative changes of the thoracic spine. Surgical clips.", {"spine", "device"}),
        ("Patchy opacity at the left base, scarring at the right.",
         {"opacity_left", "opacity_right", "scar_left", "scar_right"}),  # sides are the sentence's: of use as a set
        ("", set()),
    ],
)  # fmt: skip
def test_reading_by_hand(text, expected):
    assert {*map(label_of, read_findings(text).stated)} == expected


def test_each_forced_choice_is_between_a_finding_and_nothing():
    assert SENTENCES.keys() == {*FINDINGS}
    for name, (with_it, without) in SENTENCES.items():
        assert {finding for finding, _ in read_findings(with_it).stated} == {name}
        assert read_findings(without).stated == set()


def test_counts_are_by_finding_and_a_side_is_wrong_only_where_both_name_one():
    text = "Small left effusion. Left nodule. Cardiomegaly. Right lower opacity."
    counts = finding_counts(text, ["effusion_right", "nodule", "spine", "opacity_left", "opacity_right"])
    assert counts == {"stated": 4, "true": 4, "correct": 3, "hallucinated": 1, "omitted": 1, "wrong_side": 1,
                      "sentences": 4, "unread": 0}  # fmt: skip
    assert finding_counts("Qwerty.", [])["unread"] == 1


def test_f1_less_shuffled_f1_by_hand():
    own, other = np.zeros((2, 8)), np.zeros((2, 8))
    places = [metrics.TRUTH_KEYS.index(key) for key in ("stated", "true", "correct")]
    own[:, places], other[:, places] = [[2, 2, 2], [2, 2, 1]], [[2, 2, 0], [2, 2, 1]]
    family, function = metrics.METRICS["looked_f1"]
    assert metrics.WIDTHS[family] == 16
    assert function(np.concatenate([own, other], axis=1).sum(0)) == pytest.approx(3 / 4 - 1 / 4)


def test_the_judge_counts_gold_labels_and_shows_what_the_rules_can_read(monkeypatch, tmp_path):

    class Meteor(SimpleNamespace):
        def __call__(self, candidates, texts):
            return None

    monkeypatch.setattr(judge, "Meteor", lambda: Meteor(note=""))
    references = ["The heart is enlarged.", "Small effusion.", "The lungs are clear."]
    wanted = judge.Wanted("val", list("abc"), references, [["cardiomegaly"], ["effusion_left", "spine"], []])
    cfg = Config(data=DataConfig(labels="gold.csv"))
    held = judge.Judge(cfg, wanted, ["--scorers.chexbert", "--scorers.bertscore", "--scorers.radgraph"])
    greedy, sampled = [[wrap(text)] for text in references], [[wrap(text)] * 2 for text in references]
    stats = held.always("The lungs are clear.") | held.rows(greedy, sampled, [1, 2, 0])
    held.save(tmp_path / "P", {"adapter": "x"}, greedy, sampled, stats)
    rows = json.loads((tmp_path / "P" / "results.json").read_text())
    assert (rows["policy"], rows["adapter"], rows["settings"]["data"]["labels"]) == ("P", "x", "gold.csv")
    assert rows["references"]["sided_f1"]["value"] == pytest.approx(4 / 5)  # the spine is told nowhere
    assert (rows["references"]["truth_precision"]["value"], rows["references"]["truth_recall"]["value"]) == (1, 2 / 3)
    assert rows["template"]["counts"]["stated"] == 0 and rows["greedy"]["distinct"]["value"] == pytest.approx(3)
    assert rows["shuffled"]["counts"]["correct"] == 0 == rows["shuffled_sampled"]["counts"]["correct"]
    assert rows["sampled"]["looked_f1"]["value"] == pytest.approx(4 / 5)
    assert held.report_rows(greedy, sampled)[1]["stated"] == ["effusion"]
    assert rows["sampled"]["distinct"]["value"] == pytest.approx(3) and rows["template"]["distinct"]["value"] == 1
    assert "others' ceiling" in held.notes()[-1]


@pytest.mark.skipif(not REAL.exists(), reason="the real IU-Xray is not here")
def test_on_real_references_the_rules_find_what_people_coded():
    studies, _ = data.read_split(config(REAL, labels="gold_labels_nih14.csv"), "val")
    counts = [finding_counts(study.report, study.labels) for study in studies]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    assert total["correct"] / total["stated"] > 0.9 and total["correct"] / total["true"] > 0.87
