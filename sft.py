"""Stage 0: supervised fine-tuning on reference reports (Eq. 2).

The loss is the negative log-likelihood of the report's tokens, EOS included, image and prompt tokens never. The
paper sums over a report's tokens; here the batch's sum is divided by its number of report tokens, so the scale of the
gradient does not depend on how long the reports are.
"""

from torch import Tensor

from config import Config
from model import completion_logps, sampling_rules, tokenize_reports


def sft_loss(logps: Tensor, completion_mask: Tensor, total_tokens: int | Tensor | None = None) -> Tensor:
    """Eq. 2: -sum of log-probs (B, T) where completion_mask (B, T) is 1, over the number of report tokens.

    total_tokens: the divisor where the batch is split over micro-batches or processes; None = this batch's own.
    """
    return -(logps * completion_mask).sum() / (completion_mask.sum() if total_tokens is None else total_tokens)


def text_logps(
    model, processor, inputs: dict[str, Tensor], texts: list[str], cfg: Config
) -> tuple[Tensor, Tensor, int]:
    """Log-probs (B, T) and mask (B, T) of `texts` after the encoded prompts (batch B), and how many texts were cut
    at `cfg.rollout.max_new_tokens`."""
    rules = sampling_rules(model, processor, cfg)
    rules.temperature, rules.min_new_tokens = 1.0, 0  # Eq. 2 is about the model itself, not about how it is sampled
    tokens, mask, cut = tokenize_reports(processor, texts, cfg.rollout.max_new_tokens, inputs["input_ids"].device)
    return completion_logps(model, inputs, tokens, mask, rules), mask, cut
