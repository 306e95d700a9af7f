"""How the phantom's small models are trained: the base and the expert on splits of their own, the labeller on texts.

A builder takes the recipe and the folder to fill, beside which the data set lies, and keeps in quality.json how good
its model is on held-out studies or texts.
"""

import dataclasses
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf
from torch import Tensor
from transformers import BertConfig, BertModel

from config import Config, DataConfig, RolloutConfig
from data import Study, read_split
from formats.files import read_json, read_jsonl
from formats.images import read_image
from model import encode_prompts
from phantom import text
from phantom.config import PhantomConfig, Recipe
from phantom.findings import LABELS, Finding, finding_of
from phantom.world import SPLITS, misremember, sample_findings, write_report
from rewards import wrap
from scorers.chexbert import CHEXPERT_LABELS, NEGATIVE, POSITIVE, UNCERTAIN, CheXbert
from scorers.expert import Expert, load_expert
from tiny import fit
from tiny.models import MEAN, SIZES, STD, clip_config, new_llava, new_processor, policy_tokenizer, word_piece
from vlm import attention
from vlm.families import encode_images

PROMPT = "Write the report."  # under which the base learns; data.prompt is the policy's
FULL_LENGTH = Config(rollout=RolloutConfig(max_new_tokens=96))  # the longest caption has 88, tags and EOS included


def held_out(n: int) -> int:
    """How many of n studies or texts, the first ones, measure a model instead of training it."""
    return max(1, min(512, n // 8))


def read_studies(data: Path, split: str) -> tuple[list[Study], Tensor, Tensor]:
    """Studies of a split, their images (n, size, size) uint8 and LABELS (n, 15) bool; ValueError if one is damaged."""
    studies, _ = read_split(DataConfig(path=str(data), format="r2gen", target="both", strict=True), split)
    images = torch.from_numpy(np.stack([np.asarray(read_image(s.image).convert("L")) for s in studies]))
    return studies, images, torch.tensor([[label in s.labels for label in LABELS] for s in studies])


def normalise(images: Tensor) -> Tensor:
    """Grey images (B, H, W) uint8 -> (B, 3, H, W) float, exactly as the saved image processor does it."""
    return fit.normalise(images, MEAN, STD)


def build_base(recipe: Recipe, folder: Path, pooled: bool = False) -> None:
    """Train the base model: its vision tower (`fit.fit_tower`), then, tower frozen, projection and language model on
    captions. With the tower trained along, random early gradients wreck it and the model stays blind (F1 1 for 60)."""
    studies, images, labels = read_studies(folder.with_name("data"), "base")
    # a few reports are tagged: LoRA cannot make a token likely whose output row was never once the right answer
    texts = [wrap(s.report) if "FINDINGS" in s.report and i % 4 == 0 else s.report for i, s in enumerate(studies)]
    reports = [row["report"] for row in read_json(folder.with_name("data") / "annotation.json")["expert"]]
    tokenizer = policy_tokenizer(reports + texts + [f"USER: {PROMPT} ASSISTANT:"] * 100)
    processor, model = (new(tokenizer, recipe.phantom.image_size) for new in (new_processor, new_llava))
    model.model.language_model.set_attn_implementation(attention.NAME)
    tower, held = model.model.vision_tower, held_out(len(studies))
    rows = range(held, len(studies))
    classify = fit.fit_tower(tower, lambda batch: normalise(images[batch]), labels, rows, recipe.assets.vision_steps,
                             recipe.seed, "mean" if pooled else "patches")  # fmt: skip
    with torch.no_grad():
        told, true = classify(normalise(images[:held])).mean(dim=1) > 0, labels[:held]
    f1 = (2 * (told & true).sum() / (told.sum() + true.sum()).clamp(min=1)).item()
    tower.requires_grad_(False)
    prompt = encode_prompts(processor, [read_image(studies[0].image)], PROMPT, "cpu")  # batch 1

    with torch.no_grad():  # once: the tower does not change any more
        parts = [encode_images(model, {"pixel_values": normalise(part)})["vision"] for part in images.split(256)]
    vision = torch.cat(parts)  # (n, tokens, Dv)

    fit.fit_base(model, processor, prompt, vision, texts, rows, recipe.assets.base_steps, recipe.seed + 1, FULL_LENGTH)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    fit.report_quality(folder, {"vision_tower_sided_f1": f1, "studies": held})


def expert_pairs(recipe: Recipe, data: Path, noise: float | None) -> tuple[list[Study], Tensor, list[str], Tensor]:
    """(studies, images (n, size, size), reports, LABELS (n, 15) that these state) that an expert learns from, the ones
    that measure it first. noise, see build_expert: None gives the LABELS of the images."""
    studies, images, labels = read_studies(data, "expert")
    if noise is None:
        measure, parts = held_out(len(studies)), [read_studies(data, split) for split in ("sft", "train")]
        studies = studies[:measure] + [study for part in parts for study in part[0]]
        images = torch.cat([images[:measure], *(part[1] for part in parts)])
        labels = torch.cat([labels[:measure], *(part[2] for part in parts)])
    if not noise:
        return studies, images, [study.report for study in studies], labels
    truth, written, cfg = {row["id"]: row["findings"] for row in read_jsonl(data / "truth.jsonl")}, [], recipe.phantom
    rates = {name: rate for name, rate in vars(cfg).items() if name.startswith(("omit", "prior_"))}
    cfg = dataclasses.replace(cfg, **{name: min(1.0, noise * rate) for name, rate in rates.items()})
    for i, study in enumerate(studies):
        findings = [Finding(f["name"], f["side"], f["site"], f["severity"]) for f in truth[study.id]]
        written.append(write_report(findings, np.random.default_rng([recipe.seed, i]), cfg, noisy=True))
    labels = torch.tensor([[label in stated for label in LABELS] for _, stated in written])
    return studies, images, [report for report, _ in written], labels


def excerpt(report: str, rng: np.random.Generator) -> str:
    """A section of a report or all of it, mostly the impression: it names each finding in a quarter of the words."""
    findings, _, impression = report.partition(" IMPRESSION: ")
    return (f"IMPRESSION: {impression}", findings, report)[rng.choice(3, p=(0.6, 0.2, 0.2))]


def build_expert(recipe: Recipe, folder: Path, noise: float | None = 0.0) -> None:
    """Train the frozen expert: CLIP's loss, where studies with the same findings are all right answers, on reports of
    its own that err at `noise` times the references' rates. None: on the policy's own pairs, the references of splits
    sft and train, with plain InfoNCE: it is told nothing that the policy is not."""
    studies, images, reports, labels = expert_pairs(recipe, folder.with_name("data"), noise)
    held = held_out(len(studies))
    tokenizer = word_piece(reports, folder)
    settings = clip_config(len(tokenizer), tokenizer.sep_token_id, image_size=recipe.phantom.image_size)
    model = open_clip.model.CLIP(**settings["model_cfg"], cast_dtype=None)
    length, rng = settings["model_cfg"]["text_cfg"]["context_length"], np.random.default_rng(recipe.seed)

    def pixels(batch: list[int]) -> Tensor:
        return normalise(images[batch])

    fit.fit_clip(model, tokenizer, pixels, lambda i: excerpt(reports[i], rng), None if noise is None else labels,
                 range(held, len(studies)), recipe.assets.expert_steps, recipe.seed + 2, length)  # fmt: skip
    open_clip.set_model_preprocess_cfg(model.eval(), settings["preprocess_cfg"])
    save_for_hf(model, tokenizer, settings["model_cfg"], folder, safe_serialization=True)
    n = min(256, held)
    with torch.no_grad():
        image, report = fit.clip_features(model, tokenizer, pixels(list(range(n))), reports[:n], length)
    hit = fit.alike(labels[:n])[torch.arange(n), (image @ report.T).argmax(dim=-1)].float().mean().item()
    preferred = probe_expert(load_expert(folder), studies[:held], recipe.phantom, recipe.seed)
    fit.report_quality(folder, {f"retrieval_at_1_of_{n}": hit} | preferred)


def probe_expert(expert: Expert, studies: list[Study], cfg: PhantomConfig, seed: int) -> dict[str, float]:
    """How often the expert prefers the true report to one with a side flipped, a finding dropped, or one added."""
    rng, wins, other = np.random.default_rng(seed), {}, {"left": "right", "right": "left"}
    for study in studies:
        truth, variants = [finding_of(label, rng) for label in study.labels], {}
        lone = next((f for f in truth if f.side and sum(g.name == f.name for g in truth) == 1), None)
        if lone:
            variants["side"] = [dataclasses.replace(f, side=other[f.side]) if f is lone else f for f in truth]
        if truth:
            variants["dropped"] = truth[1:]
        absent = [label for label in LABELS if label not in study.labels]
        variants["added"] = [*truth, finding_of(absent[rng.integers(len(absent))], rng)]
        texts = [write_report(findings, rng, cfg, noisy=False)[0] for findings in (truth, *variants.values())]
        true, *others = expert.similarity([read_image(study.image)], [study.id], [texts])[0]
        for name, value in zip(variants, others, strict=True):
            wins.setdefault(name, []).append(float(true > value))
    return {f"prefers_truth_over_{name}": float(np.mean(won)) for name, won in wins.items()}


def labelled_texts(cfg: PhantomConfig, seed: int, n: int) -> tuple[list[str], np.ndarray]:
    """n texts (reports of likely or of random findings, loose sentences, captions) and the (n, 14) CheXbert classes of
    what each TEXT says, as CHEXPERT_LABELS; No Finding is 1 where nothing but support devices is 1 or 3."""
    texts, classes = [], np.zeros((n, len(CHEXPERT_LABELS)), dtype=np.int64)
    for row in range(n):
        rng = np.random.default_rng([seed, len(SPLITS), row])
        kind, count = rng.random(), int(rng.integers(1, 6))
        findings = [finding_of(LABELS[i], rng) for i in sorted(rng.choice(len(LABELS), count, replace=False))]
        if kind >= 0.6:
            findings = misremember(sample_findings(rng, cfg), rng, cfg)
        if kind < 0.4:
            parts, facts = zip(*(text.loose_sentence(f, rng) for f in findings[: 5 if kind < 0.2 else 1]), strict=True)
            written, facts = " ".join(parts), sum(facts, [])
        elif kind > 0.9:
            written, facts = text.caption(findings, rng)
        else:
            written, facts = text.Radiologist(rng).report(findings, 2 * cfg.hedge)
            if rng.random() >= 0.6:
                written = written.removeprefix("FINDINGS: ").replace("IMPRESSION: ", "")
        texts.append(written)
        for topic, cls in sorted(facts, key=lambda fact: (NEGATIVE, UNCERTAIN, POSITIVE).index(fact[1])):
            classes[row, CHEXPERT_LABELS.index(text.PHRASES.chexpert[topic])] = cls  # what is worse overrules
        abnormal = any(cls != NEGATIVE for topic, cls in facts if topic != "device")
        classes[row, CHEXPERT_LABELS.index("No Finding")] = int(not abnormal)
    return texts, classes


def build_labeller(recipe: Recipe, folder: Path) -> None:
    """Train the CheXbert-format labeller on texts of its own (no images), labelled by what each text states."""
    texts, classes = labelled_texts(recipe.phantom, recipe.seed, recipe.phantom.expert)
    classes, held = torch.as_tensor(classes), held_out(len(texts))  # (n, 14)
    tokenizer = word_piece(texts, folder)
    model = CheXbert(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES["labeller"])))
    predict = fit.fit_labeller(model, tokenizer, texts, classes, range(held, len(texts)), recipe.assets.labeller_steps,
                               1e-3, recipe.seed + 3)  # fmt: skip
    predicted = predict(range(held))  # (held, 14)
    told, true = ((c == POSITIVE) | (c == UNCERTAIN) for c in (predicted, classes[:held]))
    fit.save_labeller(model, tokenizer, folder)
    f1 = 2 * (told & true).sum() / (told.sum() + true.sum()).clamp(min=1)
    exact = (predicted == classes[:held]).float().mean()
    fit.report_quality(folder, {"micro_f1": f1.item(), "class_accuracy": exact.item()})
