"""The frozen image-text expert of Eq. 6: cosine similarity of an image and a text through open_clip.

Native CLIP models and BiomedCLIP's layout (timm vision tower, Hugging Face BERT text tower) load from a folder
(`open_clip_config.json`, `open_clip_model.safetensors`, tokenizer files) or an `hf-hub:` name. A report longer than the
text context is split into windows of whole sentences whose embeddings are averaged: nothing is cut off.
"""

import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig

from formats.files import read_json
from rewards import image_text_similarity
from running.weights import check_torch_file, load_tokenizer, loading, refuse, require_finite_tensors, require_rows
from scorers.frozen import cached, local_file, pack_linears, plain

TEXT_BATCH = 32  # windows per text forward pass; few, so that those of like length share one and little is padding
# of tokenizer_kwargs in open_clip_config.json, which open_clip hands on to transformers; others may name code or files
TOKENIZER_KWARGS = {"clean", "strip_sep_token", "language"}


def encode_tokens(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Normalised text embeddings (N, D) of padded token ids (N, context), padding columns skipped; differentiable.

    Skipping is exact: a causal text tower never looks right of the pooled end token, and a Hugging Face tower masks
    the padding. Native towers add all `context` positions at once, so their position table and mask are cut to fit.
    Other towers (bidirectional, pooled at the last column) get every column.
    """
    tower, prefix = (model.text, "text.") if hasattr(model, "text") else (model, "")
    hugging_face, mask = hasattr(tower, "pooler"), getattr(tower, "attn_mask", None)
    pool = getattr(model, "text_pool_type", getattr(tower, "pool_type", None))
    causal = mask is not None and pool in ("argmax", "eos")
    if causal or hugging_face:
        pad = tower.config.pad_token_id if hugging_face else 0
        length = int((tokens != pad).any(dim=0).nonzero().max()) + 1  # up to the last: byte-pair id 0 is a "!" too
        tokens = tokens[:, :length]
    cut = {f"{prefix}positional_embedding": tower.positional_embedding[:length],
           f"{prefix}attn_mask": mask[:length, :length]} if causal else {}  # fmt: skip
    output = torch.func.functional_call(model, cut, kwargs={"text": tokens})
    return output["text_features"] if isinstance(output, dict) else output[1]


def count_tokens(tokenizer, text: str) -> int:
    """Tokens of `text` with the special tokens, before any truncation."""
    inner = getattr(tokenizer, "tokenizer", None)  # None: open_clip's own byte pairs, a start and an end token around
    return len(tokenizer.encode(text)) + 2 if inner is None else len(inner(text, verbose=False)["input_ids"])


def split_windows(text: str, fits: Callable[[str], bool]) -> list[str]:
    """All of `text` in windows, each as long as `fits` allows, of whole sentences.

    A sentence that is too long is split into its words, a word into halves: a policy gone astray writes endless ones.
    """
    todo, windows = [" ".join(text.split())], []
    while todo:
        piece = todo.pop()
        half = len(piece) // 2
        if windows and fits(f"{windows[-1]} {piece}"):
            windows[-1] += f" {piece}"
        elif not half or fits(piece):
            windows += [piece] * bool(piece)
        else:
            ways = re.split(r"(?<=[.!?])\s+", piece), piece.split(" "), (piece[:half], piece[half:])
            todo += reversed(next(parts for parts in ways if len(parts) > 1))
    return windows


@dataclass
class Expert:
    """A frozen open_clip model with its preprocessing; make one with `load_expert`."""

    model: torch.nn.Module
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: torch.device
    cache: dict[str, torch.Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def image_features(self, images: list[Image.Image], ids: list[str]) -> torch.Tensor:
        """Normalised image embeddings (B, D); a study's is computed once, so `ids` must be unique per image.

        One image a forward pass: its last bits then never depend on what the cache lacked, and a resumed run repeats.
        """
        shown = dict(zip(ids, images, strict=True))

        def embed(missing: list[str]) -> list[torch.Tensor]:
            pixels = (self.preprocess(shown[key].convert("RGB"))[None].to(self.device) for key in missing)
            return [F.normalize(self.model.encode_image(p), dim=-1)[0].float().cpu() for p in pixels]

        return torch.stack(cached(self.cache, ids, embed)).to(self.device)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Normalised text embeddings (N, D); a text without a word gets zeros. Duplicates are embedded once."""
        texts, spans, windows, context = list(map(plain, texts)), {}, [], self.tokenizer.context_length
        for text in sorted(set(texts), key=lambda text: (len(text), text)):
            found = split_windows(text, lambda part: count_tokens(self.tokenizer, part) <= context)
            spans[text] = slice(len(windows), len(windows) + len(found))
            windows += found
        chunks = [windows[i : i + TEXT_BATCH] for i in range(0, len(windows), TEXT_BATCH)] or [[""]]  # which tells D
        embedded = torch.cat([encode_tokens(self.model, self.tokenizer(c).to(self.device)).float() for c in chunks])
        rows = [embedded[spans[text]].sum(dim=0) for text in texts]  # the sum has the mean's direction
        return F.normalize(torch.stack(rows), dim=-1)

    def similarity(self, images: list[Image.Image], ids: list[str], groups: list[list[str]]) -> torch.Tensor:
        """Eq. 6: S = cos(text embedding, image feature), (B, G) of image b with the G texts groups[b], on the CPU.

        A text without a word (rewards.py hands an unreadable candidate over as "") gets exactly -1.0, a cosine's least.
        """
        texts = self.text_features([text for group in groups for text in group]).view(len(groups), len(groups[0]), -1)
        cosine = image_text_similarity(self.image_features(images, ids), texts).cpu()
        return cosine.masked_fill(torch.tensor([[not plain(text) for text in group] for group in groups]), -1.0)


def with_errors(similarity: Callable, deviation: float) -> Callable:
    """Eq. 6's function with a random error of that standard deviation in each (study, text), always the same one: an
    expert that errs, but not by language prior. 0: the function itself."""

    def error(study_id: str, text: str) -> float:
        seed = hashlib.sha256(f"{study_id}\n{text}".encode(errors="replace")).digest()
        return deviation * np.random.default_rng(list(seed)).standard_normal()

    def erring(images, ids, groups):
        s = similarity(images, ids, groups)  # (B, G)
        errors = torch.tensor([[error(key, text) for text in group] for key, group in zip(ids, groups, strict=True)])
        return torch.where(s > -1, s + errors, s)  # an unreadable text stays last

    return erring if deviation else similarity


@dataclass
class CrossFitted:
    """Experts of which number `fold_of(id)` never saw the study: each judges its own studies alone."""

    experts: list[Expert]

    def similarity(self, images: list[Image.Image], ids: list[str], groups: list[list[str]]) -> torch.Tensor:
        """As Expert.similarity."""
        folds, found = [fold_of(key, len(self.experts)) for key in ids], torch.empty(len(ids), len(groups[0]))
        for fold in set(folds):
            rows = [i for i, of in enumerate(folds) if of == fold]
            given = ([column[i] for i in rows] for column in (images, ids, groups))
            found[rows] = self.experts[fold].similarity(*given)
        return found


def fold_of(study_id: str, folds: int) -> int:
    """The fold of a study, by its id alone."""
    return zlib.crc32(study_id.encode()) % folds


def load_expert(path: str | Path, device: str | torch.device = "cpu") -> Expert | CrossFitted:
    """An open_clip model, frozen and in eval mode; of a folder that holds folders 0, 1, ... all of them, cross-fitted.

    A Hugging Face text tower is built from the folder's own `config.json`; without that file open_clip looks its
    `hf_model_name` up, a folder or a hub name. ValueError (one line) for what cannot be loaded or asks for code.
    """
    if (Path(path) / "0").is_dir():
        return CrossFitted([load_expert(part, device) for part in sorted(Path(path).glob("[0-9]"))])
    on_hub, own, advice = str(path).startswith("hf-hub:"), {}, "give an open_clip folder or an hf-hub: name"
    with loading(f"expert: cannot load open_clip_config.json of {path}", advice):
        config = local_file(f"{path}/open_clip_config.json")
        refuse(config.parent)
        text_cfg = read_json(config)["model_cfg"]["text_cfg"]
        for key in sorted(text_cfg.get("tokenizer_kwargs", {}).keys() - TOKENIZER_KWARGS):
            raise ValueError(f"tokenizer_kwargs '{key}' is none of {', '.join(sorted(TOKENIZER_KWARGS))}")
        if text_cfg.get("hf_tokenizer_name"):
            load_tokenizer(text_cfg["hf_tokenizer_name"] if on_hub else path)  # is it real, and without code?
    if "hf_model_name" in text_cfg and (Path(path) / "config.json").is_file():
        own["text_cfg"] = {**text_cfg, "hf_model_name": str(path), "hf_model_pretrained": False}
    elif "hf_model_name" in text_cfg:
        advice = f"offline, put the config.json of {text_cfg['hf_model_name']} into {path}"
        with loading(f"expert: cannot load {path}", advice):
            AutoConfig.from_pretrained(text_cfg["hf_model_name"], trust_remote_code=False)
    name = str(path) if on_hub else f"local-dir:{path}"
    with loading(f"expert: cannot load {path}", advice):
        if not any(Path(path).glob("open_clip*.safetensors")):  # which are read instead
            for file in Path(path).glob("*.bin"):
                check_torch_file(file)
        model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True, **own)
        require_finite_tensors(model.to(device).eval().requires_grad_(False), path)
        expert = Expert(pack_linears(model), preprocess, open_clip.get_tokenizer(name), torch.device(device))
        if hasattr(expert.tokenizer, "tokenizer"):  # else open_clip's own, whose end token is its last: tried below
            tower = getattr(model, "text", model)
            table = next(part for part in tower.modules() if isinstance(part, torch.nn.Embedding))
            require_rows(expert.tokenizer.tokenizer, table.num_embeddings, path)
        trial = expert.similarity([Image.new("L", (64, 64), 128)], ["trial"], [["No effusion."]])
        require_finite_tensors({"a grey image's similarity": trial}, path)
        expert.cache.clear()
    return expert
