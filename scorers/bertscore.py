"""BERTScore (Eq. 3's s_sem): the `bert-score` package's encoder and matching, repeatable to the last bit."""

import csv
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel

from running.weights import KNOWN_TEXTS, load_tokenizer, loading, require_finite_tensors, require_rows
from scorers.frozen import load_whole, of_like_length, pack_linears, plain

BATCH = 32  # pairs matched at a time


class Name(str):
    """A model's folder or hub name as the package takes it: for a T5's where "t5" stands in it, which any path may."""

    is_t5 = False

    def __contains__(self, part: str) -> bool:
        return self.is_t5 if part == "t5" else super().__contains__(part)


def load_bertscore(folder: str | Path, layer: int, device: str | torch.device = "cpu", baseline: str = "") -> Callable:
    """BERTScore F1 of pairs: function(candidates, references) -> floats in [0, 1]; a text without a word scores 0.

    The encoder (Hugging Face layout, `folder` or hub name) is read at `layer`, without idf. A text longer than its
    positions is cut there: the first is reported, `function.truncated` counts them. With a `baseline` b (see
    `baseline_f1`) F becomes (F - b) / (1 - b), and 0 where a pair is less alike than unrelated sentences.
    The package's own `score` follows the order of a set, and with it the last bits of a score; here it is sorted.
    """
    from bert_score.utils import get_model, greedy_cos_idf

    floor, name = baseline_f1(folder, layer, baseline) if baseline else 0.0, Name(folder)
    with loading(f"bertscore: cannot load layer {layer} of {folder}", "give an encoder with tokenizer"):
        tokenizer = load_tokenizer(folder, use_fast=False)  # as the package takes it
        whole = load_whole(AutoModel, folder, device_map="meta")  # the package would fill what is missing at random
        name.is_t5 = "t5" in whole.config.model_type
        model = pack_linears(get_model(name, layer).to(device))
        require_finite_tensors(model, folder)
        require_rows(tokenizer, model.get_input_embeddings().num_embeddings, folder)
        table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)  # None: relative positions
        behind = getattr(table, "padding_idx", None)  # RoBERTa's numbering starts behind the padding's: 512 of 514
        positions = getattr(model.config, "max_position_embeddings", 512) - (0 if behind is None else behind + 1)
        limit = tokenizer.model_max_length = min(tokenizer.model_max_length, positions)  # unset: 1e30, which overflows
        token_states(model, tokenizer, list(KNOWN_TEXTS), device)

    def score(candidates: list[str], references: list[str]) -> list[float]:
        pairs = [(plain(c).strip(), plain(r).strip()) for c, r in zip(candidates, references, strict=True)]
        unique, found = sorted({pair for pair in pairs if all(pair)}), {}
        states = token_states(model, tokenizer, sorted({text for pair in unique for text in pair}), device)
        long = [text for text in states if len(text.encode()) > limit - 2]  # a token takes a byte or more
        cut = sum(len(tokenizer(text, verbose=False)["input_ids"]) > limit for text in long)
        if cut and not score.truncated:
            print(f"bertscore: texts longer than {limit} tokens are cut there")
        score.truncated += cut
        for start in range(0, len(unique), BATCH):
            chunk = unique[start : start + BATCH]
            ours, theirs = (padded([states[text] for text in side]) for side in zip(*chunk, strict=True))
            f1 = (greedy_cos_idf(*theirs, *ours)[2].nan_to_num() - floor) / (1 - floor)
            found.update(zip(chunk, f1.clamp(0, 1).tolist(), strict=True))
        return [found.get(pair, 0.0) for pair in pairs]

    score.truncated = 0
    return score


def token_states(model, tokenizer, texts: list[str], device) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each text the encoder's states (T, D), a mask of ones (T,), and weights (T,): 0 for the special tokens.

    ValueError for states that are not finite, as finite weights may give where a file was changed.
    """
    from bert_score.utils import get_bert_embedding

    states, weight = {}, defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0, tokenizer.cls_token_id: 0})
    for chunk in of_like_length(texts, lambda text: len(text) // 4, device):  # letters of a token, about
        hidden, mask, weights = get_bert_embedding(chunk, model, tokenizer, weight, device=device)
        require_finite_tensors({"a token's state": hidden[mask.bool()]}, "bertscore's encoder")
        for text, n, *rows in zip(chunk, mask.sum(dim=1), hidden, mask, weights, strict=True):
            states[text] = tuple(row[:n] for row in rows)
    return states


def padded(texts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """States (N, T, D), mask (N, T) and weights (N, T) of several texts, as the package's matching takes them."""
    fill = (2.0, 0, 0)  # of states, as zeros would be divided by their norm
    return tuple(pad_sequence(rows, True, value) for rows, value in zip(zip(*texts, strict=True), fill, strict=True))


def baseline_f1(folder: str | Path, layer: int, baseline: str) -> float:
    """BERTScore F1 of unrelated sentences at `layer`, from a baseline file of `bert-score` (columns LAYER, P, R, F).

    baseline: the file's path, or `package` for the English one that bert-score ships for the model named `folder`.
    """
    import bert_score

    shipped = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{folder}.tsv"
    path = shipped if baseline == "package" else Path(baseline)
    with loading(f"bertscore: cannot load layer {layer} of {path}", "set scorers.bertscore_baseline or empty it"):
        rows = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
        value = {int(row["LAYER"]): float(row["F"]) for row in rows}[layer]
        if not float("-inf") < value < 1:
            raise ValueError(f"F must be a number below 1, got {value:g}")
        return value
