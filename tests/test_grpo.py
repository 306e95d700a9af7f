import math

import pytest
import torch

from grpo import group_advantages, grpo_loss, k3, rank_norm

ARGS = dict(eps_low=0.2, eps_high=0.2, beta=0.0)


def test_rank_norm_by_hand():
    expected = torch.tensor([-1 / 3, 2 / 3, 2 / 3, -1])
    torch.testing.assert_close(rank_norm(torch.tensor([1.0, 3.0, 3.0, 0.0])), expected)
    torch.testing.assert_close(
        rank_norm(torch.tensor([[5.0, 1.0], [0.0, 2.0]])), torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    )


def test_rank_norm_sums_to_zero_and_survives_a_group_of_one():
    torch.manual_seed(0)
    assert rank_norm(torch.randn(50, 8)).sum(-1).abs().max() < 1e-6
    assert rank_norm(torch.tensor([[0.7]])).tolist() == [[0.0]]


@pytest.mark.parametrize("kind", ["rank", "zscore", "mean"])
def test_equal_rewards_give_exactly_zero(kind):
    # 0.1 is not a binary fraction: the mean of eight of them differs from 0.1 by float residue
    assert group_advantages(torch.full((2, 8), 0.1), kind).tolist() == [[0.0] * 8] * 2


def test_zscore_and_mean_by_hand():
    rewards = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(group_advantages(rewards, "mean"), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(group_advantages(rewards, "zscore"), torch.tensor([-1.0, 1.0]) / 1.0001)
    with pytest.raises(ValueError, match="'best'"):
        group_advantages(rewards, "best")


def test_loss_by_hand_with_both_clips():
    # ratios 1.5 and 0.5; report 1 (A = +1): min(1.5, 1.2) = 1.2; report 2 (A = -1): min(-0.5, -0.8) = -0.8
    logps = torch.tensor([[math.log(1.5)], [math.log(0.5)]])
    loss, stats = grpo_loss(
        logps, torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1.0, -1.0]), torch.ones(2, 1), **ARGS
    )
    assert loss.item() == pytest.approx(-(1.2 - 0.8) / 2)
    assert stats["clipfrac"] == 1.0


def test_clip_does_not_bind_where_it_would_help():
    # a bad report (A = -1) that became more likely keeps its full ratio: min(-1.5, -1.2) = -1.5
    loss, stats = grpo_loss(
        torch.tensor([[math.log(1.5)]]),
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.tensor([-1.0]),
        torch.ones(1, 1),
        **ARGS,
    )
    assert loss.item() == pytest.approx(1.5)
    assert stats["clipfrac"] == 0.0


def test_eps_high_is_the_upper_bound_alone():
    args = dict(eps_low=0.2, eps_high=0.5, beta=0.0)
    loss, _ = grpo_loss(
        torch.tensor([[math.log(2.0)]]),
        torch.zeros(1, 1),
        torch.zeros(1, 1),
        torch.tensor([1.0]),
        torch.ones(1, 1),
        **args,
    )
    assert loss.item() == pytest.approx(-1.5)


def test_mean_over_tokens_inside_a_report_then_over_reports():
    # report 1 has one token with ratio e^0.1, report 2 two tokens with ratios 1: a token mean would weigh 1 : 2
    logps = torch.tensor([[0.1, 9.9], [0.0, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1]])
    loss, _ = grpo_loss(logps, torch.zeros(2, 2), logps, torch.tensor([1.0, 1.0]), mask, **ARGS)
    assert loss.item() == pytest.approx(-(math.exp(0.1) + 1) / 2)


def test_masked_tokens_have_no_gradient():
    logps = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss, _ = grpo_loss(
        logps,
        torch.zeros(2, 3),
        torch.zeros(2, 3) - 1,
        torch.tensor([1.0, -1.0]),
        mask,
        eps_low=0.2,
        eps_high=0.2,
        beta=0.1,
    )
    loss.backward()
    assert (logps.grad[mask == 0] == 0).all() and (logps.grad[mask == 1] != 0).all()


def test_kl_is_added_to_the_loss_and_descending_it_reduces_kl():
    logps = torch.tensor([[0.5, -0.7]], requires_grad=True)
    ref = torch.tensor([[0.0, 0.0]])

    def loss_of(beta):
        return grpo_loss(
            logps, logps.detach(), ref, torch.zeros(1), torch.ones(1, 2), eps_low=0.2, eps_high=0.2, beta=beta
        )

    loss, stats = loss_of(0.5)
    by_hand = [(math.exp(-0.5) + 0.5 - 1), (math.exp(0.7) - 0.7 - 1)]
    assert stats["kl"] == pytest.approx(sum(by_hand) / 2)
    assert loss.item() == pytest.approx(0.5 * sum(by_hand) / 2)
    before = k3(logps, ref).mean().item()
    loss.backward()
    with torch.no_grad():
        logps -= 0.1 * logps.grad
    assert k3(logps, ref).mean().item() < before


def test_k3_is_never_negative():
    torch.manual_seed(0)
    assert k3(torch.randn(1000), torch.randn(1000)).min() >= 0


def test_approx_kl_is_the_divergence_of_the_old_policy_from_the_current_one():
    """Four tokens drawn as the old policy (1/2, 1/4, 1/4) says: their mean is KL(old || current) without error."""
    old, current = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.05, 0.05, 0.9])
    token = torch.tensor([[0], [0], [1], [2]])  # four reports of one token each
    logps, old_logps = current.log()[token], old.log()[token]
    stats = grpo_loss(logps, old_logps, old_logps, torch.zeros(4), torch.ones(4, 1), **ARGS)[1]
    assert stats["approx_kl"] == pytest.approx((old * (old / current).log()).sum().item())
    assert stats["approx_kl"] != pytest.approx((current * (current / old).log()).sum().item(), rel=0.01)


def test_first_gradient_is_that_of_plain_policy_gradient():
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    loss, stats = grpo_loss(logps, logps.detach(), logps.detach(), torch.tensor([0.5]), torch.ones(1, 2), **ARGS)
    loss.backward()
    assert loss.item() == pytest.approx(-0.5) and stats["approx_kl"] == 0
    torch.testing.assert_close(logps.grad, torch.tensor([[-0.25, -0.25]]))


def test_inputs_are_left_alone():
    tensors = [torch.randn(3, 4) for _ in range(3)] + [torch.randn(3), torch.ones(3, 4)]
    copies = [t.clone() for t in tensors]
    grpo_loss(*tensors, eps_low=0.2, eps_high=0.2, beta=0.1)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))
