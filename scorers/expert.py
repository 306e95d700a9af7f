"""The frozen image-text expert of Eq. 6: cosine similarity of an image and a text through open_clip.

Native CLIP models and BiomedCLIP's layout (timm vision tower, Hugging Face BERT text tower) load from a local folder
(`open_clip_config.json`, `open_clip_model.safetensors`, tokenizer files) or from an `hf-hub:` name. A report longer
than the text context is split into windows of whole sentences whose embeddings are averaged: nothing is cut off.
"""

import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

TEXT_BATCH = 32  # windows per text forward pass; few, so that those of like length share one and little is padding
CACHED_IMAGES = 65_536  # image features kept; the oldest goes first


def encode_tokens(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Normalised text embeddings (N, D) of padded token ids (N, context), padding columns skipped; differentiable.

    Skipping is exact: a causal text tower never looks right of the pooled end token, and a Hugging Face tower masks
    the padding. Native towers add all `context` positions at once, so their position table and mask are cut to fit.
    Other towers (bidirectional, pooled at the last column) get every column.
    """
    text = getattr(model, "text", None)
    hf_tower = hasattr(text, "pooler")
    pool = getattr(model, "text_pool_type", getattr(text, "pool_type", None))
    mask = getattr(model if text is None else text, "attn_mask", None)
    if not hf_tower and (mask is None or pool not in ("argmax", "eos")):
        return F.normalize(model.encode_text(tokens), dim=-1)
    pad = text.config.pad_token_id if hf_tower else 0
    length = int((tokens != pad).any(dim=0).nonzero().max()) + 1  # up to the last: byte-pair id 0 is a "!" too
    if hf_tower:
        return F.normalize(model.encode_text(tokens[:, :length]), dim=-1)
    prefix, tower = ("", model) if text is None else ("text.", text)
    cut = {f"{prefix}positional_embedding": tower.positional_embedding[:length],
           f"{prefix}attn_mask": mask[:length, :length]}
    output = torch.func.functional_call(model, cut, kwargs={"text": tokens[:, :length]})
    return output["text_features"] if isinstance(output, dict) else output[1]


def count_tokens(tokenizer, text: str) -> int:
    """Tokens of `text` with the special tokens, before any truncation."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:  # open_clip's own byte-pair tokenizer adds a start and an end token
        return len(tokenizer.encode(text)) + 2
    return len(inner(text, verbose=False)["input_ids"])


def split_windows(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Consecutive windows of whole sentences, each as long as `fits` allows; joined they hold every word of `text`.

    A sentence that does not fit alone is split between words (a single word that does not fit is an error).
    """
    pieces, whole = [], " ".join(text.split())
    if whole and fits(whole):
        return [whole]
    for sentence in re.split(r"(?<=[.!?])\s+", whole):
        pieces += [sentence] if fits(sentence) else sentence.split(" ")
    windows, current = [], ""
    for piece in pieces:
        joined = f"{current} {piece}".strip()
        if current and not fits(joined):
            windows.append(current)
            joined = piece
        if not fits(joined):
            raise ValueError(f"expert: the word '{piece[:40]}...' alone is longer than the text context")
        current = joined
    return windows + [current] if current else windows


@dataclass
class Expert:
    """A frozen open_clip model with its preprocessing; make one with `load_expert`."""

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    context_length: int
    device: torch.device
    cache: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def image_features(self, images: list[Image.Image], ids: list[str]) -> torch.Tensor:
        """Normalised image embeddings (B, D); a study's is computed once, so `ids` must be unique per image.

        One image per forward pass: an embedding's last bits then never depend on which other images were still
        missing from the cache, and a run that was interrupted repeats itself exactly.
        """
        for image, key in zip(images, ids, strict=True):
            if key not in self.cache:
                pixels = self.preprocess(image.convert("RGB")).unsqueeze(0).to(self.device)
                self.cache[key] = F.normalize(self.model.encode_image(pixels), dim=-1)[0].float().cpu()
        features = torch.stack([self.cache[key] for key in ids]).to(self.device)
        while len(self.cache) > CACHED_IMAGES:
            self.cache.popitem(last=False)
        return features

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Normalised text embeddings (N, D); an empty text gets a row of zeros. Duplicates are embedded once."""
        unique = sorted(set(texts), key=lambda text: (len(text), text))
        spans, windows = {}, []
        for text in unique:
            found = split_windows(text, lambda part: count_tokens(self.tokenizer, part) <= self.context_length)
            spans[text] = (len(windows), len(windows) + len(found))
            windows += found
        if not windows:
            return torch.zeros(len(texts), self.dim(), device=self.device)
        chunks = [windows[i : i + TEXT_BATCH] for i in range(0, len(windows), TEXT_BATCH)]
        embedded = torch.cat([encode_tokens(self.model, self.tokenizer(c).to(self.device)).float() for c in chunks])
        rows = [embedded[slice(*spans[text])].sum(dim=0) for text in texts]  # the sum has the mean's direction
        return F.normalize(torch.stack(rows), dim=-1)

    def dim(self) -> int:
        """D, the size of the shared embedding space."""
        tokens = self.tokenizer(["x"]).to(self.device)
        with torch.no_grad():
            return self.model.encode_text(tokens).shape[-1]

    def similarity(self, images: list[Image.Image], ids: list[str], texts: list[str], group_size: int) -> torch.Tensor:
        """Eq. 6: cosine similarity (B, G) of image b with its texts b*G .. b*G + G-1, in [-1, 1].

        An empty text has no direction: it gets exactly -1.0, the least a cosine can be, never NaN.
        """
        if len(texts) != len(images) * group_size:
            raise ValueError(f"expert: {len(texts)} texts for {len(images)} images of {group_size} candidates each")
        text = self.text_features(texts).view(len(images), group_size, -1)
        cosine = torch.einsum("bd,bgd->bg", self.image_features(images, ids), text).clamp(-1, 1)
        empty = torch.tensor([not t.strip() for t in texts], device=self.device).view_as(cosine)
        return cosine.masked_fill(empty, -1.0)


def load_expert(path: str | Path, device: str | torch.device = "cpu") -> Expert:
    """Load an open_clip model from a local folder or an `hf-hub:` name, frozen and in eval mode.

    A Hugging Face text tower is built from the folder's own `config.json`, so that nothing is fetched; without that
    file open_clip looks its `hf_model_name` up, a folder or a hub name. Raises ValueError (one line) for what cannot
    be loaded.
    """
    path, overrides, hint = str(path), {}, ""
    name = path if path.startswith("hf-hub:") else f"local-dir:{path}"
    config_file = Path(path) / "open_clip_config.json"
    try:
        if name != path:
            text_cfg = json.loads(config_file.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
            if "hf_model_name" in text_cfg and (Path(path) / "config.json").is_file():
                overrides["text_cfg"] = {**text_cfg, "hf_model_name": path, "hf_model_pretrained": False}
            elif "hf_model_name" in text_cfg:
                hint = f"; offline, put the config.json of {text_cfg['hf_model_name']} into {path}"
        model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True, **overrides)
        tokenizer = open_clip.get_tokenizer(name)
    except FileNotFoundError:
        raise ValueError(f"expert: {config_file} does not exist; give an open_clip folder or an hf-hub: name") from None
    except KeyError as error:
        raise ValueError(f"expert: {config_file} lacks {error}") from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        why = " ".join(str(error).split())[:300] + (hint if isinstance(error, OSError) else "")
        raise ValueError(f"expert: cannot load {path}: {why}") from error
    model.to(device).eval().requires_grad_(False)
    return Expert(model, preprocess, tokenizer, tokenizer.context_length, torch.device(device))


def save_expert(model: torch.nn.Module, config: dict, tokenizer, folder: str | Path) -> None:
    """Write `open_clip_config.json`, `open_clip_model.safetensors` and the tokenizer, as `load_expert` reads them.

    `config` is the whole file ({"model_cfg", "preprocess_cfg"}), `tokenizer` a transformers or open_clip tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
