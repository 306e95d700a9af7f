"""BERTScore on a tiny random encoder, against the package."""

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_running_weights import flip_a_weight
from test_scorers_chexbert import enlarge
from tiny_bert import sentences, write_bert

from scorers import bertscore

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT folder: config, tokenizer, weights."""
    path = tmp_path_factory.mktemp("bert")
    write_bert(path)
    return path


def test_bertscore(folder, capsys):
    score = bertscore.load_bertscore(folder, 1)
    texts = sentences(12)
    assert score(texts, texts) == pytest.approx([1.0] * 12, abs=1e-5)
    got = score(["", texts[0], " ", texts[0], texts[1], texts[0]], [texts[0], "", "", texts[2], texts[2], texts[2]])
    assert got[:3] == [0, 0, 0] and 0 < got[3] < 1 and got[3] == got[5] != got[4]
    assert score([], []) == []
    assert score.truncated == 0
    long = sentences(1, seed=3, most=30)[0] + " left" * 600
    assert score([long], [long]) == pytest.approx([1.0], abs=1e-5) and score.truncated == 1
    assert score([long], [long + " pneumothorax"]) == pytest.approx([1.0], abs=1e-5)  # behind the cut
    assert score.truncated == 3 and capsys.readouterr().out.count("longer than 512 tokens") == 1


def test_bertscore_equals_the_package(folder):
    from bert_score import BERTScorer

    ours, theirs = sentences(70, seed=4), sentences(70, seed=5)
    scorer = BERTScorer(model_type=str(folder), num_layers=2, device="cpu")
    scorer._tokenizer.model_max_length = 512
    expected = scorer.score(ours, theirs)[2].clamp(0, 1).tolist()
    assert bertscore.load_bertscore(folder, 2)(ours, theirs) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_is_what_its_config_says_wherever_it_lies(folder, tmp_path):
    """The package takes each name with "t5" in it for a T5: a BERT below such a folder was not to be loaded."""
    ours, theirs = sentences(5, seed=4), sentences(5, seed=5)
    moved = shutil.copytree(folder, tmp_path / "disk-t5" / "bert")
    assert bertscore.load_bertscore(moved, 2)(ours, theirs) == bertscore.load_bertscore(folder, 2)(ours, theirs)
    t5, size = shutil.copytree(folder, tmp_path / "mine"), len(transformers.AutoTokenizer.from_pretrained(folder))
    for name in ("config.json", "model.safetensors"):
        (t5 / name).unlink()
    transformers.T5Model(transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2,
                                               num_heads=2)).save_pretrained(t5)  # fmt: skip
    (config := t5 / "tokenizer_config.json").write_text(
        json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "BertTokenizer"}))  # fmt: skip
    got = bertscore.load_bertscore(t5, 1)(ours, theirs)
    assert got == bertscore.load_bertscore(shutil.copytree(t5, tmp_path / "disk-t5" / "t5"), 1)(ours, theirs)
    assert all(0 < f < 1 for f in got)


def baseline_file(path, rows):
    path.write_text("LAYER,P,R,F\n" + "".join(f"{layer},.1,.2,{f}\n" for layer, f in enumerate(rows)))
    return str(path)


def test_bertscore_rescaled(folder, tmp_path):
    """(F - b) / (1 - b) as the package does it; what falls below 0 is 0; an empty text stays 0."""
    from bert_score import BERTScorer

    ours, theirs = sentences(40, seed=6), sentences(40, seed=7)
    plain = bertscore.load_bertscore(folder, 2)(ours, theirs)
    middle = float(np.median(plain))
    path = baseline_file(tmp_path / "b.tsv", [0, 0.5, middle])
    got = bertscore.load_bertscore(folder, 2, baseline=path)([*ours, "", "left"], [*theirs, "left", "left"])
    package = BERTScorer(model_type=str(folder), num_layers=2, device="cpu", lang="en", rescale_with_baseline=True,
                         baseline_path=path)  # fmt: skip
    package._tokenizer.model_max_length = 512
    expected = package.score(ours, theirs)[2]
    assert got == pytest.approx([*expected.clamp(0, 1).tolist(), 0, 1], abs=1e-5)
    assert (expected < -0.01).any() and (expected > 0.01).any()
    assert got[:40] == pytest.approx([max(0, (f - middle) / (1 - middle)) for f in plain], abs=1e-5)


def test_bertscore_baselines_of_the_package(folder, tmp_path):
    assert bertscore.baseline_f1("roberta-large", 17, "package") == pytest.approx(0.8315, abs=1e-3)
    assert bertscore.baseline_f1("microsoft/deberta-base", 9, "package") == pytest.approx(0.62694, abs=1e-5)
    (tmp_path / "text.tsv").write_text("LAYER,P,R,F\n2,a,b,c\n")
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    (tmp_path / "bom.tsv").write_text("LAYER,P,R,F\n2,.1,.2,.3\n", encoding="utf-8-sig")
    assert bertscore.baseline_f1(folder, 2, str(tmp_path / "bom.tsv")) == 0.3
    cases = [("package", "No such file"), (str(tmp_path / "absent.tsv"), "No such file"),
             (baseline_file(tmp_path / "short.tsv", [0, 0.5]), "layer 2 of .*KeyError: 2"),
             (str(tmp_path / "text.tsv"), "could not convert string to float"),
             (str(tmp_path / "other.tsv"), "KeyError: 'LAYER'"),
             *[(baseline_file(tmp_path / f"{b}.tsv", [0, 0, b]), "number below 1") for b in (1, "-inf", "nan")],
             ]  # fmt: skip
    for baseline, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            bertscore.load_bertscore(folder, 2, baseline=baseline)
        assert "\n" not in str(caught.value) and "bertscore:" in str(caught.value)


def test_bertscore_bad_folder_is_one_line(folder, tmp_path):
    for path, layer in ((folder, 9), (tmp_path, 1)):
        with pytest.raises(ValueError, match=f"bertscore: cannot load layer {layer} of {path}") as caught:
            bertscore.load_bertscore(path, layer)
        assert "\n" not in str(caught.value)


def test_an_encoder_that_is_not_whole_is_refused(folder, tmp_path):
    """A tensor that is not there would be filled at random, a NaN would score 0; a pooler is never asked."""
    state = load_file(folder / "model.safetensors")
    query, word = "encoder.layer.1.attention.self.query.weight", "embeddings.word_embeddings.weight"
    cases = [({k: v for k, v in state.items() if k != query}, query),
             ({f"other.{k}": v for k, v in state.items()}, "embeddings"),
             (state | {word: state[word].index_fill(0, torch.tensor([7]), torch.nan)}, f"{word} holds NaN"),
             (state | {query: state[query] * torch.inf}, f"{query} holds NaN or inf")]  # fmt: skip
    shutil.copytree(folder, tmp_path / "bert")
    for tensors, message in cases:
        save_file(tensors, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"bertscore: .*{message}") as caught:
            bertscore.load_bertscore(tmp_path / "bert", 2)
        assert "\n" not in str(caught.value)
    bare = {k: v for k, v in state.items() if "pooler" not in k}
    bare |= {"lm_head.bias": torch.ones(3)}
    save_file(bare, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = (bertscore.load_bertscore(place, 2) for place in (tmp_path / "bert", folder))
    assert ours(sentences(6), sentences(6, seed=1)) == theirs(sentences(6), sentences(6, seed=1))


def test_finite_weights_that_give_no_finite_state_are_refused(folder, tmp_path):
    """Else each score would be 0: nothing in a safetensors file tells that it was changed."""
    shutil.copytree(folder, tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    state["encoder.layer.1.output.LayerNorm.weight"].fill_(3e38)
    save_file(state, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="^bertscore: cannot load .*a token's state holds NaN or infinity"):
        bertscore.load_bertscore(tmp_path / "bert", 2)


def test_a_tokenizer_of_a_larger_model_and_changed_bytes_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bert")
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "bert" / "pytorch_model.bin")
    (tmp_path / "bert" / "model.safetensors").unlink()
    bertscore.load_bertscore(tmp_path / "bert", 2)
    flip_a_weight(tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="^bertscore: cannot load .*pytorch_model.bin: broken or cut off"):
        bertscore.load_bertscore(tmp_path / "bert", 2)
    enlarge(folder, tmp_path / "large")
    with pytest.raises(ValueError, match="^bertscore: .*the tokenizer's ids reach .*, the model has 40 embeddings"):
        bertscore.load_bertscore(tmp_path / "large", 2)


@pytest.mark.parametrize("files", [
    {"vocab.txt": None, "tokenizer.json": None}, {"tokenizer.json": b"", "vocab.txt": b""},
    {"tokenizer.json": b"version https://git-lfs.github.com/spec/v1\n"}])  # fmt: skip
def test_a_made_up_tokenizer_is_refused(folder, tmp_path, files):
    shutil.copytree(folder, tmp_path / "bert")
    for name, content in files.items():
        (tmp_path / "bert" / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "bert" / name).write_bytes(content)
    with pytest.raises(ValueError, match="bertscore: cannot load ") as caught:
        bertscore.load_bertscore(tmp_path / "bert", 2)
    assert "\n" not in str(caught.value)


POSITIONS = {  # name of an encoder: (tokens that it takes, its settings)
    "Bert": (30, {}),
    "Roberta": (28, {"pad_token_id": 1}),  # numbered from behind the padding's position
    "Deberta": (30, {"relative_attention": True, "pos_att_type": ["c2p"], "position_biased_input": False}),
    "ModernBert": (30, {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}),
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_text_longer_than_the_positions_is_cut(tmp_path, kind):
    limit, settings = POSITIONS[kind]
    write_bert(tmp_path)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=30, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    score = bertscore.load_bertscore(tmp_path, 2)
    words = ["left"] * (limit - 2)
    assert score([" ".join(words)], ["right"])[0] >= 0 and score.truncated == 0
    assert score([" ".join([*words, "clear"])], [" ".join(words)]) == pytest.approx([1], abs=1e-5)
    assert score.truncated == 1
