"""Metrics of evaluation, each a function of sums over studies, so that one bootstrap serves them all.

`collect` turns texts into sufficient statistics: for every family of metrics an array (n studies, k) that adds up over
studies (a study's samples already summed). `METRICS` maps each metric's name to its family and a function of the
summed array, and `summarise` gives value and 95% interval. Resampling is always by whole study.

Conventions. BLEU-1..4 and ROUGE-L (beta 1.2) are pycocoevalcap's, the field's (corpus BLEU, unsmoothed; mean of
ROUGE-L), on the tokens of protocols.py; sacrebleu and rouge-score, which the rewards use, give other numbers for the
same text. bleu_mean, the mean of BLEU-1..4, is what some papers call BLEU. METEOR: meteor.py. Label precision, recall
and F1 are CheXbert's: 14 labels or, with the suffix _5, the five that its paper reports; positive or uncertain = 1; a
label that neither side states counts 0 in the macro mean, as in scikit-learn. GREEN's mean is over the readable
answers. Truth-based metrics are ratios, in metrics.toml, of what `reader.truth_counts` (gold labels:
`findings.finding_counts`), `reader.section_counts` and spill.py count, but for `equal_hallucination` and `looked_f1`.
All values are fractions, lengths are words; nothing by nothing is NaN.
"""

import math
import tomllib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu import bleu_scorer
from tqdm import tqdm

from config import Config
from data import Study
from evidence.findings import finding_counts, read_findings
from evidence.meteor import corpus_meteor
from evidence.protocols import tokens
from evidence.reader import BOTH, SECTION_KEYS, UNSIDED, label_of, read_report, repeats, section_counts, truth_counts
from formats.gold import FINDINGS, plain
from phantom.findings import LABELS as SIDED_LABELS
from rewards import format_reward, strip_tags

LABELS, FIVE = list(range(14)), [1, 4, 5, 7, 9]  # all of chexbert.CHEXPERT_LABELS, the places of chexbert.FIVE
MEASURES = ("precision", "recall", "f1")
TRUTH_KEYS = tuple(truth_counts("", []))
# of each counterfactual study: reports a film; how many state the guess where neither it nor its cause, the cause, or
# both are on the film; the same of the cause, reports first, where nothing else suggests it
SPILL_KEYS = ("reports", "guess_neither", "guess_cause", "guess_both", "free", "cause_neither", "cause_cause")
KEYS = {"truth": TRUTH_KEYS, "sections": SECTION_KEYS, "spill": SPILL_KEYS}
# k of a family's (n, k); 2 for all others
WIDTHS = {"bleu": 10, "meteor": 23, "labels": 42, "green": 3, "looked": 16} | {of: len(KEYS[of]) for of in KEYS}
TABLE = tomllib.loads(Path(__file__).with_name("metrics.toml").read_text(encoding="utf-8"))
AT_ONCE = 2**23  # numbers of a bootstrap's draws in memory


@lru_cache(maxsize=10_000)  # normal reports are often alike
def bleu_stats(candidate: str, reference: str) -> list[int]:
    """[matching 1..4-grams, the candidate's 1..4-grams, candidate length, reference length] (10 integers)."""
    found = bleu_scorer.cook_test(candidate, bleu_scorer.cook_refs([reference]))
    return [*found["correct"], *found["guess"], found["testlen"], *found["reflen"]]


@lru_cache(maxsize=10_000)
def rouge_l(candidate: str, reference: str, beta: float = 1.2) -> float:
    """ROUGE-L of one pair, tokens split at each blank, as pycocoevalcap computes it; 0 when either side is empty."""
    a, b = sorted((candidate.split(" "), reference.split(" ")), key=len)
    if not candidate or not reference:
        return 0.0
    # the longest common subsequence in whole rows of its table, as bits of an integer [Hyyro 2004]: pycocoevalcap's
    # cell by cell gives the same and is a hundred times as slow
    places, every = {}, (1 << len(a)) - 1
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    row = every
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & every
    common = len(a) - row.bit_count()
    precision, recall = common / len(candidate.split(" ")), common / len(reference.split(" "))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if common else 0.0


def label_stats(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Boolean (n, 14) twice -> (n, 42): true positives, false positives, false negatives of each label."""
    return np.concatenate([ours & theirs, ours & ~theirs, ~ours & theirs], axis=-1).astype(float)


def bleu(sums: np.ndarray) -> np.ndarray:
    """(..., 10) -> (..., 4): corpus BLEU-1..4 as pycocoevalcap computes it, its `tiny` and `small` included."""
    tiny, small = 1e-15, 1e-9
    precisions = (sums[..., :4] + tiny) / (sums[..., 4:8] + small)
    # Python's own pow and exp, as there: numpy's have another last bit on some CPUs
    scores = np.vectorize(math.pow)(np.cumprod(precisions, axis=-1), 1 / np.arange(1, 5))
    ratio = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    return scores * np.vectorize(math.exp)(np.minimum(0, 1 - 1 / ratio))[..., None]


def label_scores(sums: np.ndarray) -> np.ndarray:
    """(..., 3 * k) true positives, false positives, false negatives of k labels -> (3, ..., k): the MEASURES."""
    tp, fp, fn = np.split(sums, 3, axis=-1)
    return np.stack([divide(tp, tp + fp), divide(tp, tp + fn), divide(2 * tp, 2 * tp + fp + fn)])


def label_average(sums: np.ndarray, measure: str, average: str, labels: list[int]) -> np.ndarray:
    """(..., 42) -> (...): a measure's `macro`, the mean over labels, or `micro`, over all decisions."""
    place = MEASURES.index(measure)
    if average == "macro":
        return np.nan_to_num(label_scores(sums)[place])[..., labels].mean(-1)
    counts = sums.reshape(*sums.shape[:-1], 3, 14)[..., labels].sum(-1)  # (..., 3)
    return label_scores(counts)[place, ..., 0]


def stated_labels(text: str, labels: list[str] = (), rng: np.random.Generator | None = None) -> set[str]:
    """The phantom's labels that a text states; a finding without its side: on one that `rng` draws, else on the first
    that `labels` have it on."""

    def given(name: str) -> str:
        return rng.choice(BOTH) if rng else next((side for side in BOTH if f"{name}_{side}" in labels), BOTH[0])

    said = sorted(read_report(text).stated, key=str)
    return {label_of((name, side or (None if name in UNSIDED else given(name)))) for name, side in said}


def levels(texts: list[str], labels: list[str], gold: bool = False) -> np.ndarray:
    """(2 * (K + 1),) how many labels are stated by 0, 1, ..., K of a study's K texts: of those in the image, then of
    all others; gold labels without their sides. Sums over studies are all that `equal_hallucination` needs."""
    names, labels = (FINDINGS, plain(labels)) if gold else (SIDED_LABELS, labels)
    stated = [{name for name, _ in read_findings(t).stated} if gold else stated_labels(t, labels) for t in texts]
    said = Counter(label for of in stated for label in of)
    sides = [[said[label] for label in names if (label in labels) == true] for true in (True, False)]
    return np.concatenate([np.bincount(np.array(side, int), minlength=len(texts) + 1) for side in sides])


def equal_hallucination(sums: np.ndarray) -> np.ndarray:
    """(..., 2 * (K + 1)) sums of `levels` -> (...): hallucination at an equal number of stated findings.

    All pairs of a study and a label are ordered by the share of the study's K samples that state them, and the first n
    are taken as stated, n the number of findings in the images: alike for all policies, however much they say. Given is
    the share of these n that the image lacks: 1 - precision at n. Of pairs with one share, where the n end among them,
    an equal part of the true and the false is taken: the expected value of a random order. NaN without any finding.
    """
    counts = sums.reshape(*sums.shape[:-1], 2, -1)[..., ::-1]  # (..., true or false, K + 1), most often stated first
    tied, n = counts.sum(-2), counts[..., 0, :].sum(-1, keepdims=True)  # (..., K + 1), (..., 1)
    part = np.nan_to_num(divide(np.clip(n - (tied.cumsum(-1) - tied), 0, tied), tied))  # taken of those tied
    return divide((part * counts[..., 1, :]).sum(-1), n[..., 0])


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def mean(sums: np.ndarray) -> np.ndarray:
    """(..., 2 or more) sums of values and of ones -> (...)."""
    return divide(sums[..., 0], sums[..., 1])


def ratio(keys: tuple[str, ...], above: dict[str, int], below: dict[str, int]) -> Callable:
    """The function (..., len(keys)) -> (...) that divides one weighted sum of the keys, {key: weight}, by another."""

    def weigh(sums: np.ndarray, weights: dict[str, int]) -> np.ndarray:
        return sum(weight * sums[..., keys.index(key)] for key, weight in weights.items())

    return lambda sums: divide(weigh(sums, above), weigh(sums, below))


# name: (family of statistics, function of their sums); in which table, under which title: columns.toml
METRICS: dict[str, tuple[str, Callable]] = {
    **{f"bleu_{n}": ("bleu", lambda sums, n=n: bleu(sums)[..., n - 1]) for n in range(1, 5)},
    "bleu_mean": ("bleu", lambda sums: bleu(sums).mean(-1)),
    "meteor": ("meteor", corpus_meteor),
    **{
        f"{measure}_{average}{suffix}": ("labels", partial(label_average, measure=measure, average=average, labels=of))
        for suffix, of in (("", LABELS), ("_5", FIVE))
        for average in ("micro", "macro")
        for measure in MEASURES
    },
    **{name: (family, mean) for name, family in TABLE["means"].items()},
    **{name: (of, ratio(KEYS[of], *sums)) for of in KEYS for name, sums in TABLE["ratios"][of].items()},
    # of truth counts of reports, and of those given to other studies: what hangs on the image
    "looked_f1": ("looked", lambda sums: METRICS["sided_f1"][1](sums[..., :8]) - METRICS["sided_f1"][1](sums[..., 8:])),
    "equal_hallucination": ("levels", equal_hallucination),
    "distinct": ("distinct", lambda sums: sums[..., 0]),
}


def collect(
    texts: list[list[str]], references: list[str], *, protocol: str = "raw",
    formats: list[list[float]] | None = None, labels: list[list[str]] | None = None, gold: bool = False,
    label: Callable | None = None, meteor: Callable | None = None, green: Callable | None = None, **scorers: Callable,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Sufficient statistics {family: (n studies, k)} of `texts` [study][sample] against one reference a study.

    formats [study][sample]: format rewards; labels: each study's exact or (gold) gold labels. The functions take flat
    lists: label(texts) -> (m, 14) bool; meteor(candidates, references) -> (m, 23) or None: no such family; green and
    the other scorers {family: function} -> m floats, where green's None (no readable answer) is left out of its mean.
    """
    given = zip(texts, references, labels or [None] * len(texts), strict=True)
    rows = [(text, *study) for group, *study in given for text in group]
    candidates, repeated, known = map(list, zip(*rows, strict=True))
    words = [tokens(text, reference, protocol) for text, reference, _ in rows]
    bar, times = tqdm(words, "BLEU, ROUGE-L", delay=5, mininterval=1, leave=False), Counter(candidates)
    bleus, rouges = zip(*((bleu_stats(*pair), rouge_l(*pair)) for pair in bar), strict=True)
    flat = {family: scorer(candidates, repeated) for family, scorer in scorers.items()} | {
        "bleu": bleus,
        "rouge_l": rouges,
        "length": [len(text.split()) for text in candidates],
        "repeats": [repeats(text) for text in candidates],
        "distinct": [1 / times[text] for text in candidates],  # their sum counts the distinct ones
    }
    if formats is not None:
        flat["format"] = [value for group in formats for value in group]
    if label is not None:
        flat["labels"] = label_stats(label(candidates), label(repeated))
    if green is not None:
        flat["green"] = [(s or 0.0, s is not None, s is None) for s in green(candidates, repeated)]
    if meteor is not None and (counts := meteor(*map(list, zip(*words, strict=True)))) is not None:
        flat["meteor"] = counts
    stats = {}
    if labels is not None:
        count = finding_counts if gold else truth_counts
        flat["truth"] = [[*count(text, of).values()] for text, of in zip(candidates, known, strict=True)]
        flat |= {} if gold else {"sections": [section_counts(text) for text in candidates]}
        stats["levels"] = np.array([levels(*of, gold) for of in zip(texts, labels, strict=True)], float)
    for name, values in flat.items():  # of single values also their number: a mean's
        values = np.array(values, float) if np.ndim(values) > 1 else np.stack([values, np.ones(len(values))], axis=-1)
        stats[name] = values.reshape(len(texts), len(texts[0]), -1).sum(1)
    return stats


def resample(stats: dict[str, np.ndarray], resamples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """{name: (n, k)} -> {name: (resamples, k)} sums over n studies drawn with replacement, the same ones for all names.

    A few draws at a time, so that memory does not grow with studies times resamples.
    """
    n = len(next(iter(stats.values())))
    step, sums = max(1, AT_ONCE // n), {name: [] for name in stats}
    for start in range(0, resamples, step):
        draws = rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start)).astype(float)
        for name, values in stats.items():
            sums[name].append(draws @ values)
    return {name: np.concatenate(parts) for name, parts in sums.items()}


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile interval (lo, hi) of resampled values; NaN ones are left out, (NaN, NaN) without any."""
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (math.nan, math.nan)


def measured(function: Callable, sums: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """{"value", "lo", "hi"} of a function of sums over studies, and of those of resampled studies."""
    lo, hi = interval(function(drawn))
    return {"value": float(function(sums)), "lo": lo, "hi": hi}


def summarise(rows: dict[str, dict[str, np.ndarray]], label_names: tuple[str, ...], resamples: int, seed: int) -> dict:
    """{row: {metric: {"value", "lo", "hi"}}} of what `collect` gave {row: statistics} on the same n studies.

    Beside the metrics stand "n", "counts" (truth) and "per_label" scores. All rows are resampled alike.
    """
    flat = {(row, family): values for row, stats in rows.items() for family, values in stats.items()}
    drawn = resample(flat, resamples, np.random.default_rng(seed))
    results = {row: {"n": len(next(iter(stats.values())))} for row, stats in rows.items()}
    for row, stats in rows.items():
        result, sums = results[row], {family: values.sum(0) for family, values in stats.items()}
        for name, (family, function) in METRICS.items():
            if family in stats:
                result[name] = measured(function, sums[family], drawn[row, family])
        for family, name in (("truth", "counts"), ("sections", "sections")):
            if family in stats:
                result[name] = dict(zip(KEYS[family], sums[family].astype(int).tolist(), strict=True))
        if "green" in stats:
            result["green"]["unread"] = int(sums["green"][2])
        if "labels" in stats:
            true, _, missed = np.split(sums["labels"], 3)
            scores = [*np.nan_to_num(label_scores(sums["labels"])).tolist(), (true + missed).astype(int).tolist()]
            named = zip(label_names, *scores, strict=True)
            result["per_label"] = {name: dict(zip((*MEASURES, "support"), line, strict=True)) for name, *line in named}
    return results


def validation_row(outputs: list[list[str]], studies: list[Study], cfg: Config) -> dict[str, float]:
    """The val/* row of a pass during training, of raw greedy outputs [study][1]; F1, hallucination rate with labels."""
    texts, references = [[strip_tags(text) for text in group] for group in outputs], [study.report for study in studies]
    formats = [format_reward(group, cfg.rewards.required_sections) for group in outputs]
    labels = None if studies[0].labels is None else [study.labels for study in studies]
    stats = collect(texts, references, formats=formats, labels=labels, gold=bool(cfg.data.labels))
    shown = {name: METRICS[name] for name in ("bleu_4", "format_rate", "sided_f1", "hallucination_rate")}
    values = {f"val/{name}": float(f(stats[family].sum(0))) for name, (family, f) in shown.items() if family in stats}
    return {name: value for name, value in values.items() if not math.isnan(value)}
