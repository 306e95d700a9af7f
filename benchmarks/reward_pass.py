"""The model-based rewards of one GRPO pass (8 studies x 8 candidates): ours against each package, pair by pair.

    python benchmarks/reward_pass.py [--layers 12] [--repeats 5] [--device auto]

CheXbert labels and BERTScore over random weights of BERT-base size, the same on both sides; that both sides agree is
checked first. The f1chexbert package labels candidate and reference of each pair, a text at a time; a second row gives
it the references' labels for free. Ours has labelled the references before and labels the candidates in batches. The
bert-score package, its model loaded, scores a pair at a time; ours encodes each text once, in batches. Candidates are
new in every repeat. RadGraph is left out: its model is the package's own on both sides.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import clinical  # noqa: E402
import phantom  # noqa: E402
import tiny_models  # noqa: E402

STUDIES, GROUP = 8, 8


def package_labeller(model: clinical.CheXbert, tokenizer, device: str):
    """The package's own labelling on our weights: texts -> 14 labels each, one text at a time.

    Its constructor downloads a checkpoint, so it is filled in by hand; `encode_plus` is gone from transformers 5.
    """
    from f1chexbert import f1chexbert as package

    labeler = package.bert_labeler.__new__(package.bert_labeler)
    torch.nn.Module.__init__(labeler)
    labeler.bert, labeler.dropout, labeler.linear_heads = model.bert, torch.nn.Dropout(0.1), model.linear_heads
    scorer = package.F1CheXbert.__new__(package.F1CheXbert)
    torch.nn.Module.__init__(scorer)
    scorer.device, scorer.tokenizer, scorer.model = device, tokenizer, labeler.eval()
    ends, ids = (tokenizer.cls_token_id, tokenizer.sep_token_id), tokenizer.convert_tokens_to_ids
    tokenizer.encode_plus = lambda tokens: {"input_ids": [ends[0], *ids(tokens), ends[1]]}
    return lambda texts: [scorer.get_label(text) for text in texts]


def report_texts(n: int) -> list[str]:
    """n different texts of the length of a chest X-ray report: two of the phantom's, one after the other."""
    texts, _ = phantom.labelled_texts(phantom.PhantomConfig(), 0, 2 * n)
    return [f"{a} {i} {b}" for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))]


def clock(call) -> float:
    """Seconds that one call takes; each side ends with its labels on the CPU, so a GPU has finished by then."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def texts_and_tokenizer(repeats: int, folder: Path) -> tuple[list[str], list[list[str]], object]:
    """(references repeated G times, the candidates of each repeat and of the warm-up, tokenizer written to folder)."""
    texts = report_texts(STUDIES + (repeats + 1) * STUDIES * GROUP)
    tokenizer = tiny_models.word_piece(texts, folder)
    references = [text for text in texts[:STUDIES] for _ in range(GROUP)]
    passes = [texts[i : i + len(references)] for i in range(STUDIES, len(texts), len(references))]
    return references, passes, tokenizer


def chexbert_seconds(config: BertConfig, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each repeat: the package on pairs, the package with the references' labels kept, ours."""
    with tempfile.TemporaryDirectory() as folder:
        references, passes, tokenizer = texts_and_tokenizer(repeats, Path(folder))
    torch.manual_seed(0)
    model = clinical.CheXbert(BertModel(config)).to(device).eval().requires_grad_(False)
    ours, theirs = clinical.Labeller(model, tokenizer), package_labeller(model, tokenizer, device)
    warm_up = passes.pop() + references
    if ours(warm_up).astype(int).tolist() != theirs(warm_up):
        sys.exit("the package and our labeller do not agree")
    seconds = {"f1chexbert, pair by pair": [], "f1chexbert, references kept": [], "CheXbert, ours": []}
    for candidates in passes:
        pairs = list(zip(candidates, references, strict=True))
        calls = (
            lambda pairs=pairs: [theirs(pair) for pair in pairs],
            lambda candidates=candidates: theirs(candidates),
            lambda candidates=candidates: clinical.label_f1(ours(candidates), ours(references)),
        )
        for name, call in zip(seconds, calls, strict=True):
            seconds[name].append(clock(call))
    return seconds


def bertscore_seconds(config: BertConfig, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each repeat: the package on pairs, ours."""
    from bert_score import BERTScorer

    with tempfile.TemporaryDirectory() as folder:
        references, passes, tokenizer = texts_and_tokenizer(repeats, Path(folder))
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        layer = config.num_hidden_layers
        package = BERTScorer(model_type=folder, num_layers=layer, device=device)
        ours = clinical.load_bertscore(folder, layer, device)

    def theirs(candidates: list[str]) -> list[float]:
        return [package.score([c], [r])[2].item() for c, r in zip(candidates, references, strict=True)]

    warm_up = passes.pop()
    if max(abs(a - b) for a, b in zip(ours(warm_up, references), theirs(warm_up), strict=True)) > 1e-4:
        sys.exit("the package and our BERTScore do not agree")
    seconds = {"bert-score, pair by pair": [], "BERTScore, ours": []}
    for candidates in passes:
        seconds["bert-score, pair by pair"].append(clock(lambda candidates=candidates: theirs(candidates)))
        seconds["BERTScore, ours"].append(clock(lambda candidates=candidates: ours(candidates, references)))
    return seconds


def median(values: list[float]) -> tuple[str, str]:
    """The median and "[least to most]"."""
    return f"{statistics.median(values):.2f}", f"[{min(values):.2f} to {max(values):.2f}]"


def table(seconds: dict[str, list[float]]) -> list[str]:
    """A row for each side; the last is ours, and the others' rows say how many times faster it was."""
    *peers, own = seconds
    rows = []
    for name in seconds:
        ratio = [theirs / ours for theirs, ours in zip(seconds[name], seconds[own], strict=True)]
        cells = [name, " ".join(median(seconds[name])), " ".join(median(ratio)) if name in peers else ""]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(layers: int = 12, repeats: int = 5, device: str = "auto") -> None:
    """How many times faster the CheXbert labels and the BERTScore of a reward pass are than the packages'.

    Args:
        layers: layers of the random BERT of width 768.
        repeats: timed passes.
        device: auto = cuda where there is one, else cpu.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    config = BertConfig(num_hidden_layers=layers)
    rows = chexbert_seconds(config, repeats, device), bertscore_seconds(config, repeats, device)
    head = (f"{STUDIES} studies x {GROUP} candidates; BERT: {layers} layers, width {config.hidden_size}, on {device}, "
            f"{torch.get_num_threads()} CPU thread(s); {repeats} repeats in turn: median [range]")  # fmt: skip
    lines = [head, "", "| side | s | times ours |", "|---|---|---|", *(line for part in rows for line in table(part))]
    print("\n".join(lines))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "reward_pass.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
