"""Every scorer on texts of a policy gone astray: each gets a low score, none ends a run."""

import numpy as np
import pytest
import torch
from test_rewards import ODD
from test_scorers_expert import build_native, pictures
from test_scorers_radgraph_model import write_archive
from tiny_bert import write_bert

from rewards import label_f1
from scorers import bertscore, chexbert, expert, green, radgraph_model, radgraph_rules

GOOD = "no pleural effusion . heart size normal ."
SILENT = [text for text in ODD if not any(map(str.isalnum, text))]  # not one letter or digit


def make_chexbert(folder, monkeypatch):
    model = chexbert.CheXbert(write_bert(folder))
    label = chexbert.Labeller(model, chexbert.load_tokenizer(folder))
    return lambda texts: label_f1(label(texts), np.array([[True] * 14] * len(texts)))


def make_bertscore(folder, monkeypatch):
    write_bert(folder)
    score = bertscore.load_bertscore(folder, 2)
    return lambda texts: score(texts, [GOOD] * len(texts))


def make_rules(folder, monkeypatch):
    return lambda texts: radgraph_rules.rule_radgraph(texts, [GOOD] * len(texts))


def make_radgraph(folder, monkeypatch):
    monkeypatch.setattr(radgraph_model, "LONGEST", 40)
    write_archive(folder, "radgraph")
    score = radgraph_model.PackageRadGraph("radgraph", str(folder))
    return lambda texts: score(texts, [GOOD] * len(texts))


def make_expert(folder, monkeypatch):
    build_native(folder / "m")
    frozen = expert.load_expert(folder / "m")
    return lambda texts: ((frozen.similarity(pictures(1), ["a"], [texts])[0] + 1) / 2).tolist()


MAKE = {"CheXbert": make_chexbert, "BERTScore": make_bertscore, "rules": make_rules, "RadGraph": make_radgraph,
        "expert": make_expert}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_odd_texts_score_low_and_end_nothing(name, tmp_path, monkeypatch):
    score = MAKE[name](tmp_path, monkeypatch)
    assert all(0 <= value <= 1 for value in score(ODD))
    assert score(SILENT) == [0] * len(SILENT)
    together = score([*SILENT, GOOD, "edema " * 500])
    assert together[len(SILENT)] == pytest.approx(score([GOOD])[0], abs=1e-5) and together[len(SILENT)] > 0


def test_green_does_not_ask_about_them(monkeypatch):
    class Judge(torch.nn.Module):
        config = type("", (), {"max_position_embeddings": 900})

        def get_input_embeddings(self):
            return torch.nn.Embedding(3, 1)

        def generate(self, ids, **settings):
            assert len(ids) == 1  # the good one
            return torch.cat([ids, ids[:, :1]], dim=1)

    class Tokens:
        eos_token, eos_token_id = "</s>", 2
        get_vocab = staticmethod(lambda: {"</s>": 2})

        def __call__(self, chats, **settings):
            if isinstance(chats, str):
                return {"input_ids": chats.split()}
            batch = {name: torch.ones(len(chats), 3, dtype=torch.long) for name in ("input_ids", "attention_mask")}
            return type("", (dict,), {"to": lambda self, device: self})(batch)

        def batch_decode(self, rows, **settings):
            return ["[Clinically Significant Errors]:\nNone.\n\n[Matched Findings]:\n2. A; B."] * len(rows)

    monkeypatch.setattr(green, "load_tokenizer", lambda *args, **settings: Tokens())
    monkeypatch.setattr(green, "load_whole", lambda *args, **settings: Judge())
    texts = [*SILENT, "edema " * 1000, GOOD]
    assert green.load_green("judge")(texts, [GOOD] * len(texts)) == [0] * (len(texts) - 1) + [1]
