"""weights.py on folders in the real layouts, whole and broken."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from running.weights import check_model, check_open_clip, check_radgraph, check_torch_file, count_weights


def write_shards(folder: Path, suffix: str = "safetensors") -> Path:
    """Two shards and an index: 12 + 8 weights."""
    folder.mkdir(exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {f"{stem}-00001-of-00002.{suffix}": {"a": torch.ones(3, 4)},
              f"{stem}-00002-of-00002.{suffix}": {"b": torch.ones(2, 2), "c": torch.ones(4)}}  # fmt: skip
    for name, tensors in shards.items():
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_counted_from_their_headers(tmp_path):
    assert count_weights(write_shards(tmp_path)) == 20


def test_a_missing_shard_a_cut_one_and_a_missing_tensor_are_named(tmp_path):
    folder = write_shards(tmp_path)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    for broken in (whole[:-1], whole[:20], whole + b"x", struct.pack("<Q", 4) + b"\xff\xfe{}", b""):
        second.write_bytes(broken)
        with pytest.raises(ValueError, match="00002-of-00002.safetensors: broken or cut off .*fetch it again"):
            count_weights(folder)
    save_file({"b": torch.ones(2, 2)}, second)
    with pytest.raises(ValueError, match="lacks tensor c, which the index puts there"):
        count_weights(folder)
    second.unlink()
    with pytest.raises(ValueError, match="the index names shard model-00002-of-00002.safetensors, which is not there"):
        count_weights(folder)
    with pytest.raises(ValueError, match="no weights"):
        count_weights(tmp_path / "empty")


def test_torch_files_whole_cut_and_of_the_old_layout(tmp_path):
    folder = write_shards(tmp_path, "bin")
    assert count_weights(folder) > 0
    path = folder / "pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="00002-of-00002.bin: broken or cut off"):
        count_weights(folder)
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_torch_file(tmp_path / "old.pth")
    with pytest.raises(ValueError, match=f"{tmp_path}: no none.pth"):
        check_torch_file(tmp_path / "none.pth")


def test_a_model_needs_configuration_tokenizer_and_where_asked_for_weights(tmp_path):
    with pytest.raises(ValueError, match="none: no such folder"):
        check_model(tmp_path / "none")
    for name, lacks in (("config.json", "config.json"), ("vocab.txt", "tokenizer.json or tokenizer.model")):
        with pytest.raises(ValueError, match=f"no {lacks}"):
            check_model(tmp_path, weights=False)
        (tmp_path / name).write_text("{}")
    check_model(tmp_path, weights=False)
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
    with pytest.raises(ValueError, match="no config.json of its text tower org/bert"):
        check_open_clip(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    check_open_clip(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights .open_clip_model.safetensors, open_clip_pytorch_model.bin"):
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
    with pytest.raises(ValueError, match="config.json: lacks 'model'"):
        check_radgraph(tmp_path)
