"""CheXbert labels of one GRPO reward pass (8 studies x 8 candidates): ours against the `f1chexbert` package's, in turn.

    python benchmarks/reward_pass.py [--layers 12] [--repeats 5] [--device auto]

Random weights of BERT-base size, the same on both sides; that both sides label alike is checked first. The package
labels candidate and reference of each pair, a text at a time; a second row gives it the references' labels for free.
Ours has labelled the references before and labels the candidates in batches. Candidates are new in every repeat.
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


def measure(config: BertConfig, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each repeat: the package on pairs, the package with the references' labels kept, ours."""
    texts = report_texts(STUDIES + (repeats + 1) * STUDIES * GROUP)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_models.word_piece(texts, Path(folder))
    torch.manual_seed(0)
    model = clinical.CheXbert(BertModel(config)).to(device).eval().requires_grad_(False)
    ours, theirs = clinical.Labeller(model, tokenizer), package_labeller(model, tokenizer, device)
    lengths = sorted(len(ids) for ids in tokenizer(texts)["input_ids"])
    print(f"{STUDIES} studies x {GROUP} candidates, {lengths[len(lengths) // 2]} tokens a text (median); BERT of "
          f"{config.num_hidden_layers} layers, width {config.hidden_size}, on {device}, {torch.get_num_threads()} "
          f"CPU thread(s); {repeats} repeats")  # fmt: skip

    references = [text for text in texts[:STUDIES] for _ in range(GROUP)]
    passes = [texts[i : i + len(references)] for i in range(STUDIES, len(texts), len(references))]
    warm_up = passes.pop() + references
    if ours(warm_up).astype(int).tolist() != theirs(warm_up):
        sys.exit("the package and our labeller do not agree")
    seconds = {"pairs": [], "kept": [], "ours": []}
    for candidates in passes:
        pairs = list(zip(candidates, references, strict=True))
        seconds["pairs"].append(clock(lambda: [theirs(pair) for pair in pairs]))  # noqa: B023
        seconds["kept"].append(clock(lambda: theirs(candidates)))  # noqa: B023
        seconds["ours"].append(clock(lambda: clinical.label_f1(ours(candidates), ours(references))))  # noqa: B023
    return seconds


def median(values: list[float]) -> tuple[str, str]:
    """The median and "[least to most]"."""
    return f"{statistics.median(values):.2f}", f"[{min(values):.2f} to {max(values):.2f}]"


def show(seconds: dict[str, list[float]]) -> None:
    """Print the times and, repeat by repeat, how many times faster ours was."""
    names = {"pairs": "package, pair by pair", "kept": "package, references kept", "ours": "ours"}
    for key, name in names.items():
        print("{:34s}{:>7s} s {}".format(name, *median(seconds[key])))
    for key in ("pairs", "kept"):
        ratio = [theirs / ours for theirs, ours in zip(seconds[key], seconds["ours"], strict=True)]
        print("{:34s}{:>7s} x {}".format(f"{names[key]} / ours", *median(ratio)))


def main(layers: int = 12, repeats: int = 5, device: str = "auto") -> None:
    """How many times faster the CheXbert labels of a reward pass are than the package's.

    Args:
        layers: layers of the random BERT of width 768.
        repeats: timed passes.
        device: auto = cuda where there is one, else cpu.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    show(measure(BertConfig(num_hidden_layers=layers), repeats, device))


if __name__ == "__main__":
    tyro.cli(main)
