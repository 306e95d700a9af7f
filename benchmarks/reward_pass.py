"""The reward pass (2 studies x 8 candidates): ours against each package, pair by pair.

    python benchmarks/bench.py --cases rewards

CheXbert, RadGraph and BERTScore over random weights of BERT-base size, the same on both sides, which agree
(tests/test_scorers_chexbert.py). The packages get a pair at a time, their models loaded: f1chexbert labels candidate
and reference, radgraph annotates both, bert-score encodes both. Ours, as `rewards.text_components` calls it, has read
each reference once, and reads the candidates in batches where the package allows it. BLEU-4 and ROUGE-L take a pair at
a time on both sides. Candidates are new in every repeat.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[1]))

import rewards  # noqa: E402
from phantom.assets import labelled_texts  # noqa: E402
from phantom.config import PhantomConfig  # noqa: E402
from scorers.bertscore import Name, load_bertscore  # noqa: E402
from scorers.chexbert import CheXbert, load_chexbert  # noqa: E402
from tiny import models as tiny_models  # noqa: E402

STUDIES, GROUP = 2, 8
Score = Callable[[list[str], list[str]], list[float]]  # candidates, references -> a score for each pair


def report_texts(n: int) -> list[str]:
    """n different texts of the length of a chest X-ray report: two of the phantom's, one after the other."""
    texts, _ = labelled_texts(PhantomConfig(), 0, 2 * n)
    return [f"{a} {i} {b}" for i, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))]


def chexbert(config: BertConfig, texts: list[str], folder: Path, device: str) -> tuple[Score, Score]:
    """(f1chexbert on pairs, ours).

    The package's constructor downloads a checkpoint, so it is filled in by hand; `encode_plus` is gone from
    transformers 5.
    """
    from f1chexbert import f1chexbert as package

    tokenizer = tiny_models.word_piece(texts, folder)
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    model = CheXbert(BertModel(config)).to(device).eval().requires_grad_(False)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, folder / "chexbert.pth")
    ours = load_chexbert(folder / "chexbert.pth", folder, device)
    labeler = package.bert_labeler.__new__(package.bert_labeler)
    torch.nn.Module.__init__(labeler)
    labeler.bert, labeler.dropout, labeler.linear_heads = model.bert, torch.nn.Dropout(0.1), model.linear_heads
    scorer = package.F1CheXbert.__new__(package.F1CheXbert)
    torch.nn.Module.__init__(scorer)
    scorer.device, scorer.tokenizer, scorer.model = device, tokenizer, labeler.eval()
    ends, ids = (tokenizer.cls_token_id, tokenizer.sep_token_id), tokenizer.convert_tokens_to_ids
    tokenizer.encode_plus = lambda tokens: {"input_ids": [ends[0], *ids(tokens), ends[1]]}

    def theirs(candidates: list[str], references: list[str]) -> list[float]:
        labels = [[scorer.get_label(text) for text in pair] for pair in zip(candidates, references, strict=True)]
        positive = torch.tensor(labels).bool().numpy()  # (N, 2, 14)
        return rewards.label_f1(positive[:, 0], positive[:, 1])

    return theirs, lambda candidates, references: rewards.label_f1(ours(candidates), ours(references))


def radgraph(config: BertConfig, texts: list[str], folder: Path, device: str) -> tuple[Score, Score]:
    """(the radgraph package's F1RadGraph on pairs, ours) on one archive."""
    from radgraph.radgraph import F1RadGraph

    from benchmarks.radgraph_archive import write_archive
    from scorers.radgraph_model import PackageRadGraph

    words = sorted({word for text in texts for word in text.lower().replace(".", " .").replace(",", " ,").split()})
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(config, name) for name in names}
    write_archive(folder, "radgraph", words, sizes=sizes, max_length=512, feedforward=150, span=8, 
                  std=0.05, rarely=0.1)  # fmt: skip
    ours = PackageRadGraph("radgraph", str(folder), "partial", device)
    package = F1RadGraph("partial", model_type="radgraph", model_cache_dir=str(folder), cuda=-1)
    package.radgraph.device = torch.device(device)
    package.radgraph.to(device)

    def theirs(candidates: list[str], references: list[str]) -> list[float]:
        return [package(hyps=[c], refs=[r])[0] for c, r in zip(candidates, references, strict=True)]

    return theirs, ours


def bertscore(config: BertConfig, texts: list[str], folder: Path, device: str) -> tuple[Score, Score]:
    """(bert-score on pairs, ours) on one BERT."""
    from bert_score import BERTScorer

    BertModel(config).save_pretrained(folder)
    tiny_models.word_piece(texts, folder).save_pretrained(folder)
    layer = config.num_hidden_layers
    package = BERTScorer(model_type=Name(folder), num_layers=layer, device=device)

    def theirs(candidates: list[str], references: list[str]) -> list[float]:
        return [package.score([c], [r])[2].item() for c, r in zip(candidates, references, strict=True)]

    return theirs, load_bertscore(folder, layer, device)


def lexical(*_) -> tuple[Score, Score]:
    """BLEU-4 and ROUGE-L, a pair at a time and at once; their sum."""

    def ours(candidates: list[str], references: list[str]) -> list[float]:
        return [a + b for a, b in zip(rewards.bleu4(candidates, references), rewards.rouge_l(candidates, references),
                                      strict=True)]  # fmt: skip

    return lambda candidates, references: [ours([c], [r])[0] for c, r in zip(candidates, references, strict=True)], ours


PARTS = {"CheXbert": chexbert, "RadGraph": radgraph, "BERTScore": bertscore, "BLEU-4 and ROUGE-L": lexical}


def both_sides(part: str, config: BertConfig, passes: int, device: str):
    """(the package's side, ours, the references (N), the candidates [passes][N]) of one of PARTS."""
    texts = report_texts(STUDIES + passes * STUDIES * GROUP)
    references = [text for text in texts[:STUDIES] for _ in range(GROUP)]
    candidates = [texts[i : i + len(references)] for i in range(STUDIES, len(texts), len(references))]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return *PARTS[part](config, texts, Path(folder), device), references, candidates


def one_side(part: str, ours: bool, device: str, passes: int = 12) -> Callable[[], None]:
    """A side of a part at BERT-base size, for sides.py: each call scores new candidates, `passes` times at most."""
    *sides, references, candidates = both_sides(part, BertConfig(), passes, device)
    left = iter(candidates)
    return lambda: sides[ours](next(left), references)
