"""Rewards of candidate reports, Eqs. 3-8 and the format reward: plain functions, then their weighted sum.

    R_ver  = lambda_lex (BLEU-4 + ROUGE-L) + lambda_sem BERTScore                        Eq. 3
    R_clin = lambda_cx CheXbert-F1 + lambda_rg RadGraph-F1                               Eq. 4
    R_text = R_ver + lambda_clin R_clin  when k mod k_clin == 0, else R_ver              Eq. 5
    S      = cos(text embedding, image feature) of the frozen expert                     Eq. 6
    r_vis  = rank of S inside the group, literal or soft, in [0, 1]                      Eq. 7
    R_vis  = (1 - lambda_vis) R_text + lambda_vis r_vis                                  Eq. 8
    reward = R_text (Stage 1) or R_vis (Stage 2), + lambda_format R_format

Each text reward takes a flat list of candidates and one of references, and returns floats in [0, 1]. A candidate
without a readable report (no single <report>...</report>) scores 0 on every component.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sacrebleu
import torch
from torch import Tensor

from config import RewardConfig

OPEN, CLOSE = "<report>", "</report>"
# floor 1e-9: without a common 4-gram the score is about 0, as in the corpus definition; the default smoothing would pay
# up to .1 for it. effective_order: a text shorter than 4 tokens is judged on the n-grams it has.
BLEU = sacrebleu.BLEU(smooth_method="floor", smooth_value=1e-9, effective_order=True, lowercase=True)


def wrap(text: str) -> str:
    """The text a policy learns to write for a report: `<report> ... </report>`."""
    return f"{OPEN} {text.strip()} {CLOSE}"


def unwrap(output: str) -> str | None:
    """The text inside the tags, or None unless the output is exactly one `<report>...</report>` with text inside."""
    match = re.fullmatch(rf"\s*{OPEN}(.*?){CLOSE}\s*", output, flags=re.DOTALL)
    if match is None or OPEN in match[1] or CLOSE in match[1]:
        return None
    return match[1].strip() or None


def strip_tags(output: str) -> str:
    """The text between the tags, or the output with stray tags stripped."""
    text = unwrap(output)
    return " ".join(re.sub(r"</?report>", " ", output).split()) if text is None else text


def format_reward(candidates: list[str], required_sections: tuple[str, ...] = ()) -> list[float]:
    """1 when the output is one tagged report (see `unwrap`) that says a word and in which each required header, as in
    "FINDINGS:", stands exactly once; else 0 (VALOR, "Format Reward"). Takes raw outputs, tags included."""
    header, scores = rf"\b({'|'.join(map(re.escape, required_sections)) or '(?!)'}):", []
    for text in (unwrap(output) or "" for output in candidates):
        complete = sorted(re.findall(header, text)) == sorted({*required_sections})
        scores.append(float(complete and bool(re.search(r"\w", re.sub(header, " ", text)))))
    return scores


def bleu4(candidates: list[str], references: list[str]) -> list[float]:
    """Sentence-level BLEU-4 in [0, 1] per pair: sacrebleu, 13a tokens, lower-cased, zero counts floored at 1e-9."""
    return [BLEU.sentence_score(c, [r]).score / 100 for c, r in zip(candidates, references, strict=True)]


@functools.cache
def _rouge():
    from rouge_score import rouge_scorer  # here, as it brings all of nltk: a second of every script's start

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(candidates: list[str], references: list[str]) -> list[float]:
    """ROUGE-L F1 in [0, 1] per pair by rouge-score: lower-cased words of a-z and 0-9, all else dropped, no stemming."""
    return [_rouge().score(r, c)["rougeL"].fmeasure for c, r in zip(candidates, references, strict=True)]


def label_f1(candidate_positive: np.ndarray, reference_positive: np.ndarray) -> list[float]:
    """Eq. 4's s_cx: micro-F1 of each pair of (n, 14) bool rows; no positive in either = 1, in one only = 0.

    No Finding counts like any other label, so two normal reports agree on something.
    """
    candidate, reference = np.asarray(candidate_positive, bool), np.asarray(reference_positive, bool)
    both = (candidate & reference).sum(axis=1)
    stated = candidate.sum(axis=1) + reference.sum(axis=1)
    return np.where(stated == 0, 1.0, 2 * both / np.maximum(stated, 1)).tolist()


def rank_reward(similarities: Tensor, rank: str = "literal", tau: float = 0.03) -> Tensor:
    """Eq. 7: similarities (..., G) -> r_vis (..., G) in [0, 1], 1 = most similar to the image.

    literal: 1 - (rank - 1) / (G - 1); ties share their average rank. [.1, .4, .4, .2] -> [0, 5/6, 5/6, 1/3].
    soft:    mean over j != i of sigmoid((S_i - S_j) / tau). The hard rank blows differences that are mere paraphrase
             up to the full [0, 1]; the soft one keeps near-ties near 1/2. tau -> 0 is the literal form.
    Raises ValueError for G = 1.
    """
    group_size = similarities.shape[-1]
    if group_size < 2:
        raise ValueError("rank_reward needs a group of at least 2 candidates; set rollout.group_size")
    difference = similarities[..., :, None] - similarities[..., None, :]  # (..., G, G)
    wins = (difference / tau).sigmoid() if rank == "soft" else (difference.sign() + 1) / 2  # literal: 1, 1/2 tied, or 0
    return (wins.sum(dim=-1) - 0.5) / (group_size - 1)  # less the candidate's tie with itself


def mix_visual(r_text: Tensor, r_vis: Tensor, lambda_vis: float, mix: str = "raw") -> Tensor:
    """Eq. 8 on (B, G) tensors. `raw` as printed; `ranked` first ranks R_text to [0, 1] inside its group.

    The literal r_vis spans [0, 1] in every group while R_text often spans a few hundredths: raw with lambda_vis = 0.5
    is no even mix.
    """
    r_text = rank_reward(r_text) if mix == "ranked" else r_text
    return (1 - lambda_vis) * r_text + lambda_vis * r_vis


def image_text_similarity(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Eq. 6: cosine of image features (B, D) and text embeddings (B, G, D), both of length 1 -> (B, G) in [-1, 1]."""
    return torch.einsum("bd,bgd->bg", image_features, text_features).clamp(-1, 1)


@dataclass
class Scorers:
    """The frozen models behind the rewards, as plain functions on lists of texts (scorers/load.py)."""

    label: Callable  # texts -> (n, 14) bool, CheXbert's positives
    bertscore: Callable  # candidates, references -> list of floats
    radgraph: Callable  # candidates, references -> list of floats
    similarity: Callable | None  # images, ids, groups [B][G] -> (B, G), Eq. 6; None, as of the others: not loaded


def text_components(candidates: list[str], references: list[str], scorers: Scorers, clinical_too: bool) -> dict:
    """Every text reward of N candidate-reference pairs, by name. To add one, add a line here and weigh it below."""
    parts = {
        "bleu4": bleu4(candidates, references),
        "rouge_l": rouge_l(candidates, references),
        "bertscore": scorers.bertscore(candidates, references),
    }
    if clinical_too:
        parts["chexbert"] = label_f1(scorers.label(candidates), scorers.label(references))
        parts["radgraph"] = scorers.radgraph(candidates, references)
    return parts


def text_reward(parts: dict[str, Tensor], cfg: RewardConfig) -> Tensor:
    """Eqs. 3-5: the weighted sum of text components, each (B, G) -> (B, G)."""
    total = cfg.lambda_lex * (parts["bleu4"] + parts["rouge_l"]) + cfg.lambda_sem * parts["bertscore"]  # Eq. 3
    if "chexbert" in parts:
        clinical = cfg.lambda_cx * parts["chexbert"] + cfg.lambda_rg * parts["radgraph"]  # Eq. 4
        total = total + cfg.lambda_clin * clinical  # Eq. 5
    return total


def compute_rewards(
    outputs: list[list[str]], references: list[str], images: list, ids: list[str], scorers: Scorers, cfg: RewardConfig,
    *, k: int, stage: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Rewards of G candidates for each of B studies at global update k (counted from 1, over both stages).

    outputs: [B][G] raw decoded texts. references: B texts without tags. Returns (total (B, G), components by name,
    each (B, G)); the component `similarity` is NaN where a candidate is not readable. Raises ValueError naming study
    and component when a value is not finite.
    """
    texts = [[unwrap(output) for output in group] for group in outputs]
    readable = torch.tensor([[text is not None for text in group] for group in texts])  # (B, G)
    flat = [(text, ref) for group, ref in zip(texts, references, strict=True) for text in group if text is not None]
    clinical_too = cfg.k_clin > 0 and k % cfg.k_clin == 0  # Eq. 5
    columns = text_components([t for t, _ in flat], [r for _, r in flat], scorers, clinical_too)
    parts = {name: torch.zeros(readable.shape).masked_scatter(readable, torch.tensor(values, dtype=torch.float32))
             for name, values in columns.items()}  # fmt: skip
    total = text_reward(parts, cfg)
    if stage == 2 and cfg.lambda_vis > 0:
        s = scorers.similarity(images, ids, [[text or "" for text in group] for group in texts])  # Eq. 6, (B, G)
        s = torch.where(readable, s, torch.full_like(s, -1.0))  # a cosine's minimum: last in its group
        parts["similarity"] = s
        parts["visual"] = rank_reward(s, cfg.rank, cfg.tau) * readable  # Eq. 7
        total = mix_visual(total, parts["visual"], cfg.lambda_vis, cfg.mix)  # Eq. 8
    formats = format_reward([output for group in outputs for output in group], cfg.required_sections)
    parts["format"] = torch.tensor(formats).view(readable.shape)
    total = total + cfg.lambda_format * parts["format"]  # after Eq. 8, so that lambda_vis = 1 keeps it
    check_finite(parts, ids)
    if "similarity" in parts:  # the log's mean and spread are of texts that there are
        parts["similarity"] = parts["similarity"].masked_fill(~readable, math.nan)
    return total, parts


def check_finite(parts: dict[str, Tensor], ids: list[str]) -> None:
    """Raise ValueError naming the first study and component with a value that is not finite."""
    for name, values in parts.items():
        for study_id, row in zip(ids, values.tolist(), strict=True):
            if not all(map(math.isfinite, row)):
                raise ValueError(f"reward '{name}' of study {study_id} is not finite: {row}")


def require_format(references: list[str], required_sections: tuple[str, ...]) -> None:
    """Score the references' own format; ValueError where most fail it: then every correct report would be punished."""
    failed = format_reward([wrap(reference) for reference in references], required_sections).count(0.0)
    if failed:
        wanted = " and ".join(f"'{name}:'" for name in required_sections)
        said = f"{failed} of {len(references)} references lack {wanted} exactly once: their own format reward is 0"
        if 2 * failed > len(references):
            raise ValueError(f"{said}; set rewards.required_sections to what data.target gives, e.g. to nothing")
        print(f"rewards: {said}")
