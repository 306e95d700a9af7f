"""CheXbert on tiny random models in its real on-disk layout."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from test_running_weights import POINTER, flip_a_weight
from tiny_bert import sentences, write_bert
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks import reward_pass
from rewards import label_f1
from scorers import chexbert, frozen

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT folder (config, tokenizer, weights) with a CheXbert checkpoint in it."""
    path = tmp_path_factory.mktemp("bert")
    model = chexbert.CheXbert(write_bert(path))
    torch.nn.init.normal_(model.linear_heads[13].weight)
    torch.save({"model_state_dict": torch.nn.ModuleDict({"module": model}).state_dict()}, path / "chexbert.pth")
    return path


def edit(folder, tmp_path, change):
    """A copy of the folder's checkpoint, changed."""
    data = torch.load(folder / "chexbert.pth", weights_only=True)
    torch.save(change(data), tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def enlarge(folder, copy):
    """A copy of a BERT's folder whose tokenizer knows more words than the model."""
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").unlink()
    with (copy / "vocab.txt").open("a") as file:
        file.write("".join(f"\nword{i}" for i in range(50)))


def test_label_f1_by_hand():
    rows = {"none": [], "a": [1], "ab": [1, 2], "bc": [2, 3], "normal": [13]}
    rows = {name: [i in on for i in range(14)] for name, on in rows.items()}
    cases = [("none", "none", 1), ("a", "none", 0), ("none", "a", 0), ("a", "a", 1), ("a", "ab", 2 / 3),
             ("ab", "bc", 0.5), ("normal", "normal", 1), ("normal", "a", 0)]  # fmt: skip
    got = label_f1(np.array([rows[a] for a, _, _ in cases]), np.array([rows[b] for _, b, _ in cases]))
    assert got == pytest.approx([value for *_, value in cases])
    assert label_f1(np.zeros((0, 14), bool), np.zeros((0, 14), bool)) == []


def test_weights_are_read_with_and_without_prefix_and_old_constants(folder, tmp_path):
    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    assert "module.bert.embeddings.word_embeddings.weight" in state and "module.linear_heads.13.bias" in state
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    torch.save({"model_state_dict": plain}, tmp_path / "plain.pth")
    old = state | {"module.bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({"model_state_dict": old}, tmp_path / "old.pth")
    for path in (folder / "chexbert.pth", tmp_path / "plain.pth", tmp_path / "old.pth"):
        read = chexbert.load_chexbert(path, folder).model.state_dict()
        assert read.keys() == plain.keys() and all(torch.equal(read[name], plain[name]) for name in plain)


def test_bad_checkpoints_are_one_line(folder, tmp_path):
    key = "module.linear_heads.3.weight"

    def drop(data):
        del data["model_state_dict"][key]
        return data

    def rename(data):
        data["model_state_dict"]["module.extra"] = torch.zeros(1)
        return data

    def spoil(data):
        data["model_state_dict"][key][0, 0] = torch.nan
        return data

    def shrink(data):
        data["model_state_dict"][key] = torch.zeros(4, 8)
        return data

    cases = [
        (drop, "Missing key.*linear_heads.3.weight"), (rename, "Unexpected key.*extra"),
        (spoil, "linear_heads.3.weight holds NaN"),
        (shrink, r"linear_heads.3.weight.*\[4, 8\].*\[4, 32\]"),
        (lambda data: {"state_dict": data}, "'model_state_dict'"), (lambda data: {"model_state_dict": [1]}, "items"),
        (lambda data: data | {"model": os.system}, "Weights only load failed"),  # a pickle that runs code
    ]  # fmt: skip
    for change, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            chexbert.load_chexbert(edit(folder, tmp_path, change), folder)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint_are_one_line(folder, tmp_path):
    whole = (folder / "chexbert.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("half.pth", "text.pth", "empty.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            chexbert.load_chexbert(tmp_path / name, folder)
        assert "\n" not in str(caught.value)
    (tmp_path / "pointer.pth").write_text(POINTER)
    shutil.copy(folder / "chexbert.pth", tmp_path / "flipped.pth")
    flip_a_weight(tmp_path / "flipped.pth")
    for name, message in (("pointer", "a git-lfs pointer"), ("empty", "empty"), ("flipped", "broken or cut off")):
        with pytest.raises(ValueError, match=f"chexbert: cannot load .*{name}.pth: {message}.*fetch it again"):
            chexbert.load_chexbert(tmp_path / f"{name}.pth", folder)
    with pytest.raises(ValueError, match=f"chexbert: cannot load {tmp_path}"):
        chexbert.load_chexbert(folder / "chexbert.pth", tmp_path)


def test_checkpoint_and_bert_by_hub_name(folder, hub):
    hub("owner/scorers", {"chexbert.pth": folder / "chexbert.pth"})
    hub("owner/bert", {path.name: path for path in folder.glob("*.json")})
    got = chexbert.load_chexbert("hf-hub:owner/scorers/chexbert.pth", "owner/bert").classes(sentences(20))
    assert (got == chexbert.load_chexbert(folder / "chexbert.pth", folder).classes(sentences(20))).all()
    cases = [("hf-hub:owner/scorers/other.pth", "cannot load"), ("hf-hub:owner/none/f.pth", "cannot load"),
             ("hf-hub:owner/scorers", "give .* hf-hub:OWNER/REPO/chexbert.pth")]  # fmt: skip
    for name, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            chexbert.load_chexbert(name, folder)
        assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", reward_pass.PARTS)
def test_both_sides_of_the_reward_benchmark_agree(part, monkeypatch):
    made, packed = [], frozen.packed
    monkeypatch.setattr(frozen, "LARGE", 1)  # as layers of a real size are
    monkeypatch.setattr(frozen, "packed", lambda *given: made.append(given) or packed(*given))
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    package, ours, references, passes = reward_pass.both_sides(part, config, 2, "cpu")
    assert len(passes) == 2 and not set(passes[0]) & set(passes[1]) and len(passes[0]) == len(references) == 16
    for candidates in passes:
        assert ours(candidates, references) == pytest.approx(package(candidates, references), abs=1e-4)
    assert bool(made) == (part in ("CheXbert", "RadGraph", "BERTScore"))


def package_labeller(folder):
    """f1chexbert's own labelling on the folder's checkpoint; its constructor downloads, so it is filled in by hand."""
    package = pytest.importorskip("f1chexbert.f1chexbert")
    oracle = package.F1CheXbert.__new__(package.F1CheXbert)
    torch.nn.Module.__init__(oracle)
    oracle.device, oracle.tokenizer = "cpu", AutoTokenizer.from_pretrained(folder)
    encode = oracle.tokenizer.convert_tokens_to_ids
    oracle.tokenizer.encode_plus = lambda tokens: {"input_ids": [2, *encode(tokens), 3]}  # gone from transformers 5
    oracle.model = package.bert_labeler(pretrain_path=str(folder)).eval()
    labeller = chexbert.load_chexbert(folder / "chexbert.pth", folder)
    oracle.model.load_state_dict(labeller.model.state_dict(), strict=True)
    return oracle.get_label


def test_labels_equal_the_package(folder):
    label = package_labeller(folder)
    texts = [text for text in sentences(45) if text.strip(".,: ")]  # the package asks the model about "." too
    texts += ["  small\n\n left \t effusion ", "x", *sentences(3, seed=1, most=1500)]
    assert max(len(text.split()) for text in texts) > 512
    expected = [label(text) for text in texts]
    classes = [[{"": 0, 1: 1, 0: 2, -1: 3}[v] for v in label(text, mode="classification")] for text in texts]
    labeller = chexbert.load_chexbert(folder / "chexbert.pth", folder)
    assert labeller(texts).astype(int).tolist() == expected
    assert labeller.classes(texts).tolist() == classes
    assert {0, 1, 2, 3} <= set(np.unique(classes)) and len({tuple(row) for row in expected}) > 5


def test_labels_of_real_reports_equal_the_package(folder, real_reports):
    label, labels = package_labeller(folder), chexbert.load_chexbert(folder / "chexbert.pth", folder)(real_reports)
    assert labels.astype(int).tolist() == [label(text) for text in real_reports]


def test_cache_and_duplicates_change_nothing(folder, monkeypatch):
    texts = sentences(80)
    fresh = chexbert.load_chexbert(folder / "chexbert.pth", folder)
    alone = np.concatenate([chexbert.load_chexbert(folder / "chexbert.pth", folder)([text]) for text in texts[:10]])
    assert (fresh([*texts, *texts[:10]])[80:] == alone).all()
    calls = []
    monkeypatch.setattr(fresh.model, "forward", lambda *a: calls.append(a))
    assert (fresh(texts[:10] + texts[:10])[:10] == alone).all() and not calls
    assert fresh([]).shape == (0, 14)


def test_a_made_up_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bert")
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / "bert" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="chexbert: cannot load .*tokenizer.json: empty") as caught:
        chexbert.load_chexbert(folder / "chexbert.pth", tmp_path / "bert")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_a_larger_model_and_a_model_of_no_width_are_refused(folder, tmp_path):
    enlarge(folder, tmp_path / "large")
    with pytest.raises(ValueError, match="^chexbert: .*the tokenizer's ids reach .*, the model has 40 embeddings"):
        chexbert.load_chexbert(folder / "chexbert.pth", tmp_path / "large")
    shutil.copytree(folder, tmp_path / "flat")
    BertConfig.from_pretrained(folder, hidden_size=0).save_pretrained(tmp_path / "flat")
    with pytest.raises(ValueError, match="^chexbert: cannot load .*ZeroDivisionError"):
        chexbert.load_chexbert(folder / "chexbert.pth", tmp_path / "flat")


def test_a_text_longer_than_the_positions_is_cut(tmp_path):
    write_bert(tmp_path)
    config = BertConfig.from_pretrained(tmp_path, max_position_embeddings=20)
    labeller = chexbert.Labeller(chexbert.CheXbert(BertModel(config)).eval(), chexbert.load_tokenizer(tmp_path))
    long, cut = " ".join(["left"] * 50), " ".join(["left"] * 18)
    assert labeller.classes([long]).tolist() == labeller.classes([cut]).tolist()


def test_empty_text_is_blank(folder):
    labeller = chexbert.load_chexbert(folder / "chexbert.pth", folder)
    assert not labeller.classes(["", " \n", ". . .", "\ud83d\ude00"]).any() and labeller(["clear"]).shape == (1, 14)
