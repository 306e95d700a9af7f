import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from config import RewardConfig
from rewards import (
    Scorers,
    bleu4,
    compute_rewards,
    format_reward,
    image_text_similarity,
    mix_visual,
    rank_reward,
    require_format,
    rouge_l,
    text_reward,
    unwrap,
    wrap,
)


def test_wrap_and_unwrap():
    assert unwrap(wrap("no effusion")) == "no effusion"
    assert unwrap("\n <report>a\nb</report> ") == "a\nb"
    bad = ["no tags", "<report>open", "close</report>", "<report> </report>", "x <report>a</report>"]
    bad += ["<report>a</report> x", "<report>a</report><report>b</report>", "<report><report>a</report></report>"]
    assert [unwrap(text) for text in bad] == [None] * len(bad)


def test_format_reward_counts_sections():
    full = wrap("FINDINGS: clear. IMPRESSION: normal.")
    twice = wrap("FINDINGS: clear. IMPRESSION: normal. IMPRESSION: normal.")
    outputs = [full, twice, wrap("clear."), "clear."]
    assert format_reward(outputs) == [1, 1, 1, 0]
    assert format_reward(outputs, required_sections=("FINDINGS", "IMPRESSION")) == [1, 0, 0, 0]


def test_an_empty_shell_earns_no_format_reward():
    empty = ["FINDINGS: IMPRESSION:", "FINDINGS: ... IMPRESSION: !", "\u2026 IMPRESSION: FINDINGS:"]
    assert format_reward([wrap(text) for text in empty], ("FINDINGS", "IMPRESSION")) == [0] * len(empty)
    full = ["FINDINGS: clear IMPRESSION:", "IMPRESSION: normal. FINDINGS: clear.", "Chest. FINDINGS: IMPRESSION: 1"]
    assert format_reward([wrap(text) for text in full], ("FINDINGS", "IMPRESSION")) == [1] * len(full)
    assert format_reward([wrap("NOTE: IMPRESSION: x"), wrap("...")], ("IMPRESSION",)) == [1, 0]
    assert format_reward([wrap("NOTE:"), wrap("...")]) == [1, 0]


ODD = ["." * 300, "edema " * 2_000, "x" * 20_000, "\U0001f600" * 500, "\ud800 edema", "\x00", "\x00 edema", "", " \n",
       "</report>", "<report>", "\u200b", "\n\n"]  # fmt: skip


def test_an_odd_candidate_scores_low_and_ends_nothing():
    """As texts, and as outputs with and without tags; a good candidate beside them keeps its rewards."""
    good, word = "FINDINGS: clear lungs. IMPRESSION: no edema.", lambda texts: [float("clear" in t) for t in texts]
    scorers = Scorers(lambda texts: np.array([[t in ODD or "clear" in t] + [False] * 13 for t in texts]),
                      lambda c, r: word(c), lambda c, r: word(c), None)  # fmt: skip
    outputs = [*ODD, *map(wrap, ODD), wrap(good)]
    total, parts = compute_rewards([outputs], [good], [None], ["a"], scorers, RewardConfig(k_clin=1), k=1, stage=1)
    assert total.isfinite().all() and total.argmax() == len(outputs) - 1
    assert (parts["bleu4"][0, :-1] < 0.1).all() and (parts["rouge_l"][0, :-1] < 0.4).all()
    assert parts["format"][0].tolist() == [0] * (len(outputs) - 1) + [1]
    for reward in (bleu4, rouge_l):
        scores = reward(ODD, [good] * len(ODD))
        assert all(0 <= score < 0.4 for score in scores)


def test_rouge_l_reads_ascii_letters_and_digits_alone():
    assert rouge_l(["\u80ba", "a \u80ba", "\u00e9 a"], ["\u80ba", "a", "a"]) == [0, 1, 1]


def test_bleu4_conventions():
    reference = "the heart is mildly enlarged today"
    same, none, no_4gram, empty = bleu4([reference, "xyz", "the heart is big", ""], [reference] * 4)
    assert same == pytest.approx(1) and none == 0 and empty == 0
    assert 0 <= no_4gram < 0.01  # p1 = 3/4, p2 = 2/3, p3 = 1/2, p4 = 0
    # "a b c d e" against "a b c d f": p = 4/5, 3/4, 2/3, 1/2, no brevity penalty
    assert bleu4(["a b c d e"], ["a b c d f"])[0] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # brevity penalty of 4 tokens against 5: exp(1 - 5/4)
    assert bleu4(["a b c d"], ["a b c d e"])[0] == pytest.approx(math.exp(-0.25))


def test_rouge_l_by_hand():
    # longest common subsequence of (a b c d) and (a c e): a c -> P = 2/4, R = 2/3, F = 4/7
    assert rouge_l(["a b c d"], ["a c e"])[0] == pytest.approx(4 / 7)
    assert rouge_l([""], ["a"]) == [0]


def test_rank_reward_literal_by_hand():
    torch.testing.assert_close(rank_reward(torch.tensor([0.9, 0.1, 0.5])), torch.tensor([1.0, 0.0, 0.5]))
    s = torch.tensor([[0.1, 0.4, 0.4, 0.2]])
    torch.testing.assert_close(rank_reward(s), torch.tensor([[0, 5 / 6, 5 / 6, 1 / 3]]))
    torch.testing.assert_close(rank_reward(torch.full((8,), 0.3)), torch.full((8,), 0.5))
    with pytest.raises(ValueError, match="group of at least 2"):
        rank_reward(torch.tensor([0.5]))


def test_rank_reward_soft_by_hand_and_in_its_limit():
    s = torch.tensor([0.50, 0.47, 0.20])
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [(sigmoid(1) + sigmoid(10)) / 2, (sigmoid(-1) + sigmoid(9)) / 2, (sigmoid(-10) + sigmoid(-9)) / 2]
    torch.testing.assert_close(rank_reward(s, "soft", 0.03), torch.tensor(expected))
    torch.testing.assert_close(rank_reward(s, "soft", 1e-5), rank_reward(s, "literal"))


def test_mix_visual():
    text, visual = torch.tensor([[1.0, 1.2]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(mix_visual(text, visual, 0.25), torch.tensor([[0.75, 1.15]]))
    torch.testing.assert_close(mix_visual(text, visual, 0.5, "ranked"), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(mix_visual(text, visual, 0.0), text)


def test_text_reward_is_eqs_3_to_5():
    parts = defaultdict(lambda: torch.tensor(0.0))  # a component of somebody's own is 0 here
    parts |= {"bleu4": torch.tensor(0.2), "rouge_l": torch.tensor(0.4), "bertscore": torch.tensor(0.9)}
    cfg = RewardConfig(lambda_lex=0.3, lambda_sem=0.7, lambda_clin=2, lambda_cx=0.25, lambda_rg=0.75)
    assert text_reward(parts, cfg).item() == pytest.approx(0.3 * 0.6 + 0.7 * 0.9)
    parts |= {"chexbert": torch.tensor(0.8), "radgraph": torch.tensor(0.4)}
    assert text_reward(parts, cfg).item() == pytest.approx(0.81 + 2 * (0.25 * 0.8 + 0.75 * 0.4))


@pytest.fixture
def scorers():
    """Scorers by word overlap and by length: real functions of the text, without models."""

    def overlap(candidates, references):
        return [float(bool(set(c.split()) & set(r.split()))) for c, r in zip(candidates, references, strict=True)]

    return Scorers(
        label=lambda texts: np.array([["effusion" in t] + [False] * 13 for t in texts], dtype=bool).reshape(-1, 14),
        bertscore=overlap,
        radgraph=overlap,
        similarity=lambda images, ids, groups: torch.tensor([[len(t) / 100 for t in group] for group in groups]),
    )


def run(scorers, outputs, cfg, **kwargs):
    n = len(outputs)
    return compute_rewards(outputs, ["small effusion"] * n, [None] * n, ["s1", "s2"][:n], scorers, cfg, **kwargs)


def test_clinical_part_comes_every_k_clin_updates_in_both_stages(scorers):
    outputs = [[wrap("small effusion"), wrap("clear lungs")]]
    cfg = RewardConfig(k_clin=3, required_sections=())
    for stage in (1, 2):
        with_clinical = [k for k in range(1, 10) if "chexbert" in run(scorers, outputs, cfg, k=k, stage=stage)[1]]
        assert with_clinical == [3, 6, 9]
    total, parts = run(scorers, outputs, cfg, k=3, stage=1)
    assert parts["chexbert"].tolist() == [[1.0, 0.0]]
    assert total[0, 0].item() == pytest.approx(0.5 * 2 + 0.5 + 1.0 + 0.5)  # all components 1, format 0.5
    assert "chexbert" not in run(scorers, outputs, RewardConfig(k_clin=0), k=4, stage=1)[1]


def test_stage_2_mixes_in_the_visual_reward_and_keeps_the_format_reward(scorers):
    outputs = [[wrap("small effusion of the left side"), wrap("clear"), wrap("clear lungs")]]
    cfg = RewardConfig(lambda_vis=1.0, rank="literal", required_sections=(), k_clin=0)
    total, parts = run(scorers, outputs, cfg, k=1, stage=2)
    assert parts["visual"].tolist() == [[1.0, 0.0, 0.5]]
    assert total.tolist() == [[1.5, 0.5, 1.0]]
    assert "visual" not in run(scorers, outputs, cfg, k=1, stage=1)[1]


def test_unreadable_candidates_score_zero_everywhere_and_rank_last(scorers):
    outputs = [["small effusion", wrap("x"), "<report> small effusion", wrap("small effusion")]]
    total, parts = run(scorers, outputs, RewardConfig(k_clin=1, required_sections=()), k=1, stage=2)
    for name in ("bleu4", "rouge_l", "bertscore", "chexbert", "radgraph", "visual", "format"):
        assert parts[name][0, [0, 2]].tolist() == [0, 0], name
    assert total[0, [0, 2]].tolist() == [0, 0]
    assert parts["bleu4"][0, 3] == pytest.approx(1)  # the scores land on the rows they belong to
    assert parts["similarity"][0].isnan().tolist() == [True, False, True, False]  # no -1 in the log's mean and spread
    nothing = run(scorers, [["a", "b"]], RewardConfig(k_clin=1), k=1, stage=2)[0]
    assert nothing.tolist() == [[0, 0]]


@pytest.mark.parametrize("values", [[1, 0], np.array([0.25, 1.0]), [np.float64(0.5), True]])
def test_a_reward_may_return_any_numbers(scorers, values):
    scorers.bertscore = lambda candidates, references: values
    total, parts = run(scorers, [[wrap("one"), wrap("two")]], RewardConfig(k_clin=0), k=1, stage=1)
    assert parts["bertscore"].tolist() == [list(map(float, values))] and total.dtype == torch.float32


def test_similarity_is_the_cosine():
    """Eq. 6 by hand: (0.6, 0.8) against three directions; rounding above 1 is cut off."""
    image, text = torch.tensor([[0.6, 0.8]]), torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]]])
    torch.testing.assert_close(image_text_similarity(image, text), torch.tensor([[0.6, 1.0, -0.8]]))
    assert image_text_similarity(1.001 * image, text).max() == 1


def test_references_must_have_the_format_that_is_asked_for(capsys):
    both, findings = "FINDINGS: a IMPRESSION: b", "clear lungs"
    require_format([both, both], ("FINDINGS", "IMPRESSION"))
    require_format([findings], ())
    assert capsys.readouterr().out == ""
    require_format([both, both, findings], ("FINDINGS", "IMPRESSION"))
    assert "1 of 3 references lack 'FINDINGS:' and 'IMPRESSION:'" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 of 3 references lack .*; set rewards.required_sections"):
        require_format([both, findings, findings], ("FINDINGS", "IMPRESSION"))


def test_a_non_finite_reward_names_study_and_component(scorers):
    scorers.bertscore = lambda c, r: [float("nan") if "bad" in t else 0.5 for t in c]
    outputs = [[wrap("fine"), wrap("fine")], [wrap("bad"), wrap("fine")]]
    with pytest.raises(ValueError, match="'bertscore' of study s2"):
        run(scorers, outputs, RewardConfig(), k=1, stage=1)
