"""RadGraph by rules: what its lexicon reads, and its F1 against the package's."""

import pytest

from scorers import radgraph_rules


def test_a_word_is_of_one_kind():
    words = [word for line in radgraph_rules.LEXICON["words"].values() for word in line.split()]
    assert set(radgraph_rules.KINDS.values()) == {"observation", "degree", "anatomy", "position"}
    assert sorted(words) == sorted(radgraph_rules.KINDS) and " ".join(words).islower()


READINGS = [  # (text, word, certainty)
    ("There is a small left pleural effusion.", "effusion", "definitely present"),
    ("No pleural effusion or pneumothorax.", "pneumothorax", "definitely absent"),
    ("No focal consolidation, effusion, or pneumothorax is seen.", "pneumothorax", "definitely absent"),
    ("No pneumothorax, small effusion on the left.", "effusion", "definitely present"),
    ("No pneumothorax, but the heart is enlarged.", "enlarged", "definitely present"),
    ("Small pneumothorax without effusion.", "pneumothorax", "definitely present"),
    ("Small pneumothorax without effusion.", "effusion", "definitely absent"),
    ("Lungs are clear of consolidation.", "clear", "definitely present"),
    ("Lungs are clear of consolidation.", "consolidation", "definitely absent"),
    ("Pleural effusion is not seen.", "effusion", "definitely absent"),
    ("The effusion has resolved.", "effusion", "definitely absent"),
    ("No change in the left effusion.", "effusion", "definitely present"),
    ("The heart is not enlarged.", "enlarged", "definitely absent"),
    ("Pneumothorax cannot be excluded.", "pneumothorax", "uncertain"),
    ("We cannot exclude a pneumothorax.", "pneumothorax", "uncertain"),
    ("Possible left effusion, right lower lobe consolidation.", "effusion", "uncertain"),
    ("Possible left effusion, right lower lobe consolidation.", "consolidation", "definitely present"),
    ("Opacity may represent pneumonia or atelectasis.", "atelectasis", "uncertain"),
    ("Opacity may represent pneumonia or atelectasis.", "opacity", "definitely present"),
    ("No opacity to suggest pneumonia.", "pneumonia", "definitely absent"),
    ("No effusion, possible pneumonia.", "pneumonia", "uncertain"),
    ("Findings are consistent with severe edema.", "edema", "definitely present"),
    ("No effusion. Cardiomegaly.", "cardiomegaly", "definitely present"),
]  # fmt: skip


@pytest.mark.parametrize("text, word, certainty", READINGS)
def test_negation_and_uncertainty(text, word, certainty):
    labels = [e["label"] for e in radgraph_rules.annotate(text)["entities"].values() if e["tokens"] == word]
    assert labels == [f"Observation::{certainty}"]


def test_annotation_layout_and_relations():
    annotation = radgraph_rules.annotate("FINDINGS: Small left pleural effusion. Opacity in the right lower lobe.")
    entities, words = annotation["entities"], annotation["text"].split()
    assert list(entities) == [str(i + 1) for i in range(len(entities))]
    assert all(words[e["start_ix"]] == e["tokens"] and e["end_ix"] == e["start_ix"] for e in entities.values())
    named = {e["tokens"]: [(kind, entities[i]["tokens"]) for kind, i in e["relations"]] for e in entities.values()}
    assert named == {
        "small": [("modify", "effusion")], "left": [("modify", "pleural")], "pleural": [], "effusion":
        [("located_at", "pleural")], "opacity": [("located_at", "lobe")], "right": [("modify", "lobe")],
        "lower": [("modify", "lobe")], "lobe": []}  # fmt: skip
    assert entities["2"]["label"] == "Anatomy::definitely present" and "findings" not in named
    suggested = radgraph_rules.annotate("Consolidation suggesting pneumonia.")["entities"]
    assert suggested["1"]["relations"] == [["suggestive_of", "2"]]


@pytest.mark.parametrize(("text", "place"), [
    ("left lower lung opacity", "lung"),  # just before it
    ("right lung shows opacity", "lung"),  # its subject: an anatomy before a position word
    ("the right shows opacity", "right"),
    ("opacity in the left lung base", "base"),  # behind a preposition, the last of the run
    ("effusion and opacity in the lung", "lung"),
])  # fmt: skip
def test_where_an_observation_is_located(text, place):
    entities = radgraph_rules.annotate(text)["entities"]
    [opacity] = [entity for entity in entities.values() if entity["tokens"] == "opacity"]
    assert [(name, entities[number]["tokens"]) for name, number in opacity["relations"]] == [("located_at", place)]


def test_a_degree_is_that_of_the_next_observation():
    entities = radgraph_rules.annotate("mild opacity and large effusion")["entities"]
    of = {e["tokens"]: [entities[number]["tokens"] for _, number in e["relations"]] for e in entities.values()}
    assert (of["mild"], of["large"]) == (["opacity"], ["effusion"])


def test_an_endless_clause_is_read_in_parts():
    """So that time grows with a text's length; what a cue governs ends with its part."""
    found = radgraph_rules.annotate("no " + "edema " * 2_000)["entities"].values()
    labels = [entity["label"] for entity in found]
    assert labels == ["Observation::definitely absent"] * 99 + ["Observation::definitely present"] * 1_901
    assert [entity["start_ix"] for entity in found] == list(range(1, 2_001))


def test_radgraph_score_sees_side_and_negation():
    reference = "There is a small left pleural effusion. The lungs are clear."
    flipped, denied = reference.replace("left", "right"), reference.replace("There is a small", "No")
    worse = [flipped, denied, "The lungs are clear.", ""]
    scores = radgraph_rules.rule_radgraph([reference, *worse, ""], [reference] * 5 + [""])
    assert scores[0] == 1 and all(0 < value < 1 for value in scores[1:4]) and scores[4:] == [0, 1]


def test_radgraph_f1_equals_the_package():
    rewards = pytest.importorskip("radgraph.rewards")
    texts = ["Small left effusion. Heart is enlarged.", "No pleural effusion or pneumothorax. Heart is enlarged.",
             "Opacity in the left base may represent pneumonia.", "Left base opacity. Right pacemaker. Lungs clear.",
             "Left effusion and right effusion. No effusion at the base."]  # fmt: skip
    for level in ("simple", "partial", "complete"):
        for a in texts:
            package = [rewards.compute_reward(*map(radgraph_rules.annotate, (a, b)), level) for b in texts]
            assert radgraph_rules.rule_radgraph([a] * len(texts), texts, level) == pytest.approx(package)
