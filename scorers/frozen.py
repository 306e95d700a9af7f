"""What all frozen models here share: files by path or hub name, texts, batches, remembered answers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from running.weights import check_weights, require_finite_tensors, require_placed
from vlm.fast_linear import can_be_packed, packed

CACHED = 65_536  # answers kept per scorer
LARGE = 2**18  # weights of a layer that are worth a second copy: those of BERT-base, not of the phantom's small models


def local_file(name: str | Path) -> Path:
    """A file's path; `hf-hub:OWNER/REPO/FILE` is fetched into the hub's cache once. ValueError for fewer parts."""
    if not str(name).startswith("hf-hub:"):
        return Path(name)
    owner, repo, file = str(name).removeprefix("hf-hub:").split("/", 2)
    return Path(hf_hub_download(f"{owner}/{repo}", file))


def load_whole(kind, folder: str | Path, **settings) -> torch.nn.Module:
    """kind.from_pretrained, frozen; ValueError unless all weights but an unused pooler's are in the files, and finite.
    A folder's files must be whole. With device_map="meta" the weights' names alone are looked at."""
    if Path(folder).is_dir():
        check_weights(Path(folder))
    model, info = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False, **settings)
    require_placed([name for name in info["missing_keys"] if "pooler" not in name], (), folder)
    if model.device.type != "meta":
        require_finite_tensors(model, folder)
    return model.eval().requires_grad_(False)


def pack_linears(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen `model`; on the CPU its large layers, not to be moved again, run in oneDNN's layout, with the same
    numbers to 1e-6: MKL, which torch asks otherwise, was half as fast on AMD cores with AVX-512."""
    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer.weight.numel() >= LARGE and can_be_packed(layer):
            layer.forward = packed(layer.weight, layer.bias)
    return model


def plain(text: str) -> str:
    """`text` as any tokenizer takes it, a lone surrogate as "?"; "" where there is no letter or digit in it."""
    return text.encode("utf-8", "replace").decode() if any(map(str.isalnum, text)) else ""


def of_like_length(items: list, length: Callable, device: str | torch.device) -> Iterator[list]:
    """Batches of a model's inputs, the longest first, each padded to `most` tokens at most. length(item): tokens."""
    most = 512 if torch.device(device).type == "cpu" else 16_384  # more overflow a CPU's cache, fewer starve a GPU
    rest = sorted(items, key=length)
    while rest:
        n = max(1, most // max(1, length(rest[-1])))
        yield rest[-n:]
        del rest[-n:]


def cached(cache: dict, keys: list, compute: Callable[[list], list]) -> list:
    """The value of each key, from `cache` where known; `compute` gets the missing keys once each."""
    if len(cache) > CACHED:
        cache.clear()
    missing = [key for key in dict.fromkeys(keys) if key not in cache]
    cache.update(zip(missing, compute(missing), strict=True))
    return [cache[key] for key in keys]
