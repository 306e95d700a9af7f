"""Model folders: is all there, whole and without code (before loading), and did all find its place (after it)?"""

import json
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open

from formats.files import read_json

LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's files before 1.6, which tell neither length nor sums
POINTER = b"version https://git-lfs"  # what git leaves where a large file was not fetched
FETCH = "fetch it again (`git lfs pull` or `hf download`)"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spm.model", "spiece.model",
              "sentencepiece.bpe.model")  # the last three: DeBERTa-v3's, T5's, XLM-RoBERTa's
KNOWN_TEXTS = ("no effusion", "the heart is normal")  # what any model of English reports can spell
# what torch, transformers, open_clip, PEFT and the metrics' packages make of damaged files
BROKEN = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError,
          ImportError, ArithmeticError, SafetensorError, StrictDataclassError, UnpicklingError, tarfile.TarError,
          zipfile.BadZipFile, zlib.error, TemplateError)  # fmt: skip
REFUSED = {**dict.fromkeys(("auto_map", "trust_remote_code"), "asks for code that comes with the weights: never run"),
           "quantization_config": "its weights are quantised; use the checkpoint as it was before"}  # fmt: skip


@contextmanager
def loading(what: str, advice: str = "") -> Iterator[None]:
    """Turns what goes wrong in a `with loading(...):` that reads files into a ValueError: what (why); advice."""
    try:
        yield
    except torch.OutOfMemoryError:  # says what it is, and is no bad file
        raise
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, BROKEN):  # tokenizers raises plain Exception
            raise
        kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
        why = f"{what} ({kind}{' '.join(str(error).split())[:300]})"
        raise ValueError(f"{why}; {advice}" if advice else why) from error


def require(folder: Path, *names: str) -> None:
    """ValueError unless `folder` has one of the files `names`, and none of them is empty or a git-lfs pointer."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder}: no {' or '.join(names)}" if folder.is_dir() else f"{folder}: no such folder")
    for path in found:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if start in (b"", POINTER):
            what = "a git-lfs pointer, not the file itself" if start else "empty"
            raise ValueError(f"{path}: {what}: {FETCH}")


def refuse(folder: Path) -> None:
    """ValueError where one of the folder's *config.json holds, at any depth, a key of REFUSED that is not empty."""
    for path in sorted(folder.glob("*config.json")):
        found = re.search(rf'"({"|".join(REFUSED)})": (?!null|false|{{}})', json.dumps(read_json(path)))
        if found:
            raise ValueError(f"{path}: '{found[1]}': {REFUSED[found[1]]}")


def load_tokenizer(folder: str | Path, **settings):
    """The tokenizer of a model's folder or hub name, after `check_tokenizer`; settings: for AutoTokenizer.

    ValueError, one line, for files that are absent or damaged, or ask for code.
    """
    from transformers import AutoTokenizer  # seconds, which most who import this module need not wait

    if Path(folder).is_dir():
        require(Path(folder), *TOKENIZERS)
        refuse(Path(folder))
    with loading(f"{folder}: its tokenizer cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)
        check_tokenizer(tokenizer, folder)
    return tokenizer


def check_tokenizer(tokenizer, folder: str | Path) -> None:
    """ValueError unless a known text survives the round trip, but for case and blanks, in fewer tokens than letters.

    transformers makes up an empty vocabulary where files are absent, and spells words letter by letter where a large
    one lost its merges.
    """
    for text in KNOWN_TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = len(ids) < len(text) or len(tokenizer) < 1000
        if whole and "".join(tokenizer.decode(ids).lower().split()) == text.replace(" ", ""):
            return
    raise ValueError(f"{folder}: with {len(tokenizer)} tokens it cannot spell '{text}': are the files this model's?")


def require_rows(tokenizer, rows: int, where: str | Path) -> None:
    """ValueError unless a table of `rows` embeddings has one for each id of the tokenizer."""
    most = max(tokenizer.get_vocab().values())
    if most >= rows:
        raise ValueError(f"{where}: the tokenizer's ids reach {most}, the model has {rows} embeddings: one model's?")


def require_placed(missing: Iterable[str], unexpected: Iterable[str], where: str | Path) -> None:
    """ValueError unless both lists of tensor names, as a loader reports them, are empty."""
    for names, fault in ((sorted(missing), "are not in it"), (sorted(unexpected), "have no place in the model")):
        if names:
            raise ValueError(f"{where}: {len(names)} weights {fault}, e.g. {names[0]}")


def require_finite_tensors(tensors: torch.nn.Module | dict[str, torch.Tensor], where: str | Path) -> None:
    """ValueError naming the first tensor, of a module or by its name, that holds a NaN or infinity."""
    for name, tensor in (tensors.state_dict() if isinstance(tensors, torch.nn.Module) else tensors).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} holds NaN or infinity: is the file whole?")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """{tensor's name: shape} of a safetensors file; ValueError unless it is exactly as long as its header says."""
    with loading(f"{path}: broken or cut off", FETCH), safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def check_torch_file(path: Path) -> None:
    """ValueError for a file that is cut off, changed or not torch's: all of it is read, as torch checks no sums."""
    require(path.parent, path.name)
    with path.open("rb") as file:
        if file.read(len(LEGACY)) != LEGACY:
            check_zip(path, FETCH)


def check_zip(path: Path, advice: str = "") -> None:
    """ValueError unless every record of a zip archive, as torch's files and numpy's .npz are, fits its checksum."""
    with loading(f"{path}: broken or cut off", advice), zipfile.ZipFile(path) as archive:
        broken = any(part.CRC for part in archive.infolist()) and archive.testzip()  # torch can leave them out: 0
        if broken:
            raise ValueError(f"{broken} was changed")


def check_weights(folder: Path, stem: str = "model") -> None:
    """ValueError, naming the shard, unless every shard of a checkpoint folder is there and whole.

    Looked at is what transformers and open_clip would load: `stem`.safetensors, its index, the .bin, or its index.
    """
    bins = stem.replace("model", "pytorch_model")
    names = [name + end for name in (f"{stem}.safetensors", f"{bins}.bin") for end in ("", ".index.json")]
    first = next((name for name in names if (folder / name).is_file()), None)
    if first is None:
        raise ValueError(f"{folder}: no weights ({stem}.safetensors, {bins}.bin or an index of shards)")
    places = read_json(folder / first).get("weight_map") if first.endswith(".json") else {"": first}
    if not (places and isinstance(places, dict) and all(isinstance(name, str) for name in places.values())):
        raise ValueError(f"{folder / first}: its weight_map does not name a file for each tensor")
    for name in sorted(set(places.values())):
        require(folder, name)
        if name.endswith(".safetensors"):
            by_index = {tensor for tensor, shard in places.items() if tensor and shard == name}
            require_placed(by_index - tensor_shapes(folder / name).keys(), [], folder / name)
        else:
            check_torch_file(folder / name)


def check_model(folder: Path) -> None:
    """ValueError unless `folder` has configuration, tokenizer files and whole weights."""
    require(folder, "config.json")
    require(folder, *TOKENIZERS)  # transformers would make up an empty one
    refuse(folder)
    check_weights(folder)


def check_open_clip(folder: Path) -> None:
    """ValueError unless `folder` is a whole open_clip model, or all its folders 0, 1, ... are, a cross-fitted expert's.

    A Hugging Face text tower needs its config.json.
    """
    for part in sorted(folder.glob("[0-9]")) or [folder]:
        require(part, "open_clip_config.json")
        refuse(part)
        check_weights(part, "open_clip_model")
        with loading(f"{part / 'open_clip_config.json'}: has no table model_cfg.text_cfg"):
            text = dict(read_json(part / "open_clip_config.json")["model_cfg"]["text_cfg"])
        if "hf_tokenizer_name" in text:
            load_tokenizer(part)
        if "hf_model_name" in text:
            require(part, "config.json")


def check_radgraph(folder: Path) -> str:
    """The BERT that an unpacked archive of the `radgraph` package names; ValueError unless it is whole."""
    for name in ("config.json", "weights.th", "vocabulary/non_padded_namespaces.txt"):
        require(folder, name)
    check_torch_file(folder / "weights.th")
    with loading(f"{folder / 'config.json'}: names no encoder"):
        return read_json(folder / "config.json")["model"]["embedder"]["token_embedders"]["bert"]["model_name"]
