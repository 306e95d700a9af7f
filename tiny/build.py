"""Small models of a data set's own: built from its training split alone, measured on its validation split.

    tiny:base      LLaVA + processor: the tower learns the gold labels, then projection and language model the reports
    tiny:expert    open_clip folders 0, 1, ...: number k never saw the studies of fold k (scorers.expert.fold_of)
    tiny:labeller  CheXbert's format on the first layers of MiniLM; all of it is in minilm/, BERTScore's encoder

How good each is on the validation split stands in its quality.json.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import BertConfig, BertModel

from config import Config, RolloutConfig
from data import Study, read_split
from evidence.findings import SENTENCES
from formats.gold import FINDINGS, Gold, plain
from formats.images import read_image
from model import encode_prompts
from rewards import wrap
from running.weights import load_tokenizer, require_placed
from scorers.chexbert import CHEXPERT_LABELS, POSITIVE, CheXbert
from scorers.expert import fold_of, load_expert
from tiny import fit
from tiny.config import TinyRecipe
from tiny.minilm import unpack_minilm
from tiny.models import clip_config, new_llava, new_processor, policy_tokenizer, word_piece
from vlm import attention
from vlm.families import encode_images

LAYERS = 3  # of MiniLM's six, under the labeller's heads
MOVE = 3  # pixels, at most, by which an image is moved while a tower learns
CONTEXT = 96  # word pieces that the expert reads at once


class Data(NamedTuple):
    """A data set's training studies, then its validation studies."""

    studies: list[Study]
    images: Tensor  # (n, size, size) uint8, grey
    labels: Tensor  # (n, findings) bool, FINDINGS without sides
    train: range  # the places of the training studies
    val: range
    mean: float  # of the training images' grey values, 0 to 1, and their standard deviation
    std: float

    def pixels(self, rows) -> Tensor:
        """Images of some rows, (B, 3, H, W), as processor and expert see them."""
        return fit.normalise(self.images[rows], self.mean, self.std)

    def moved(self, rows) -> Tensor:
        """The same, each moved by up to MOVE pixels, its edge repeated, its contrast changed by up to a tenth."""
        pixels, side = F.pad(self.pixels(rows), [MOVE] * 4, mode="replicate"), self.images.shape[-1]
        x, y = torch.randint(2 * MOVE + 1, (2, len(pixels))).tolist()
        pixels = torch.stack([p[:, j : j + side, i : i + side] for p, i, j in zip(pixels, x, y, strict=True)])
        return pixels * (0.9 + 0.2 * torch.rand(len(pixels), 1, 1, 1))


def read_data(recipe: TinyRecipe) -> Data:
    """Both splits; ValueError for a data set that is not R2Gen's with gold labels, and for what cannot be read."""
    data, size = recipe.data, recipe.tiny.image_size
    if data.format != "r2gen" or not data.labels:
        raise ValueError("tiny: models need data.format r2gen and gold labels, data.labels (formats/gold.py)")
    train, val = (read_split(data, split)[0] for split in (data.sft_split, data.val_split))
    studies, shown = train + val, []
    for study in studies:
        image = read_image(study.image).convert("L").resize((size, size), Image.Resampling.BICUBIC)
        shown.append(torch.from_numpy(np.array(image)))
    images, known = torch.stack(shown), [plain(study.labels) for study in studies]
    grey = images[: len(train)].float() / 255
    return Data(studies, images, torch.tensor([[name in found for name in FINDINGS] for found in known]),
                range(len(train)), range(len(train), len(studies)), round(grey.mean().item(), 3),
                round(grey.std().item(), 3))  # fmt: skip


def aucs(scores: Tensor, labels: Tensor, names=FINDINGS) -> dict[str, float]:
    """{name of a label: area under its ROC curve} of scores (n, L), and their mean; labels that all or none of the n
    studies have are left out."""
    found = {name: float(roc_auc_score(y, s)) for name, y, s in zip(names, labels.T, scores.T, strict=True)
             if 0 < y.sum() < len(y)}  # fmt: skip
    return found | {"mean": float(np.mean(list(found.values())))}


def build_base(recipe: TinyRecipe, folder: Path) -> None:
    """Train the base model: tower, then, it frozen, projection and language model. Studies with a finding count three
    times: on all alike it collapses to a handful of normal reports."""
    data, tiny = read_data(recipe), recipe.tiny
    texts = [wrap(s.report) if i % 4 == 0 else s.report for i, s in enumerate(data.studies)]  # see the phantom's
    tokenizer = policy_tokenizer([*(texts[i] for i in data.train), *[f"USER: {recipe.data.prompt} ASSISTANT:"] * 100],
                                 tiny.vocabulary, lower=True)  # fmt: skip
    processor = new_processor(tokenizer, tiny.image_size, data.mean, data.std)
    model = new_llava(tokenizer, tiny.image_size)
    model.model.language_model.set_attn_implementation(attention.NAME)
    tower = model.model.vision_tower
    classify = fit.fit_tower(tower, data.moved, data.labels, data.train, tiny.vision_steps, recipe.seed, "both")
    with torch.no_grad():
        quality = aucs(classify(data.pixels(data.val)).mean(dim=1), data.labels[data.val])
        tower.requires_grad_(False)
        parts = [encode_images(model, {"pixel_values": data.pixels(rows)})["vision"]
                 for rows in torch.tensor(data.train).split(256)]  # fmt: skip
    prompt = encode_prompts(processor, [read_image(data.studies[0].image)], recipe.data.prompt, "cpu")  # batch 1
    rows = [i for i in data.train for _ in range(3 if data.labels[i].any() else 1)]
    limits = Config(rollout=RolloutConfig(max_new_tokens=tiny.max_tokens))
    fit.fit_base(model, processor, prompt, torch.cat(parts), texts, rows, tiny.base_steps, recipe.seed + 1, limits)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    fit.report_quality(folder, {"validation_studies": len(data.val), "vision_tower_auc": quality})


def excerpt(report: str, rng: np.random.Generator) -> str:
    """All of a report or, as often, one to three of its sentences, one after another."""
    sentences = re.split(r"(?<=\.) ", report)
    start, n = rng.integers(len(sentences)), rng.integers(1, 4)
    return report if rng.random() < 0.5 else " ".join(sentences[start : start + n])


def build_expert(recipe: TinyRecipe, folder: Path) -> None:
    """Train the experts, each with a tower of its own on the training studies outside its fold: CLIP's loss, and the
    gold labels by the image's embedding."""
    data, tiny, rng = read_data(recipe), recipe.tiny, np.random.default_rng(recipe.seed)
    reports = [study.report for study in data.studies]
    for fold in range(tiny.folds):
        home = folder / str(fold)
        home.mkdir()
        rows = [i for i in data.train if fold_of(data.studies[i].id, tiny.folds) != fold]
        tokenizer = word_piece([reports[i] for i in rows], home)
        settings = clip_config(len(tokenizer), tokenizer.sep_token_id, CONTEXT, tiny.image_size, data.mean, data.std)
        model = open_clip.model.CLIP(**settings["model_cfg"], cast_dtype=None)
        fit.fit_clip(model, tokenizer, data.moved, lambda i: excerpt(reports[i], rng), data.labels, rows,
                     tiny.expert_steps, recipe.seed + 2 + fold, CONTEXT, classify=True)  # fmt: skip
        open_clip.set_model_preprocess_cfg(model.eval(), settings["preprocess_cfg"])
        save_for_hf(model, tokenizer, settings["model_cfg"], home, safe_serialization=True)
    fit.report_quality(folder, probe_expert(load_expert(folder), data))


def probe_expert(expert, data: Data) -> dict:
    """On the validation studies: how often a report of like findings is the most similar one, how often the own report
    is more similar than one of other findings, and each finding's AUC by its sentence against the normal one."""
    studies, labels = [data.studies[i] for i in data.val], data.labels[data.val]
    n, texts = len(studies), [study.report for study in studies]
    texts += [sentence for pair in SENTENCES.values() for sentence in pair]
    s = expert.similarity([read_image(x.image) for x in studies], [x.id for x in studies], [texts] * n)  # (n, n + 2L)
    own, same, zero_shot = s[:, :n], fit.alike(labels), s[:, n::2] - s[:, n + 1 :: 2]
    hit = same[torch.arange(n), own.argmax(dim=1)].float().mean().item()
    better = (own.diag()[:, None] > own)[~same].float().mean().item()
    return {f"retrieval_at_1_of_{n}": hit, "prefers_own_report": better,
            "label_auc": aucs(zero_shot, labels[:, [FINDINGS.index(name) for name in SENTENCES]], [*SENTENCES])}


def build_labeller(recipe: TinyRecipe, folder: Path) -> None:
    """Fine-tune MiniLM's first layers with CheXbert's heads on reports and their coded labels: positive or blank, as
    nobody coded what a report denies. What is coded from an impression that the text lacks is asked for in vain."""
    data = read_data(recipe)
    gold, texts = Gold(Path(recipe.data.path), recipe.data.labels), [study.report for study in data.studies]
    coded = [gold.coded(study.id, "chexpert") for study in data.studies]
    coded = [found if {*found} - {"Support Devices"} else [*found, "No Finding"] for found in coded]
    classes = torch.tensor([[POSITIVE * (name in found) for name in CHEXPERT_LABELS] for found in coded])  # (n, 14)
    unpack_minilm(folder / "minilm")
    tokenizer = load_tokenizer(folder / "minilm")
    bert = BertModel(BertConfig.from_pretrained(folder / "minilm", num_hidden_layers=LAYERS))
    given = load_file(folder / "minilm" / "model.safetensors")
    require_placed(bert.load_state_dict(given, strict=False).missing_keys, (), folder / "minilm")
    bert.embeddings.requires_grad_(False)
    model = CheXbert(bert)
    predict = fit.fit_labeller(model, tokenizer, texts, classes, data.train, recipe.tiny.labeller_steps, 2e-4,
                               recipe.seed + 3)  # fmt: skip
    told, true = predict(data.val) == POSITIVE, classes[data.val] == POSITIVE  # (n, 14)
    fit.save_labeller(model.eval(), tokenizer, folder)
    hits, all_ = (told & true).sum(dim=0), (told.sum(dim=0) + true.sum(dim=0)).clamp(min=1)
    f1 = dict(zip(CHEXPERT_LABELS, (2 * hits / all_).tolist(), strict=True))
    micro = {f"micro_f1{name}": (2 * hits[:n].sum() / all_[:n].sum()).item()
             for name, n in (("", 14), ("_without_no_finding", 13))}  # fmt: skip
    support = dict(zip(CHEXPERT_LABELS, true.sum(dim=0).tolist(), strict=True))
    fit.report_quality(folder, micro | {"f1": f1, "studies_with_it": support})


TINY_BUILDERS = {"tiny:base": build_base, "tiny:expert": build_expert, "tiny:labeller": build_labeller}
