"""How small models are trained and saved, the phantom's and those of a data set of your own: a function for each kind.

`rows` are the places of the studies or texts that train, a place may stand in them several times; the caller measures
the model on others.
"""

import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, RolloutConfig
from data import Study, batch_ids
from formats.images import read_image
from model import encode_prompts
from scorers.chexbert import CheXbert, Labeller
from scorers.expert import encode_tokens
from sft import sft_loss, text_logps
from tiny.models import MEAN, STD, clip_config, new_llava, new_processor, word_piece
from vlm import attention
from vlm.families import encode_images

Rows = Sequence[int]
MOVE = 3  # pixels, at most, by which an image is moved while a tower learns


class Data(NamedTuple):
    """Studies, some of which train a model and others measure it."""

    studies: list[Study]
    images: Tensor  # (n, size, size) uint8, grey
    labels: Tensor  # (n, L) bool
    train: range  # the places of the training studies
    held: range  # and of those that measure
    mean: float = MEAN  # of the training images' grey values, 0 to 1, and their standard deviation, about
    std: float = STD

    def pixels(self, rows: Rows | Tensor) -> Tensor:
        """Images of some rows, (B, 3, H, W) float, exactly as the saved image processor makes them."""
        return ((self.images[rows].float() / 255 - self.mean) / self.std)[:, None].expand(-1, 3, -1, -1)

    def moved(self, rows: Rows) -> Tensor:
        """The same, each moved by up to MOVE pixels, its edge repeated, its contrast changed by up to a tenth."""
        pixels, side = F.pad(self.pixels(rows), [MOVE] * 4, mode="replicate"), self.images.shape[-1]
        x, y = torch.randint(2 * MOVE + 1, (2, len(pixels))).tolist()
        pixels = torch.stack([p[:, j : j + side, i : i + side] for p, i, j in zip(pixels, x, y, strict=True)])
        return pixels * (0.9 + 0.2 * torch.rand(len(pixels), 1, 1, 1))


def fit(model: nn.Module, loss_of: Callable, rows: Rows, batch: int, steps: int, lr: float, seed: int, what: str):
    """AdamW with 5% warm-up and cosine decay over `loss_of(batch of rows)`."""
    warm, trained = max(1, steps // 20), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01, fused=True)
    bar = tqdm(range(steps), desc=f"{what:<14}")
    for step in bar:
        decay = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm, decay)
        loss = loss_of([rows[i] for i in batch_ids(len(rows), batch, seed, step)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def by_length(rows: list[int], texts: list[str]) -> list[list[int]]:
    """A batch in at most four parts, none empty, of similar text length: less padding, the same sums."""
    ordered = sorted(rows, key=lambda i: len(texts[i]))
    return [part.tolist() for part in np.array_split(ordered, min(4, len(rows)))]


def f1(told: Tensor, true: Tensor, dim: int | None = None) -> Tensor:
    """F1 of what is told, bool as what is true: over all entries, or one for each along the other dimension."""
    return 2 * (told & true).sum(dim) / (told.sum(dim) + true.sum(dim)).clamp(min=1)


def report_quality(folder: Path, numbers: dict) -> None:
    """Print a model's quality on studies or texts that did not train it, and keep it beside the model; a table of
    numbers is printed on a line of its own."""
    (folder / "quality.json").write_text(json.dumps(numbers, indent=2) + "\n")
    plain = {name: n for name, n in numbers.items() if not isinstance(n, dict)}
    for title, part in {f"{folder.stem} on held-out studies": plain, **numbers}.items():
        if isinstance(part, dict):
            print(f"{title}: " + ", ".join(f"{name} {n:.3g}" for name, n in part.items()))


def fit_tower(tower: nn.Module, pixels: Callable, labels: Tensor, rows: Rows, steps: int, seed: int, by="patches"):
    """Teach a vision tower `labels` (n, L); returns the classifier, pixels (B, 3, H, W) -> logits (B, patches, L).

    by: every one of the "patches" must tell all the labels by itself, as what the language model reads later is any one
    of them; only their "mean" must; or "both". pixels: rows -> (B, 3, H, W).
    """
    head = nn.Linear(tower.config.hidden_size, labels.shape[1])

    def classify(images: Tensor) -> Tensor:  # (B, patches, L)
        return head(tower(pixel_values=images).last_hidden_state[:, 1:])

    def loss(batch: list[int]) -> Tensor:
        logits, truth = classify(pixels(batch)), labels[batch][:, None].float()
        means = logits.mean(dim=1, keepdim=True)
        told = {"patches": [logits], "mean": [means], "both": [logits, means]}[by]
        return sum(F.binary_cross_entropy_with_logits(x, truth.expand_as(x)) for x in told)

    fit(nn.ModuleList([tower, head]), loss, rows, 64, steps, 1e-3, seed, "tower")
    return classify


def train_base(folder: Path, data: Data, texts: list[str], tokenizer, prompt: str, pixels: Callable, rows: Rows, *,
               steps: tuple[int, int], seed: int, by: str, max_tokens: int, copies: int = 1) -> Callable:  # fmt: skip
    """Train a LLaVA and save it with its processor: its tower (`fit_tower`, by steps[0] updates on `pixels` of the
    training studies), then, tower frozen, projection and language model on a text for the image of each of `rows`.
    With the tower trained along, random early gradients wreck it and the model stays blind (F1 1 for 60).

    Returns the tower's classifier. prompt: the instruction; max_tokens: of a text, tags and EOS included; copies: of
    each image, as `pixels` gives them, that the language model reads in turn: on one alone it learns images by heart.
    """
    size = data.images.shape[-1]
    processor, model = new_processor(tokenizer, size, data.mean, data.std), new_llava(tokenizer, size)
    model.model.language_model.set_attn_implementation(attention.NAME)
    classify = fit_tower(model.model.vision_tower, pixels, data.labels, data.train, steps[0], seed, by)
    model.model.vision_tower.requires_grad_(False)
    with torch.no_grad():  # once: the tower does not change any more
        seen = [torch.cat([encode_images(model, {"pixel_values": pixels(part)})["vision"]
                           for part in torch.arange(data.train.stop).split(256)]) for _ in range(copies)]  # fmt: skip
    turns = itertools.cycle(seen)  # (n, tokens, Dv) each
    encoded = encode_prompts(processor, [read_image(data.studies[0].image)], prompt, "cpu")  # batch 1
    limits = Config(rollout=RolloutConfig(max_new_tokens=max_tokens))

    def loss(batch: list[int]) -> Tensor:
        total, tokens, vision = 0.0, 0, next(turns)
        for part in by_length(batch, texts):
            inputs = {name: row.expand(len(part), *row.shape[1:]) for name, row in encoded.items()}
            inputs["vision"] = vision[part]
            logps, mask, _ = text_logps(model, processor, inputs, [texts[i] for i in part], limits)
            total, tokens = total + sft_loss(logps, mask, total_tokens=1), tokens + mask.sum()
        return total / tokens

    fit(model, loss, rows, 48, steps[1], 1.5e-3, seed + 1, "base model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return classify


def clip_features(model, tokenizer, pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Normalised image and text embeddings (B, D) of a CLIP for B pairs; differentiable."""
    length = model.context_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    image = F.normalize(model.encode_image(pixels), dim=-1)
    embedded = torch.empty_like(image)
    for part in by_length(list(range(len(texts))), texts):
        embedded[part] = encode_tokens(model, tokens["input_ids"][part])
    return image, F.normalize(embedded, dim=-1)


def alike(labels: Tensor) -> Tensor:
    """Labels (B, L) -> (B, B) bool: which studies have the same."""
    return (labels[:, None] == labels[None]).all(dim=-1)


def train_expert(folder: Path, data: Data, corpus: list[str], text_of: Callable, pixels: Callable, rows: Rows, *,
                 labels: Tensor | None, steps: int, seed: int, classify: bool = False) -> tuple:  # fmt: skip
    """Train a CLIP over the words of `corpus` and save it in open_clip's layout; returns it and its tokenizer.

    CLIP's loss on pairs of images and texts, where all studies with the same `labels` (n, L), if any are given, are
    right answers. text_of: row -> its text, another one each time if it likes. classify: a linear head must read the
    labels off the image's embedding, too.
    """
    tokenizer = word_piece(corpus, folder)
    settings = clip_config(len(tokenizer), tokenizer.sep_token_id, data.images.shape[-1], data.mean, data.std)
    model = open_clip.model.CLIP(**settings["model_cfg"], cast_dtype=None)
    head = nn.Linear(model.visual.output_dim, labels.shape[1]) if classify else None

    def loss(batch: list[int]) -> Tensor:
        image, report = clip_features(model, tokenizer, pixels(batch), [text_of(i) for i in batch])
        same = torch.eye(len(batch)) if labels is None else alike(labels[batch]).float()
        target = same / same.sum(dim=-1, keepdim=True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ report.T
        value = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        if head:  # the embedding has length 1: ten times it, so that a head of usual size can tell
            value = value + F.binary_cross_entropy_with_logits(head(10 * image), labels[batch].float())
        return value

    fit(nn.ModuleList([model, head]) if head else model, loss, rows, 128, steps, 1e-3, seed, "expert")
    open_clip.set_model_preprocess_cfg(model.eval(), settings["preprocess_cfg"])
    save_for_hf(model, tokenizer, settings["model_cfg"], folder, safe_serialization=True)
    return model, tokenizer


def train_labeller(folder: Path, model: CheXbert, tokenizer, texts: list[str], classes: Tensor, rows: Rows, *,
                   steps: int, lr: float, seed: int, batch_size: int = 64) -> Labeller:  # fmt: skip
    """Train CheXbert's heads and its BERT on texts of known `classes` (n, 14) and save them in CheXbert's own layout:
    the BERT's folder, and in it chexbert.pth with tensors module.<name>. Returns the labeller."""
    encoded = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=512)["input_ids"]]

    def loss(batch: list[int]) -> Tensor:
        total = 0.0
        for part in by_length(batch, texts):
            ids = nn.utils.rnn.pad_sequence([encoded[i] for i in part], batch_first=True)
            heads = enumerate(model(ids, (ids != tokenizer.pad_token_id).long()))  # 14 x (B, 4 or 2)
            total = total + sum(F.cross_entropy(head, classes[part, i], reduction="sum") for i, head in heads)
        return total / (len(batch) * classes.shape[1])

    fit(model, loss, rows, batch_size, steps, lr, seed, "labeller")
    model.eval()  # a pretrained BERT has dropout, which would blur what is measured of it
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save({"model_state_dict": nn.ModuleDict({"module": model}).state_dict()}, buffer := io.BytesIO())
    (folder / "chexbert.pth").write_bytes(buffer.getvalue())  # torch has no words for a full disk
    return Labeller(model, tokenizer)
