"""The frozen text scorers: CheXbert labels (Eq. 4) and BERTScore (Eq. 3).

RadGraph F1 (Eq. 4) stands in `radgraph_rules.py` (offered here beside the other two) and `radgraph_package.py`.
"""

import csv
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, BertModel

from scorers.radgraph_rules import RuleRadGraph as RuleRadGraph

CHEXPERT_LABELS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding")
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
BLANK, POSITIVE, NEGATIVE, UNCERTAIN = range(4)  # CheXbert's classes; No Finding knows only the first two
CACHED_TEXTS = 100_000  # texts kept per scorer; the one unused for longest goes first
BATCH = 32  # pairs that BERTScore matches at a time


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def local_file(name: str | Path, what: str) -> Path:
    """A file's path; `hf-hub:OWNER/REPO/FILE` is fetched into the hub's cache once. ValueError where that fails."""
    if not str(name).startswith("hf-hub:"):
        return Path(name)
    from huggingface_hub import hf_hub_download

    owner, repo, file = [*str(name).removeprefix("hf-hub:").split("/", 2), "", ""][:3]
    if not file:
        raise ValueError(f"{what}: '{name}' names no file; write hf-hub:OWNER/REPO/FILE")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: cannot fetch {name}: {first_line(error)}") from None


def cached(cache: OrderedDict, texts: list[str], compute: Callable[[list[str]], list]) -> list:
    """The value of each text, from `cache` where known; `compute` gets the missing texts once each."""
    missing = [text for text in dict.fromkeys(texts) if text not in cache]
    if missing:
        cache.update(zip(missing, compute(missing), strict=True))
    for text in texts:
        cache.move_to_end(text)
    values = [cache[text] for text in texts]
    while len(cache) > CACHED_TEXTS:
        cache.popitem(last=False)
    return values


# ---------------------------------------------------------------------------------------------- CheXbert, Eq. 4


def of_like_length(items: list, length: Callable, device: str | torch.device):
    """Batches of a model's inputs, the longest first, each padded to at most 512 tokens in all, 16,384 on a GPU.

    More overflow a CPU's cache, fewer starve a GPU. length(item): its tokens.
    """
    most = 512 if torch.device(device).type == "cpu" else 16_384
    rest = sorted(items, key=length)
    while rest:
        n = max(1, most // max(1, length(rest[-1])))
        yield rest[-n:]
        del rest[-n:]


class CheXbert(torch.nn.Module):
    """BERT with one linear head per label on the [CLS] state: 13 heads of 4 classes and No Finding's of 2 (Smit 2020).

    forward(input_ids (n, T), attention_mask (n, T)) returns 14 logit tensors, (n, 4) each and (n, 2) at the end.
    """

    def __init__(self, bert: BertModel):
        super().__init__()
        self.bert, width = bert, bert.config.hidden_size
        self.linear_heads = torch.nn.ModuleList(torch.nn.Linear(width, 4) for _ in range(13))
        self.linear_heads.append(torch.nn.Linear(width, 2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> list[torch.Tensor]:
        state = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return [head(state) for head in self.linear_heads]


def save_chexbert(model: CheXbert, path: str | Path) -> None:
    """Write the checkpoint layout of CheXbert's `chexbert.pth`: {"model_state_dict": {"module.<name>": tensor}}."""
    state = {f"module.{name}": value.detach().cpu() for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, path)


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a CheXbert checkpoint (path or hf-hub: name) by name, without `module.`; ValueError otherwise."""
    try:
        state = torch.load(local_file(path, "chexbert"), map_location="cpu", weights_only=True)["model_state_dict"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
    except FileNotFoundError:
        raise ValueError(
            f"chexbert: {path} does not exist; give the path of chexbert.pth or hf-hub:OWNER/REPO/chexbert.pth"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"chexbert: {path} is no readable torch checkpoint: {first_line(error)}") from None
    except (KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"chexbert: {path} has no 'model_state_dict'; this is not CheXbert's format") from None
    state.pop("bert.embeddings.position_ids", None)  # a constant that some transformers versions saved
    return state


def load_chexbert(checkpoint: str | Path, bert_folder: str | Path, device: str | torch.device = "cpu") -> "Labeller":
    """The frozen labeller of a CheXbert checkpoint on the BERT (config, tokenizer) it sits on.

    checkpoint: a path or `hf-hub:OWNER/REPO/FILE` (the published one: hf-hub:StanfordAIMI/RRG_scorers/chexbert.pth on
    bert-base-uncased). bert_folder: a folder or hub name; its weights are not read, the checkpoint has them. Every
    weight must be there and fit; ValueError (one line) names the first key that is missing, unknown or misshapen.
    """
    state = read_checkpoint(checkpoint)
    try:
        model = CheXbert(BertModel(AutoConfig.from_pretrained(bert_folder)))
        tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"chexbert: no BERT in {bert_folder}: {first_line(error)}") from None
    expected = model.state_dict()
    for problem, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            raise ValueError(f"chexbert: {checkpoint} {problem} key '{min(names)}' ({len(names)} in all)")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            raise ValueError(f"chexbert: {checkpoint}: '{name}' is {tuple(state[name].shape)}, but the BERT in "
                             f"{bert_folder} needs {tuple(value.shape)}")
    model.load_state_dict(state, strict=True)
    return Labeller(model.to(device).eval().requires_grad_(False), tokenizer)


class Labeller:
    """Labels texts in CHEXPERT_LABELS' order: `labeller(texts)` gives the positives, (n, 14) bool.

    White space is normalised and a text cut at 512 tokens as the `f1chexbert` package does, and positive means its
    report mode: positive or uncertain. An empty text is blank throughout, where the package asks the model about "".
    Each distinct text is labelled once and remembered.
    """

    def __init__(self, model: CheXbert, tokenizer):
        self.model, self.tokenizer, self.cache = model, tokenizer, OrderedDict()

    def __call__(self, texts: list[str]) -> np.ndarray:
        classes = self.classes(texts)
        return (classes == POSITIVE) | (classes == UNCERTAIN)

    def classes(self, texts: list[str]) -> np.ndarray:
        """CheXbert's class of each label, (n, 14) int64: 0 blank, 1 positive, 2 negative, 3 uncertain."""
        rows = cached(self.cache, [" ".join(text.split()) for text in texts], self.classify)
        return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(texts), 14).astype(np.int64)

    @torch.no_grad()
    def classify(self, texts: list[str]) -> list[bytes]:
        """Class of each label as 14 bytes per text; texts of like length share a batch."""
        device = self.model.linear_heads[0].weight.device
        written, found = [text for text in texts if text], {"": bytes(14)}
        ids = self.tokenizer(written, truncation=True, max_length=512)["input_ids"] if written else []
        for chunk in of_like_length(list(zip(ids, written, strict=True)), lambda row: len(row[0]), device):
            batch = self.tokenizer.pad({"input_ids": [row for row, _ in chunk]}, return_tensors="pt").to(device)
            logits = self.model(batch["input_ids"], batch["attention_mask"])
            classes = torch.stack([head.argmax(dim=1) for head in logits], dim=1).cpu().numpy().astype(np.uint8)
            found.update(zip((text for _, text in chunk), (row.tobytes() for row in classes), strict=True))
        return [found[text] for text in texts]


# ------------------------------------------------------------------------------------------------ BERTScore, Eq. 3


def _token_states(scorer, texts: list[str], weight: dict, device) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Encoder states (T, D) and token weights (T,) of each text."""
    from bert_score.utils import get_bert_embedding

    states = {}
    for chunk in of_like_length(sorted(set(texts)), lambda text: len(text) // 4, device):  # letters of a token, about
        hidden, mask, weights = get_bert_embedding(chunk, scorer._model, scorer._tokenizer, weight, device=device)
        for text, row, w, n in zip(chunk, hidden, weights, mask.sum(dim=1), strict=True):
            states[text] = row[:n], w[:n]
    return states


def _padded(rows: list[tuple[torch.Tensor, torch.Tensor]], device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (N, T, D), mask (N, T) and token weights (N, T) of several texts, as the package's matching takes them."""
    hidden, weights = zip(*rows, strict=True)
    lengths = torch.tensor([len(row) for row in hidden], device=device)
    hidden = pad_sequence(hidden, batch_first=True, padding_value=2.0)  # zeros would be divided by their norm
    mask = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
    return hidden, mask, pad_sequence(weights, batch_first=True)


def baseline_f1(folder: str | Path, layer: int, baseline: str) -> float:
    """BERTScore F1 of unrelated sentences at `layer`, from a baseline file of `bert-score` (columns LAYER, P, R, F).

    baseline: the file's path, or `package` for the English one that bert-score ships for the model named `folder`.
    """
    import bert_score

    path = Path(baseline)
    if baseline == "package":
        path = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{folder}.tsv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            value = {int(row["LAYER"]): float(row["F"]) for row in csv.DictReader(file)}[layer]
    except OSError:
        raise ValueError(f"bertscore: no baseline file {path}; set scorers.bertscore_baseline or empty it") from None
    except KeyError as error:
        raise ValueError(f"bertscore: baseline file {path} has no column or layer {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"bertscore: baseline file {path} is not LAYER,P,R,F: {first_line(error)}") from None
    if not value < 1:
        raise ValueError(f"bertscore: baseline file {path}: F of layer {layer} must be below 1, got {value:g}")
    return value


def _count_cut(texts, tokenizer) -> int:
    """Number of texts that the tokenizer cuts at its limit."""
    limit = tokenizer.model_max_length
    long = [text for text in texts if len(text) > limit - 2]  # a token takes a character or more
    return sum(len(tokenizer(text, verbose=False)["input_ids"]) > limit for text in long)


def load_bertscore(folder: str | Path, layer: int, device: str | torch.device = "cpu", baseline: str = "") -> Callable:
    """BERTScore F1 of pairs through the `bert-score` package: function(candidates, references) -> floats in [0, 1].

    The encoder (Hugging Face layout, `folder` or hub name) is loaded once and read at `layer`; no idf. With a
    `baseline` (see `baseline_f1`) b, F becomes (F - b) / (1 - b) as in the package, and what falls below 0, a pair less
    alike than unrelated sentences, scores 0. An empty text scores 0. A text longer than the encoder's positions is cut
    there: the first is reported, `function.truncated` counts them.
    The steps of the package's `score` run here in a sorted order: its own order is that of a Python set of strings,
    which differs between processes and with it the last bits of a score, so that no run could be repeated.
    """
    from bert_score import BERTScorer
    from bert_score.utils import greedy_cos_idf

    floor = baseline_f1(folder, layer, baseline) if baseline else 0.0
    try:
        scorer = BERTScorer(model_type=str(folder), num_layers=layer, device=str(device))
    except (OSError, ValueError, AssertionError) as error:
        raise ValueError(f"bertscore: cannot load {folder} at layer {layer}: {first_line(error)}") from None
    tokenizer, positions = scorer._tokenizer, getattr(scorer._model.config, "max_position_embeddings", 512)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)  # 1e30 where unset, which overflows
    weight = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0, tokenizer.cls_token_id: 0})

    def score(candidates: list[str], references: list[str]) -> list[float]:
        pairs = [(c.strip(), r.strip()) for c, r in zip(candidates, references, strict=True)]
        unique, found = sorted({pair for pair in pairs if all(pair)}), {}
        states = _token_states(scorer, [text for pair in unique for text in pair], weight, device)
        cut = _count_cut(states, tokenizer)
        if cut and not score.truncated:
            print(f"bertscore: texts longer than {tokenizer.model_max_length} tokens are cut there")
        score.truncated += cut
        for start in range(0, len(unique), BATCH):
            chunk = unique[start : start + BATCH]
            ours, theirs = (_padded([states[pair[side]] for pair in chunk], device) for side in (0, 1))
            f1 = (greedy_cos_idf(*theirs, *ours)[2].nan_to_num() - floor) / (1 - floor)
            found.update(zip(chunk, f1.clamp(0, 1).tolist(), strict=True))
        return [found.get(pair, 0.0) for pair in pairs]

    score.truncated = 0
    return score
