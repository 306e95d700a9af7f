"""Direct preference optimisation, a baseline beside GRPO: the loss, nothing else.

DPO is Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7); the weights are MMedPO's (arXiv 2412.06141), which also pairs one
report under two images: `train.dpo_update` gives each side log-probs under its own.
"""

import torch
from torch.nn.functional import logsigmoid


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, weights=None):
    """Mean over B pairs of w * -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).

    All (B,): log-probs summed over a report's tokens, EOS included, at temperature 1, under the policy and the
    reference policy, which gets no gradient. weights: (B,), None = 1. Returns (scalar loss, stats): `chosen_reward` and
    `rejected_reward`, beta times the log-ratio to the reference policy, `margin`, chosen less rejected, and `accuracy`,
    how often that is positive [TRL's rewards/*]; means over the pairs, not weighted.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps.detach())  # (B,)
    rejected = beta * (rejected_logps - ref_rejected_logps.detach())  # (B,)
    losses = -logsigmoid(chosen - rejected)  # (B,)
    loss = (losses if weights is None else weights * losses).mean()  # scalar
    with torch.no_grad():
        margin = chosen - rejected  # (B,)
        stats = {"accuracy": (margin > 0).to(margin.dtype), "margin": margin, "chosen_reward": chosen,
                 "rejected_reward": rejected}  # (B,) each  # fmt: skip
        return loss, {name: x.mean().item() for name, x in stats.items()}
