"""A tiny BERT of random weights in the Hugging Face layout, and texts of its words."""

import random

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ("no there is a left right small large pleural effusion pneumothorax edema heart size normal lungs are clear "
         "consolidation in the lower lobe pacemaker seen . , :").split()


def write_bert(folder) -> BertModel:
    """Write config, tokenizer and weights into `folder`; the model that was written."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=64, initializer_range=0.5))  # fmt: skip
    bert.save_pretrained(folder)
    return bert


def sentences(n: int, seed: int = 0, most: int = 30) -> list[str]:
    """n texts of 1 to `most` words."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, most))) for _ in range(n)]
