"""weights.py on folders in the real layouts, whole and broken."""

import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils import serialization
from transformers import PreTrainedTokenizerFast

from running.weights import (
    check_model,
    check_open_clip,
    check_radgraph,
    check_tokenizer,
    check_torch_file,
    check_weights,
    load_tokenizer,
    loading,
    require,
    require_finite_tensors,
    require_placed,
    require_rows,
)


def write_shards(folder: Path, suffix: str = "safetensors") -> Path:
    """Two shards and an index."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {f"{stem}-00001-of-00002.{suffix}": {"a": torch.ones(3, 4)},
              f"{stem}-00002-of-00002.{suffix}": {"b": torch.ones(2, 2), "c": torch.ones(4)}}  # fmt: skip
    for name, tensors in shards.items():
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_whole_shards_pass(tmp_path):
    check_weights(write_shards(tmp_path))


def test_a_missing_shard_a_cut_one_and_a_missing_tensor_are_named(tmp_path):
    folder = write_shards(tmp_path)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for broken in (whole[:-1], whole[:20], whole + b"x", struct.pack("<Q", 4) + b"\xff\xfe{}", b""):
        second.write_bytes(broken)
        with pytest.raises(ValueError, match="00002-of-00002.safetensors: (broken or cut off|empty).*fetch it again"):
            check_weights(folder)
    save_file({"b": torch.ones(2, 2)}, second)
    with pytest.raises(ValueError, match="00002-of-00002.safetensors: 1 weights are not in it, e.g. c"):
        check_weights(folder)
    second.unlink()
    with pytest.raises(ValueError, match="no model-00002-of-00002.safetensors"):
        check_weights(folder)
    with pytest.raises(ValueError, match="no weights"):
        check_weights(tmp_path / "empty")


def test_torch_files_whole_cut_and_of_the_old_layout(tmp_path):
    folder = write_shards(tmp_path, "bin")
    check_weights(folder)
    path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="00002-of-00002.bin: broken or cut off"):
        check_weights(folder)
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_torch_file(tmp_path / "old.pth")
    with pytest.raises(ValueError, match=f"{tmp_path}: no none.pth"):
        check_torch_file(tmp_path / "none.pth")


def flip_a_weight(path: Path) -> None:
    """Change one bit in the middle of a torch file's largest tensor, which torch loads in silence."""
    with zipfile.ZipFile(path) as archive:
        largest = max((p for p in archive.infolist() if "/data/" in p.filename), key=lambda part: part.file_size)
        value = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(value) + len(value) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


def test_changed_bytes_of_a_torch_file_are_found(tmp_path):
    folder = write_shards(tmp_path, "bin")
    flip_a_weight(folder / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ValueError, match="00002-of-00002.bin: broken or cut off .*/data/.*; fetch it again"):
        check_weights(folder)
    whole = (folder / "pytorch_model-00001-of-00002.bin").read_bytes()
    for at in range(len(whole)):  # in headers too, what is found is one line
        (tmp_path / "x.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            check_torch_file(tmp_path / "x.pth")
        except ValueError as error:
            assert len(str(error).splitlines()) == 1


def test_a_torch_file_saved_without_sums_is_whole(tmp_path):
    with serialization.config.patch("save.compute_crc32", False):
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    check_torch_file(tmp_path / "x.pth")


@pytest.mark.parametrize("index", [
    {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": {"a": 1}},
    {"weight_map": {"a": ["x"]}}])  # fmt: skip
def test_an_index_that_names_no_files_is_one_line(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: its weight_map does not name a file for each tensor"):
        check_weights(tmp_path)


@pytest.mark.parametrize("config", [{}, {"model_cfg": []}, {"model_cfg": None}, {"model_cfg": {"text_cfg": [1]}}])
def test_an_open_clip_config_without_its_tables_is_one_line(tmp_path, config):
    torch.save({"a": torch.ones(3)}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="open_clip_config.json: has no table model_cfg.text_cfg"):
        check_open_clip(tmp_path)


@pytest.mark.parametrize("name", ["spm.model", "spiece.model", "sentencepiece.bpe.model"])
def test_sentencepiece_files_of_other_names_are_tokenizers(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("x")
    check_model(write_shards(tmp_path))


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path):
    folder = tokenizer_of(tmp_path / "bert", "bert", vocab_txt="[UNK]\n[SEP]\n[PAD]\n[CLS]\n[MASK]\nno\neffusion")
    tokenizer = load_tokenizer(folder)
    require_rows(tokenizer, 7, folder)
    with pytest.raises(ValueError, match="bert: the tokenizer's ids reach 6, the model has 6 embeddings"):
        require_rows(tokenizer, 6, folder)


def test_a_model_needs_configuration_tokenizer_and_where_asked_for_weights(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        check_model(tmp_path / "none")
    for name, lacks in (("config.json", "config.json"), ("vocab.txt", "tokenizer.json or tokenizer.model")):
        with pytest.raises(ValueError, match=f"no {lacks}"):
            check_model(tmp_path)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="no weights"):
        check_model(tmp_path)
    check_model(write_shards(tmp_path))
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cut off")  # beside safetensors, which are read instead
    check_model(tmp_path)


def test_an_open_clip_folder_needs_its_text_towers_config(tmp_path):
    config = {"model_cfg": {"text_cfg": {"hf_model_name": "org/bert"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("a\n")
    torch.save({"a": torch.ones(3)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"{tmp_path}: no config.json"):
        check_open_clip(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    check_open_clip(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights .open_clip_model.safetensors, open_clip_pytorch_model.bin"):
        check_open_clip(tmp_path)


def test_every_part_of_a_cross_fitted_expert_is_looked_at(tmp_path):
    for part in "01":
        (tmp_path / part).mkdir()
        (tmp_path / part / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {}}}')
        torch.save({"a": torch.ones(3)}, tmp_path / part / "open_clip_pytorch_model.bin")
    check_open_clip(tmp_path)
    (tmp_path / "1" / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="1: no weights"):
        check_open_clip(tmp_path)


def test_a_radgraph_archive(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        check_radgraph(tmp_path)
    bert = {"model": {"embedder": {"token_embedders": {"bert": {"model_name": "org/bert"}}}}}
    (tmp_path / "config.json").write_text(json.dumps(bert))
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n")
    torch.save({"a": torch.ones(3)}, tmp_path / "weights.th")
    assert check_radgraph(tmp_path) == "org/bert"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: names no encoder .KeyError: 'model'"):
        check_radgraph(tmp_path)


# ---------------------------------------------------------------------------------------- tokenizers and loaded weights

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def tokenizer_of(folder: Path, model_type: str, **files: str) -> Path:
    """A folder with a config.json and tokenizer files; `vocab_txt` becomes vocab.txt."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def byte_pairs(words: list[str], size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as Qwen's and RoBERTa's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_tokenizers_of_all_kinds_pass(tmp_path):
    lower = tokenizer_of(tmp_path / "bert", "bert", vocab_txt="[UNK]\nthe\nheart\nno\neff\n##usion")
    assert load_tokenizer(lower)("no EFFUSION", add_special_tokens=False)["input_ids"] == [3, 4, 5]
    byte_pairs(["the heart is normal"] * 9).save_pretrained(tmp_path / "bpe")
    assert load_tokenizer(tmp_path / "bpe", padding_side="left").padding_side == "left"
    words = tokenizer_of(tmp_path / "words", "bert", vocab_txt="[UNK]\nheart\nthe\nis\nnormal")
    load_tokenizer(words)  # one of the texts is enough: "no effusion" is unknown here
    metaspace = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁no", -1.0), ("▁effusion", -1.0)], unk_id=0))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=metaspace), tmp_path)


@pytest.mark.parametrize(("model_type", "files"), [
    ("bert", {}), ("bert", {"vocab_txt": ""}), ("bert", {"vocab_txt": POINTER}), ("bert", {"vocab_txt": "no\n"}),
    ("bert", {"vocab_txt": "[UNK]\nhund\nkatze"}), ("bert", {"tokenizer_json": POINTER}),
    ("bert", {"tokenizer_json": "{"}),
    ("bert", {"tokenizer_json": "[]"}), ("bert", {"tokenizer_json": '{"added_tokens": [], "model": {"type": "New"}}'}),
    ("roberta", {"vocab_json": "{}", "merges_txt": ""}), ("roberta", {"vocab_json": '{"n": 0}', "merges_txt": "#\n"}),
    ("qwen2_5_vl", {"vocab_json": "{}", "merges_txt": ""}), ("llama", {"tokenizer_model": POINTER}),
    ("llama", {"tokenizer_model": "cut off"}),
])  # fmt: skip
def test_tokenizers_that_are_made_up_or_damaged_are_one_line(tmp_path, model_type, files):
    folder = tokenizer_of(tmp_path / "folder", model_type, **files)
    with pytest.raises(ValueError, match="(no tokenizer.json or|empty|git-lfs|cannot spell|cannot be used)") as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_large_vocabulary_without_its_merges_is_no_tokenizer(tmp_path):
    whole = byte_pairs([f"the heart is normal no effusion {i:x}" for i in range(2000)], size=1500)
    check_tokenizer(whole, tmp_path)
    state = json.loads(whole.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(ValueError, match="cannot spell"):
        check_tokenizer(letters, tmp_path)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", {"auto_map": {"AutoConfig": "code.Config"}}, "code that comes with the weights"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.T", None]}}, "code that comes with the weights"),
    ("open_clip_config.json", {"a": [{"tokenizer_kwargs": {"trust_remote_code": True}}]}, "code that comes with"),
    ("config.json", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
])  # fmt: skip
def test_folders_that_ask_for_code_or_are_quantised_are_refused(tmp_path, name, content, said):
    folder = tokenizer_of(tmp_path / "folder", "bert", vocab_txt="[UNK]\nno\neffusion")
    (folder / name).write_text(json.dumps({"model_type": "bert"} | content))
    for load in (load_tokenizer, check_model):
        with pytest.raises(ValueError, match=f"{name}: '.*{said}"):
            load(folder)
    harmless = {"model_type": "bert", "auto_map": {}, "quantization_config": None, "trust_remote_code": False}
    (folder / name).write_text(json.dumps(harmless))
    load_tokenizer(folder)


def test_weights_without_a_place_and_not_finite_are_named():
    require_placed([], set(), "folder")
    with pytest.raises(ValueError, match="^folder: 2 weights are not in it, e.g. a$"):
        require_placed(["b", "a"], ["c"], "folder")
    with pytest.raises(ValueError, match="^folder: 1 weights have no place in the model, e.g. c$"):
        require_placed([], ["c"], "folder")
    layer = torch.nn.Linear(2, 2)
    require_finite_tensors(layer, "folder")
    require_finite_tensors({"count": torch.tensor(3)}, "folder")
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            layer.bias[1] = value
        for tensors in (layer, {"weight": torch.ones(2), "bias": layer.bias.to(torch.bfloat16)}):
            with pytest.raises(ValueError, match="^folder: bias holds NaN or infinity"):
                require_finite_tensors(tensors, "folder")


def test_git_lfs_pointers_are_named_as_such(tmp_path):
    folder = write_shards(tmp_path / "shards")
    (folder / "model-00001-of-00002.safetensors").write_text(POINTER)
    torch.save({}, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_text(POINTER)
    for check in (lambda: check_weights(folder), lambda: check_torch_file(tmp_path / "x.pth")):
        with pytest.raises(ValueError, match="a git-lfs pointer, not the file itself: fetch it again"):
            check()


@pytest.mark.parametrize("kind", [Exception, KeyError, zipfile.BadZipFile])
def test_what_a_library_raises_on_a_file_is_one_line(kind):
    with pytest.raises(ValueError, match=r"^x.bin: cut \(.*bad.*\); fetch it$"), loading("x.bin: cut", "fetch it"):
        raise kind("bad\n bytes")
    for other in (torch.OutOfMemoryError, MemoryError):  # no fault of the file
        with pytest.raises(other), loading("x.bin: broken"):
            raise other("full")


@pytest.mark.parametrize(("start", "what"), [(b"", "empty"), (b"version https://git-lfs.github.com/", "a git-lfs")])
def test_a_file_that_was_not_fetched_is_named(tmp_path, start, what):
    (tmp_path / "a.json").write_bytes(b"{}")
    (tmp_path / "b.json").write_bytes(start)
    require(tmp_path, "a.json", "c.json")
    with pytest.raises(ValueError, match=f"b.json: {what}.*fetch it again"):
        require(tmp_path, "a.json", "b.json")
