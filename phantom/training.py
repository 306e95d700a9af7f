"""How the phantom's small models are trained: the base and the expert on splits of their own, the labeller on texts.

A builder takes the recipe and the folder to fill, beside which the data set lies, and keeps in quality.json how good
its model is on held-out studies or texts.
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertModel

from config import Config, DataConfig, RolloutConfig
from data import Study, batch_ids, read_split
from formats.files import read_json, read_jsonl
from formats.images import read_image
from model import encode_prompts
from phantom import text
from phantom.config import PhantomConfig, Recipe
from phantom.findings import LABELS, Finding, finding_of
from phantom.models import MEAN, SIZES, STD, clip_config, new_llava, new_processor, policy_tokenizer, word_piece
from phantom.world import SPLITS, misremember, sample_findings, write_report
from rewards import wrap
from scorers.chexbert import CHEXPERT_LABELS, NEGATIVE, POSITIVE, UNCERTAIN, CheXbert
from scorers.expert import Expert, encode_tokens, load_expert
from sft import sft_loss, text_logps
from vlm import attention
from vlm.families import encode_images

PROMPT = "Write the report."  # under which the base learns; data.prompt is the policy's
FULL_LENGTH = Config(rollout=RolloutConfig(max_new_tokens=96))  # the longest caption has 88, tags and EOS included


def held_out(n: int) -> int:
    """How many of n studies or texts, the first ones, measure a model instead of training it."""
    return max(1, min(512, n // 8))


def fit(model: nn.Module, loss_of: Callable, n: int, batch: int, steps: int, lr: float, seed: int, what: str) -> None:
    """AdamW with 5% warm-up and cosine decay over `loss_of(rows)`, batches of those of n rows that are not held out."""
    held, warm, trained = held_out(n), max(1, steps // 20), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / steps)) + 0.01)
    )
    bar = tqdm(range(steps), desc=f"{what:<14}")
    for step in bar:
        loss = loss_of([held + i for i in batch_ids(n - held, batch, seed, step)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def by_length(rows: list[int], texts: list[str]) -> list[list[int]]:
    """A batch in at most four parts, none empty, of similar text length: less padding, the same sums."""
    ordered = sorted(rows, key=lambda i: len(texts[i]))
    return [part.tolist() for part in np.array_split(ordered, min(4, len(rows)))]


def report_quality(folder: Path, numbers: dict[str, float]) -> None:
    """Print a model's held-out quality and keep it beside the model."""
    (folder / "quality.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(f"{folder.stem} on held-out studies: " + ", ".join(f"{name} {n:.3g}" for name, n in numbers.items()))


def read_studies(data: Path, split: str) -> tuple[list[Study], Tensor, Tensor]:
    """Studies of a split, their images (n, size, size) uint8 and LABELS (n, 15) bool; ValueError if one is damaged."""
    studies, _ = read_split(DataConfig(path=str(data), format="r2gen", target="both", strict=True), split)
    images = torch.from_numpy(np.stack([np.asarray(read_image(s.image).convert("L")) for s in studies]))
    return studies, images, torch.tensor([[label in s.labels for label in LABELS] for s in studies])


def normalise(images: Tensor) -> Tensor:
    """Grey images (B, H, W) uint8 -> (B, 3, H, W) float, exactly as the saved image processor does it."""
    return ((images.float() / 255 - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def train_tower(recipe: Recipe, tower: nn.Module, images: Tensor, labels: Tensor, pooled: bool) -> float:
    """Teach the vision tower LABELS; returns its micro-F1 on the held-out studies. Every patch token must tell all the
    labels by itself, as what the language model reads later is any one of them; pooled: only their mean must."""
    head, held = nn.Linear(tower.config.hidden_size, labels.shape[1]), held_out(len(images))

    def classify(rows) -> Tensor:  # (B, patches, 15)
        return head(tower(pixel_values=normalise(images[rows])).last_hidden_state[:, 1:])

    def loss(rows: list[int]) -> Tensor:
        logits = classify(rows).mean(dim=1, keepdim=True) if pooled else classify(rows)
        return F.binary_cross_entropy_with_logits(logits, labels[rows][:, None].expand_as(logits).float())

    fit(nn.ModuleList([tower, head]), loss, len(images), 64, recipe.assets.vision_steps, 1e-3, recipe.seed, "tower")
    with torch.no_grad():
        told, true = classify(range(held)).mean(dim=1) > 0, labels[:held]
    return (2 * (told & true).sum() / (told.sum() + true.sum()).clamp(min=1)).item()


def build_base(recipe: Recipe, folder: Path, pooled: bool = False) -> None:
    """Train the base model: its vision tower (`train_tower`), then, tower frozen, projection and language model on
    captions. With the tower trained along, random early gradients wreck it and the model stays blind (F1 1 for 60)."""
    studies, images, labels = read_studies(folder.with_name("data"), "base")
    # a few reports are tagged: LoRA cannot make a token likely whose output row was never once the right answer
    texts = [wrap(s.report) if "FINDINGS" in s.report and i % 4 == 0 else s.report for i, s in enumerate(studies)]
    reports = [row["report"] for row in read_json(folder.with_name("data") / "annotation.json")["expert"]]
    tokenizer = policy_tokenizer(reports + texts + [f"USER: {PROMPT} ASSISTANT:"] * 100)
    processor, model = (new(tokenizer, recipe.phantom.image_size) for new in (new_processor, new_llava))
    model.model.language_model.set_attn_implementation(attention.NAME)
    f1 = train_tower(recipe, model.model.vision_tower, images, labels, pooled)
    model.model.vision_tower.requires_grad_(False)
    prompt = encode_prompts(processor, [read_image(studies[0].image)], PROMPT, "cpu")  # batch 1

    with torch.no_grad():  # once: the tower does not change any more
        parts = [encode_images(model, {"pixel_values": normalise(part)})["vision"] for part in images.split(256)]
    vision = torch.cat(parts)  # (n, tokens, Dv)

    def loss(rows: list[int]) -> Tensor:
        total, tokens = 0.0, 0
        for part in by_length(rows, texts):
            inputs = {name: row.expand(len(part), *row.shape[1:]) for name, row in prompt.items()}
            logps, mask, _ = text_logps(model, processor, inputs | {"vision": vision[part]}, [texts[i] for i in part],
                                        FULL_LENGTH)  # fmt: skip
            total, tokens = total + sft_loss(logps, mask, total_tokens=1), tokens + mask.sum()
        return total / tokens

    fit(model, loss, len(studies), 48, recipe.assets.base_steps, 1.5e-3, recipe.seed + 1, "base model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    report_quality(folder, {"vision_tower_sided_f1": f1, "studies": held_out(len(studies))})


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

    def features(rows: list[int], texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image and text embeddings (B, D) each, and who is alike (B, B)."""
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        embedded = torch.empty(len(rows), settings["model_cfg"]["embed_dim"])
        for part in by_length(list(range(len(rows))), texts):
            embedded[part] = encode_tokens(model, tokens["input_ids"][part])
        image = F.normalize(model.encode_image(normalise(images[rows])), dim=-1)
        return image, F.normalize(embedded, dim=-1), (labels[rows][:, None] == labels[rows][None]).all(dim=-1)

    def loss(rows: list[int]) -> Tensor:
        image, report, same = features(rows, [excerpt(reports[i], rng) for i in rows])
        same = torch.eye(len(rows)) if noise is None else same.float()
        target = same / same.sum(dim=-1, keepdim=True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ report.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit(model, loss, len(studies), 128, recipe.assets.expert_steps, 1e-3, recipe.seed + 2, "expert")
    open_clip.set_model_preprocess_cfg(model.eval(), settings["preprocess_cfg"])
    save_for_hf(model, tokenizer, settings["model_cfg"], folder, safe_serialization=True)
    n = min(256, held)
    with torch.no_grad():
        image, report, same = features(list(range(n)), reports[:n])
    hit = same[torch.arange(n), (image @ report.T).argmax(dim=-1)].float().mean().item()
    preferred = probe_expert(load_expert(folder), studies[:held], recipe.phantom, recipe.seed)
    report_quality(folder, {f"retrieval_at_1_of_{n}": hit} | preferred)


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
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES["labeller"]))
    model = CheXbert(bert)
    encoded = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=512)["input_ids"]]

    def class_logits(rows: list[int]) -> list[Tensor]:  # 14 x (B, 4 or 2)
        ids = nn.utils.rnn.pad_sequence([encoded[i] for i in rows], batch_first=True)
        return model(ids, (ids != tokenizer.pad_token_id).long())

    def loss(rows: list[int]) -> Tensor:
        total = 0.0
        for part in by_length(rows, texts):
            heads = enumerate(class_logits(part))
            total = total + sum(F.cross_entropy(head, classes[part, i], reduction="sum") for i, head in heads)
        return total / (len(rows) * classes.shape[1])

    fit(model, loss, len(texts), 64, recipe.assets.labeller_steps, 1e-3, recipe.seed + 3, "labeller")
    with torch.no_grad():
        predicted = torch.stack([head.argmax(-1) for head in class_logits(range(held))], dim=1)  # (held, 14)
    told, true = ((c == POSITIVE) | (c == UNCERTAIN) for c in (predicted, classes[:held]))
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = nn.ModuleDict({"module": model}).state_dict()  # as in CheXbert's own checkpoint: module.<name>
    torch.save({"model_state_dict": weights}, buffer := io.BytesIO())  # torch has no words for a full disk
    (folder / "chexbert.pth").write_bytes(buffer.getvalue())
    f1 = 2 * (told & true).sum() / (told.sum() + true.sum()).clamp(min=1)
    exact = (predicted == classes[:held]).float().mean()
    report_quality(folder, {"micro_f1": f1.item(), "class_accuracy": exact.item()})
