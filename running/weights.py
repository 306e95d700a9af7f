"""Checkpoint files looked at without loading them: are they whole, and how many weights do they hold?"""

import json
import zipfile
from math import prod
from pathlib import Path

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before version 1.6
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


def require(folder: Path, *names: str) -> None:
    """ValueError unless `folder` has one of the files `names`."""
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{folder}: no {' or '.join(names)}" if folder.is_dir() else f"{folder}: no such folder")


def read_json(path: Path) -> dict:
    """A JSON object; ValueError with one line when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def safetensors_header(path: Path) -> dict[str, dict]:
    """{tensor name: {"dtype", "shape", "data_offsets"}}; ValueError when the file is not as long as its header says.

    The format: 8 bytes with the header's length, the header as JSON, the data [safetensors].
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError(f"{path}: cut off after {size:,} bytes, inside its header: fetch it again")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: no safetensors file ({error}): fetch it again") from None
    header.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != end:
        raise ValueError(f"{path}: {size:,} bytes where its header says {end:,}: fetch it again")
    return header


def check_torch_file(path: Path) -> None:
    """ValueError for a torch file that is cut off or none. The layout before torch 1.6 does not tell its length."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        legacy = file.read(len(LEGACY)) == LEGACY
    if not legacy and not zipfile.is_zipfile(path):  # a zip's table of contents is at its end
        raise ValueError(f"{path}: cut off or no torch file ({path.stat().st_size:,} bytes): fetch it again")


def shards_of(folder: Path, stem: str) -> dict[Path, set[str]]:
    """{file: tensors that an index puts there (none without an index)} of the checkpoint that would be loaded.

    Looked for in transformers' and open_clip's order: `stem`.safetensors, its index, the .bin and its index. ValueError
    when there is none.
    """
    bins = stem.replace("model", "pytorch_model")
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{bins}.bin", f"{bins}.bin.index.json"):
        path = folder / name
        if path.is_file() and path.suffix != ".json":
            return {path: set()}
        if path.is_file():
            shards = {}
            for tensor, shard in read_json(path).get("weight_map", {}).items():
                shards.setdefault(folder / shard, set()).add(tensor)
            return shards
    raise ValueError(f"{folder}: no weights ({stem}.safetensors, {bins}.bin or an index of shards)")


def count_weights(folder: Path, stem: str = "model") -> int:
    """Number of weights of a checkpoint folder whose every shard is there and whole; else ValueError naming the shard.

    A .bin has no header: its weights are counted from its bytes, two each.
    """
    total = 0
    for path, tensors in shards_of(folder, stem).items():
        if not path.is_file():
            raise ValueError(f"{path}: the index names this shard, but it is not there")
        if path.suffix != ".safetensors":
            check_torch_file(path)
            total += path.stat().st_size // 2
            continue
        header = safetensors_header(path)
        if tensors - header.keys():
            raise ValueError(f"{path}: lacks tensor {min(tensors - header.keys())}, which the index puts there")
        total += sum(prod(tensor["shape"]) for tensor in header.values())
    return total


def check_bert(folder: Path, weights: bool) -> None:
    """ValueError unless `folder` holds a Hugging Face encoder: config, tokenizer and, where wanted, weights."""
    require(folder, "config.json")
    require(folder, *TOKENIZER_FILES)
    if weights:
        count_weights(folder)


def check_open_clip(folder: Path) -> None:
    """ValueError unless `folder` is an open_clip model; a Hugging Face text tower needs its own config.json there."""
    require(folder, "open_clip_config.json")
    require(folder, *TOKENIZER_FILES)
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
