"""Group-relative policy optimisation: advantages (Eq. 9) and the clipped loss with KL (Eq. 10), nothing else.

Differences from the paper, each on purpose:
* Eq. 9's RankNorm is not defined there. Ours: average ranks mapped linearly to [-1, 1].
* Eq. 10 is printed as -(...) - beta KL, which would reward drifting from the reference policy. Ours: + beta KL.
* The ratio written r^vis in Eq. 10 is the importance ratio pi / pi_old, not Eq. 7's reward.
* KL is the per-token k3 estimator of GRPO (DeepSeekMath, arXiv 2402.03300, Eq. 4), never negative. Its *value* is
  unbiased for samples of the current policy; its gradient is not that of KL(pi || ref) (nearer to KL(ref || pi)'s), and
  after an inner update the samples are the old policy's, not the current one's.
"""

import torch
from torch import Tensor


def rank_norm(rewards: Tensor) -> Tensor:
    """Eq. 9: rewards (..., G) -> advantages (..., G) in [-1, 1].

    A_i = (number of candidates below i - number above i) / (G - 1), the average rank mapped linearly: ties share their
    value, the sum is 0, a group of equal rewards gets exactly 0. rank_norm([1, 3, 3, 0]) = [-1/3, 2/3, 2/3, -1].
    """
    difference = rewards[..., :, None] - rewards[..., None, :]  # (..., G, G)
    return difference.sign().sum(dim=-1) / max(rewards.shape[-1] - 1, 1)


def group_advantages(rewards: Tensor, kind: str = "rank") -> Tensor:
    """Rewards (..., G) -> advantages (..., G) by `rank` (Eq. 9), `zscore` (GRPO, DeepSeekMath) or `mean` (Dr. GRPO)."""
    if kind == "rank":
        return rank_norm(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)  # (..., G)
    spread = rewards.std(dim=-1, keepdim=True, correction=0)  # (..., 1)
    # eight rewards of 0.1 have a float residue as "spread": dividing by it would invent an advantage of -0.4
    centred = torch.where(spread > 1e-6, centred, torch.zeros_like(centred))  # (..., G)
    if kind == "mean":
        return centred
    if kind == "zscore":
        return centred / (spread + 1e-4)  # 1e-4 as in TRL
    raise ValueError(f"advantage must be rank, zscore or mean, got '{kind}'")


def grpo_loss(logps, old_logps, ref_logps, advantages, completion_mask, *, eps_low, eps_high, beta):
    """Eq. 10 as a loss to minimise: mean over a report's tokens, then over the N reports.

    logps, old_logps, ref_logps: (N, T) log-probs of the sampled tokens under the current policy (the only one with
    a gradient), the policy that sampled them, and the SFT policy. advantages: (N,). completion_mask: (N, T), 1 =
    report token. Returns (scalar loss, stats): `kl`, `clipfrac` and `approx_kl`, which is KL(old || current), as the
    old policy drew the tokens [CleanRL's (r - 1) - log r]; each averaged like the loss.
    """
    mask = completion_mask.to(logps.dtype)  # (N, T)

    def per_report_mean(x: Tensor) -> Tensor:  # (N, T) -> scalar
        return ((x * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)).mean()

    ratio = (logps - old_logps.detach()).exp()  # (N, T)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)  # (N, T)
    advantage = advantages.detach()[:, None]  # (N, 1)
    objective = torch.minimum(ratio * advantage, clipped * advantage)  # (N, T)
    kl = k3(logps, ref_logps.detach())  # (N, T)
    loss = per_report_mean(beta * kl - objective)  # scalar
    with torch.no_grad():
        is_clipped = (ratio * advantage > clipped * advantage).to(mask.dtype)  # (N, T)
        stats = {"kl": kl, "clipfrac": is_clipped, "approx_kl": k3(old_logps, logps)}  # (N, T) each
        return loss, {name: per_report_mean(x).item() for name, x in stats.items()}


def k3(logps: Tensor, other_logps: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(pi || other) at tokens sampled from pi: exp(d) - d - 1 with d = other - logp.

    logps, other_logps: (N, T) -> (N, T).
    """
    difference = other_logps - logps  # (N, T)
    return difference.exp() - difference - 1
