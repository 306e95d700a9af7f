"""Metrics of evaluation, each a function of sums over studies, so that one bootstrap serves them all.

`collect` turns texts into sufficient statistics: for every family of metrics an array (n studies, k) that adds up over
studies (a study's samples already summed). `METRICS` maps each metric's name to its family and a function of the
summed array, and `summarise` gives value and 95% interval. Resampling is always by whole study.

Conventions. Tokens: lower-cased, `\\w+` runs and single punctuation marks (`tokens`), joined by blanks. BLEU-1..4 and
ROUGE-L (beta 1.2) are pycocoevalcap's, the field's (corpus BLEU, unsmoothed; mean of ROUGE-L); sacrebleu and
rouge-score, which the rewards use, give other numbers for the same text. METEOR is METEOR 1.5 [Denkowski & Lavie 2014]
through pycocoevalcap's jar; `meteor_exact_stem`, for machines without Java, is another number under another name. Label
precision, recall and F1 are CheXbert's: 14 labels or, with the suffix _5, the five that its paper reports; positive or
uncertain = 1; a label that neither side states counts 0 in the macro mean, as in scikit-learn. GREEN: green.py, its
mean is over the readable answers. RaTEScore: ratescore_runner.py. The truth-based metrics (phantom only) are ratios of
what `reader.truth_counts` counts. All values are fractions, lengths are words; nothing by nothing is NaN.
"""

import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np

from data import Study
from evidence import reader
from rewards import format_reward, readable

BETA = 1.2  # ROUGE-L's weight of recall in pycocoevalcap
LABELS, FIVE = list(range(14)), [1, 4, 5, 7, 9]  # all of clinical.CHEXPERT_LABELS, and the places of clinical.FIVE
TRUTH_KEYS = ("stated", "hallucinated", "true", "omitted", "wrong_side", "correct", "sentences", "unread")

# METEOR 1.5's English "rank" parameters, the jar's default: alpha, beta, gamma, delta and the weights of the exact,
# stem, synonym and paraphrase matchers
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_WEIGHTS = (1.0, 0.6, 0.8, 0.6)


# ----------------------------------------------------------------------------------------- statistics of one pair


def tokens(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks: "No X-ray, 1.5 cm." -> no x - ray , 1 . 5 cm ."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def bleu_stats(candidate: list[str], reference: list[str]) -> list[int]:
    """[matching 1..4-grams, the candidate's 1..4-grams, candidate length, reference length] (10 integers)."""
    matches, guesses = [], []
    for n in range(1, 5):
        ngrams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (candidate, reference)]
        matches.append((ngrams[0] & ngrams[1]).total())
        guesses.append(max(0, len(candidate) - n + 1))
    return [*matches, *guesses, len(candidate), len(reference)]


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel [Hyyrö 2004]: a column of the table is one integer."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return len(a) - row.bit_count()


def rouge_l(candidate: list[str], reference: list[str]) -> float:
    """ROUGE-L of one pair as pycocoevalcap computes it; 0 when either side is empty."""
    common = lcs_length(candidate, reference)
    if not common:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def label_stats(candidates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Boolean (n, 14) twice -> (n, 42): true positives, false positives, false negatives of each label."""
    c, r = np.asarray(candidates, bool), np.asarray(references, bool)
    return np.concatenate([c & r, c & ~r, ~c & r], axis=-1).astype(float)


# -------------------------------------------------------------------------- metrics of summed statistics (..., k)


def bleu(sums: np.ndarray) -> np.ndarray:
    """(..., 10) -> (..., 4): corpus BLEU-1..4 as pycocoevalcap computes it, its `tiny` and `small` included."""
    tiny, small = 1e-15, 1e-9
    precisions = (sums[..., :4] + tiny) / (sums[..., 4:8] + small)
    scores = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, 5))
    ratio = (sums[..., 8] + tiny) / (sums[..., 9] + small)
    return scores * np.exp(np.minimum(0, 1 - 1 / ratio))[..., None]


def meteor(sums: np.ndarray) -> np.ndarray:
    """(..., 23) sums of the jar's statistics -> (...): corpus METEOR."""
    # the jar's order: lengths (candidate, reference), function words (both), per matcher the content words (both) and
    # function words (both) it matched, chunks, matched words (both)
    matches = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    weights, delta = np.array(METEOR_WEIGHTS), METEOR_DELTA

    def share(side: int) -> np.ndarray:
        words, function_words = sums[..., side], sums[..., side + 2]
        total = delta * (words - function_words) + (1 - delta) * function_words
        found = delta * matches[..., side] + (1 - delta) * matches[..., side + 2]
        return divide((weights * found).sum(-1), total)

    precision, recall = share(0), share(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = 1 / ((1 - METEOR_ALPHA) / precision + METEOR_ALPHA / recall)
        penalty = METEOR_GAMMA * (sums[..., 20] / ((sums[..., 21] + sums[..., 22]) / 2)) ** METEOR_BETA
    return np.nan_to_num(mean * (1 - penalty))


def label_scores(sums: np.ndarray) -> np.ndarray:
    """(..., 42) -> (..., 3, 14): precision, recall and F1 of each label, 0 where that is nothing by nothing."""
    tp, fp, fn = np.split(sums, 3, axis=-1)
    return np.nan_to_num(np.stack([divide(tp, tp + fp), divide(tp, tp + fn), divide(2 * tp, 2 * tp + fp + fn)], -2))


def label_average(sums: np.ndarray, measure: str, average: str, labels: list[int] = LABELS) -> np.ndarray:
    """(..., 42) -> (...): `precision`, `recall` or `f1`; `macro`, mean over labels, or `micro`, over all decisions."""
    place = ("precision", "recall", "f1").index(measure)
    if average == "macro":
        return label_scores(sums)[..., place, labels].mean(-1)
    tp, fp, fn = (part[..., labels].sum(-1) for part in np.split(sums, 3, axis=-1))
    return divide(*((tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn))[place])


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is 0."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def _mean(sums: np.ndarray) -> np.ndarray:
    return divide(sums[..., 0], sums[..., 1])


def _ratio(above: str, *below: str, factor: float = 1.0) -> Callable:
    a, b = TRUTH_KEYS.index(above), [TRUTH_KEYS.index(name) for name in below]
    return lambda sums: divide(factor * sums[..., a], sums[..., b].sum(-1))


# name: (family of statistics, function of their sums)
METRICS: dict[str, tuple[str, Callable]] = {
    **{f"bleu_{n}": ("bleu", lambda sums, n=n: bleu(sums)[..., n - 1]) for n in range(1, 5)},
    "rouge_l": ("rouge_l", _mean),
    "meteor": ("meteor", meteor),
    "meteor_exact_stem": ("meteor_exact_stem", _mean),
    "bertscore": ("bertscore", _mean),
    **{
        f"{measure}_{average}{suffix}": ("labels", partial(label_average, measure=measure, average=average, labels=of))
        for suffix, of in (("", LABELS), ("_5", FIVE))
        for average in ("micro", "macro")
        for measure in ("precision", "recall", "f1")
    },
    "radgraph_f1": ("radgraph", _mean),
    "green": ("green", _mean),
    "ratescore": ("ratescore", _mean),
    "sided_f1": ("truth", _ratio("correct", "stated", "true", factor=2)),
    "hallucination_rate": ("truth", _ratio("hallucinated", "stated")),
    "omission_rate": ("truth", _ratio("omitted", "true")),
    "wrong_side_rate": ("truth", _ratio("wrong_side", "stated")),
    "unread_share": ("truth", _ratio("unread", "sentences")),
    "format_rate": ("format", _mean),
    "length": ("length", _mean),
}


# ------------------------------------------------------------------------------------------- from texts to results


def collect(
    texts: list[list[str]], references: list[str], *,
    formats: list[list[float]] | None = None, labels: list[list[str]] | None = None,
    label: Callable | None = None, bertscore: Callable | None = None, radgraph: Callable | None = None,
    meteor_stats: Callable | None = None, meteor_exact_stem: Callable | None = None, green: Callable | None = None,
    ratescore: Callable | None = None, truth_counts: Callable | None = None,
) -> dict[str, np.ndarray]:
    """Sufficient statistics {family: (n studies, k)} of `texts` [study][sample] against one reference a study.

    The functions take flat lists: label(texts) -> (m, 14) bool; meteor_stats(candidates, references) -> (m, 23); the
    other scorers likewise -> m floats, where green's None (no readable answer) is left out of its mean;
    truth_counts(text, labels) -> {TRUTH_KEYS: int} against `labels` per study. A family whose function is None is left
    out. `formats` [study][sample] are the format rewards.
    """
    per_study = len(texts[0])
    candidates = [text for group in texts for text in group]
    repeated = [reference for reference, group in zip(references, texts, strict=True) for _ in group]
    words = {text: tokens(text) for text in {*candidates, *references}}
    pairs = [(words[c], words[r]) for c, r in zip(candidates, repeated, strict=True)]
    flat = {
        "bleu": [bleu_stats(c, r) for c, r in pairs],
        "rouge_l": _with_one([rouge_l(c, r) for c, r in pairs]),
        "length": _with_one([len(text.split()) for text in candidates]),
    }
    if formats is not None:
        flat["format"] = _with_one([value for group in formats for value in group])
    if label is not None:
        flat["labels"] = label_stats(label(candidates), np.repeat(np.asarray(label(references)), per_study, axis=0))
    means = dict(bertscore=bertscore, radgraph=radgraph, meteor_exact_stem=meteor_exact_stem, ratescore=ratescore)
    flat |= {name: _with_one(scorer(candidates, repeated)) for name, scorer in means.items() if scorer is not None}
    if green is not None:
        flat["green"] = [(s or 0.0, s is not None, s is None) for s in green(candidates, repeated)]
    if meteor_stats is not None:
        flat["meteor"] = meteor_stats([" ".join(c) for c, _ in pairs], [" ".join(r) for _, r in pairs])
    if truth_counts is not None and labels is not None:
        counts = [truth_counts(text, known) for known, group in zip(labels, texts, strict=True) for text in group]
        flat["truth"] = [[count[key] for key in TRUTH_KEYS] for count in counts]
    return {name: np.asarray(v, float).reshape(len(texts), per_study, -1).sum(1) for name, v in flat.items()}


def _with_one(values) -> np.ndarray:
    """(m,) values -> (m, 2) of value and 1: their sums give the mean."""
    values = np.asarray(values, float)
    return np.stack([values, np.ones_like(values)], axis=-1)


def bootstrap(stat_fn: Callable, stats: np.ndarray, resamples: int = 1000, seed: int = 0) -> tuple:
    """95% percentile interval (lo, hi) of stat_fn(sums over studies), studies drawn with replacement.

    stats (n, k); stat_fn maps sums (..., k) to (...). The same n, resamples and seed draw the same studies, so rows on
    the same studies are resampled alike. Resamples whose value is NaN are left out; (NaN, NaN) without any.
    """
    n = len(stats)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)  # (resamples, n)
    values = stat_fn(draws @ stats)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, (2.5, 97.5)).tolist()) if len(values) else (math.nan, math.nan)


def summarise(stats: dict[str, np.ndarray], label_names: tuple[str, ...], resamples: int, seed: int) -> dict:
    """{metric: {"value", "lo", "hi"}} of what `collect` gave, plus "n", "counts" (truth) and "per_label" scores."""
    result: dict = {"n": len(stats["length"])}
    for name, (family, function) in METRICS.items():
        if family in stats:
            lo, hi = bootstrap(function, stats[family], resamples, seed)
            result[name] = {"value": float(function(stats[family].sum(0))), "lo": lo, "hi": hi}
    if "truth" in stats:
        result["counts"] = {key: int(v) for key, v in zip(TRUTH_KEYS, stats["truth"].sum(0), strict=True)}
    if "green" in stats:
        result["green"]["unread"] = int(stats["green"][:, 2].sum())
    if "labels" in stats:
        sums = stats["labels"].sum(0)
        support = sums[: len(label_names)] + sums[2 * len(label_names) :]
        result["per_label"] = {
            name: {"precision": float(p), "recall": float(r), "f1": float(f1), "support": int(n)}
            for name, (p, r, f1), n in zip(label_names, label_scores(sums).T, support, strict=True)
        }
    return result


def meteor_exact_stem(candidates: list[str], references: list[str]) -> list[float]:
    """METEOR of each pair by exact and Porter-stem matches alone: nltk's, with a WordNet that knows no synonyms.

    Its weights are those of the 2007 paper (alpha .9, beta 3, gamma .5), so the number is not METEOR 1.5's.
    """
    from nltk.translate.meteor_score import single_meteor_score  # here, as nltk takes a second to import

    no_wordnet = SimpleNamespace(synsets=lambda word: [])
    pairs = zip(candidates, references, strict=True)
    return [single_meteor_score(tokens(r), tokens(c), wordnet=no_wordnet) for c, r in pairs]


def start_meteor() -> tuple[Callable | None, str]:
    """(function for collect's meteor_stats, "") or (None, why not). Starts the jar's Java process, once a program."""
    if shutil.which("java") is None:
        return None, "METEOR needs Java: no `java` on PATH"
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        return None, "METEOR needs the package pycocoevalcap"
    try:
        scorer = Meteor()
        scorer._stat("a test", ["a test"])  # the first answer takes some seconds: it loads the paraphrase table
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"METEOR's Java process does not run ({error})"

    def stats(candidates: list[str], references: list[str]) -> np.ndarray:
        # one pair a line: a line break inside a text would shift every later answer
        pairs = [[" ".join(text.split()) for text in pair] for pair in zip(candidates, references, strict=True)]
        rows = np.array([scorer._stat(c, [r]).split() for c, r in pairs], float)
        whole = (rows[:, 21] == rows[:, 0]) & (rows[:, 22] == rows[:, 1]) & (rows[:, 20] == 1)
        rows[whole, 20] = 0  # as the jar does before it adds up: a perfect match in one chunk pays for none
        return rows

    if stats(["a test"], ["a test"]).shape != (1, 23):
        return None, "METEOR's Java process gave no scores"
    return stats, ""


def validation_row(outputs: list[list[str]], studies: list[Study], sections: tuple[str, ...]) -> dict[str, float]:
    """The val/* row of a pass during training, from raw greedy outputs [study][1]: BLEU-4, format rate and, with exact
    labels, sided F1 and hallucination rate. sections: `rewards.required_sections`."""
    stats = collect(
        [[readable(output) for output in group] for group in outputs],
        [study.report for study in studies],
        formats=[format_reward(group, None, sections) for group in outputs],
        labels=None if studies[0].labels is None else [study.labels for study in studies],
        truth_counts=reader.truth_counts,
    )
    row = {}
    for name in ("bleu_4", "format_rate", "sided_f1", "hallucination_rate"):
        family, function = METRICS[name]
        if family in stats and not math.isnan(value := float(function(stats[family].sum(0)))):
            row[f"val/{name}"] = value
    return row
