"""Model files looked at without loading them: is all there and whole, and how many weights are they?"""

import zipfile
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from formats.files import read_json

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before version 1.6
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


def require(folder: Path, *names: str) -> None:
    """ValueError unless `folder` has one of the files `names`."""
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder}: no {' or '.join(names)}" if folder.is_dir() else f"{folder}: no such folder")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """{tensor's name: shape} of a safetensors file; ValueError unless it is exactly as long as its header says."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: broken or cut off ({error}): fetch it again") from error


def check_torch_file(path: Path) -> None:
    """ValueError for a file that is cut off or not torch's; torch's layout before 1.6 does not tell its length."""
    require(path.parent, path.name)
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY)) == LEGACY
    if not legacy and not zipfile.is_zipfile(path):  # a zip's table of contents is at its end
        raise ValueError(f"{path}: broken or cut off ({path.stat().st_size:,} bytes, no zip archive): fetch it again")


def weight_map(folder: Path, stem: str) -> dict[str, str]:
    """{tensor's name: file's name} by the index of the checkpoint that would be loaded; {"": file} where that is one.

    In transformers' and open_clip's order: `stem`.safetensors, its index, the .bin, its index; ValueError without any.
    """
    bins = stem.replace("model", "pytorch_model")
    for name in (f"{stem}.safetensors", f"{bins}.bin"):
        if (folder / name).is_file():
            return {"": name}
        if (folder / f"{name}.index.json").is_file():
            return read_json(folder / f"{name}.index.json").get("weight_map", {})
    raise ValueError(f"{folder}: no weights ({stem}.safetensors, {bins}.bin or an index of shards)")


def count_weights(folder: Path, stem: str = "model") -> int:
    """Number of weights of a checkpoint folder whose every shard is there and whole; else ValueError naming the shard.

    A .bin has no header: its weights are counted from its bytes, two each.
    """
    total, places = 0, weight_map(folder, stem)
    for name in sorted(set(places.values())):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder}: the index names shard {name}, which is not there")
        if path.suffix != ".safetensors":
            check_torch_file(path)
            total += path.stat().st_size // 2
            continue
        shapes = tensor_shapes(path)
        absent = [tensor for tensor, shard in places.items() if tensor and shard == name and tensor not in shapes]
        if absent:
            raise ValueError(f"{path}: lacks tensor {absent[0]}, which the index puts there")
        total += sum(map(prod, shapes.values()))
    return total


def check_model(folder: Path, weights: bool = True) -> None:
    """ValueError unless `folder` has a Hugging Face configuration, a tokenizer and, where asked for, whole weights."""
    require(folder, "config.json")
    require(folder, *TOKENIZERS)  # transformers would make up an empty one
    if weights:
        count_weights(folder)


def check_open_clip(folder: Path) -> None:
    """ValueError unless `folder` is an open_clip model; a Hugging Face text tower needs its own config.json there."""
    require(folder, "open_clip_config.json")
    require(folder, *TOKENIZERS)
    count_weights(folder, "open_clip_model")
    text = read_json(folder / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
    if "hf_model_name" in text and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json of its text tower {text['hf_model_name']}")


def check_radgraph(folder: Path) -> str:
    """The BERT that an unpacked archive of the `radgraph` package names; ValueError unless it is whole."""
    for name in ("config.json", "weights.th", "vocabulary/non_padded_namespaces.txt"):
        require(folder, name)
    check_torch_file(folder / "weights.th")
    try:
        return read_json(folder / "config.json")["model"]["embedder"]["token_embedders"]["bert"]["model_name"]
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'}: lacks {error}") from None
