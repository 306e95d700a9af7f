"""The phantom's own models, small versions of the real components in their real layouts on disk.

    data       R2Gen's layout                                     phantom.py writes it
    base       LlavaForConditionalGeneration + processor          sees, but hallucinates as a Med-VLM does
    expert     open_clip folder                                   frozen scorer of Eq. 6; expert_noisy: see there
    labeller   BERT folder + chexbert.pth in CheXbert's format    clinical reward of Eq. 4, and BERTScore's encoder

Each is trained on splits of its own, measured on held-out studies, and cached in `assets/phantom-<hash of its
settings>`: a config value `phantom:base` means "that folder, built on first use". A build is written beside its place
and renamed when complete, so an interrupted one starts anew and ends the same.

`python assets.py --build data base expert labeller` builds them ahead of a run.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config import Config, parse
from data import Study, batch_ids, load_studies, read_image, read_jsonl
from model import encode_prompts, prepare
from phantom import world as phantom
from phantom.models import MEAN, STD, clip_config, new_bert, new_llava, new_processor, policy_tokenizer, word_piece
from rewards import wrap
from running.folder import atomic_folder, lock
from scorers import clinical
from scorers import expert as expert_module
from sft import sft_loss, text_logps

NAMES = ("data", "base", "expert", "expert_noisy", "labeller")  # in the order in which they are built


def asset_dir(cfg: Config) -> Path:
    """The cache folder of these settings: the same settings share it, others never mix with it."""
    key = json.dumps([dataclasses.asdict(cfg.phantom), dataclasses.asdict(cfg.assets), cfg.assets_seed], sort_keys=True)
    return Path(cfg.assets_dir) / f"phantom-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def resolve(cfg: Config, needs: tuple[str, ...] = NAMES) -> Config:
    """Replace every `phantom:NAME` path by its folder, building the assets in `needs` that are missing."""
    wanted = set()

    def place(value: str) -> str:
        if not value.startswith("phantom:"):
            return value
        name = value.removeprefix("phantom:")
        if name.split("/")[0] not in NAMES:
            raise ValueError(f"{value}: unknown; known are {', '.join(f'phantom:{known}' for known in NAMES)}")
        wanted.add(name.split("/")[0])
        return str(asset_dir(cfg) / name)

    replaced = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, path=place(cfg.data.path)),
        model=dataclasses.replace(cfg.model, path=place(cfg.model.path)),
        scorers=dataclasses.replace(
            cfg.scorers, **{k: place(v) for k, v in dataclasses.asdict(cfg.scorers).items() if isinstance(v, str)}
        ),
    )
    for name in [n for n in NAMES if n in wanted and n in needs]:
        ensure(cfg, name)
    return replaced


def ensure(cfg: Config, name: str) -> Path:
    """Build asset `name` unless it is there; returns its folder."""
    folder = asset_dir(cfg) / name
    if folder.exists():
        return folder
    if name not in ("data", "labeller"):  # the labeller learns from texts of its own
        ensure(cfg, "data")
    with lock(folder.with_name(f"{name}.lock"), wait=True):  # two processes may want the same asset
        if not folder.exists():
            print(f"building {folder}", flush=True)
            with atomic_folder(folder) as tmp:
                torch.manual_seed(cfg.assets_seed)
                BUILDERS[name](cfg, tmp)
    return folder


def read_assets_data(cfg: Config, split: str) -> tuple[list[Study], Tensor, Tensor]:
    """Studies of a phantom split, their images (n, 64, 64) uint8 and labels (n, 15) float."""
    data = dataclasses.replace(cfg.data, path=str(asset_dir(cfg) / "data"), format="r2gen", target="both", limit=0)
    studies = load_studies(data, split)
    images = torch.from_numpy(np.stack([np.asarray(read_image(s.image).convert("L")) for s in studies]))
    labels = torch.tensor([[label in s.labels for label in phantom.LABELS] for s in studies]).float()
    return studies, images, labels


def held_out(n: int) -> int:
    """How many of a split's n studies, its first ones, measure an asset instead of training it."""
    return min(512, n // 8)


def normalise(images: Tensor) -> Tensor:
    """Grey images (B, H, W) uint8 -> (B, 3, H, W) float, exactly as the saved image processor does it."""
    return ((images.float() / 255 - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)


def optimise(parameters, steps: int, lr: float, loss_at, what: str, clip: float = 1.0) -> None:
    """AdamW with 5% warm-up and cosine decay over `loss_at(step) -> scalar loss`."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * s / steps)) + 0.01)
    )
    bar = tqdm(range(steps), desc=f"{what:<14}")
    for step in bar:
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# ------------------------------------------------------------------------------------------------------------ base


def by_length(rows: list[int], texts: list[str], parts: int) -> list[list[int]]:
    """A batch in parts of similar text length: less padding, the same sums."""
    ordered = sorted(rows, key=lambda i: len(texts[i]))
    return [part.tolist() for part in np.array_split(ordered, parts)]


def train_tower(cfg: Config, tower, images: Tensor, labels: Tensor) -> float:
    """Teach the vision tower the 15 sided labels; returns its micro-F1 on the held-out studies.

    Every patch token must tell all the labels by itself: what the language model reads later is any one of them.
    """
    head, held = nn.Linear(tower.config.hidden_size, labels.shape[1]), held_out(len(images))

    def classify(batch: Tensor) -> Tensor:  # (B, H, W) -> (B, patches, 15)
        return head(tower(pixel_values=normalise(batch)).last_hidden_state[:, 1:])

    def loss(step: int) -> Tensor:
        rows = [held + i for i in batch_ids(len(images) - held, 64, cfg.assets_seed, step)]
        logits = classify(images[rows])
        return F.binary_cross_entropy_with_logits(logits, labels[rows][:, None].expand_as(logits))

    optimise([*tower.parameters(), *head.parameters()], cfg.assets.vision_steps, 1e-3, loss, "vision tower")
    with torch.no_grad():
        predicted = classify(images[:held]).mean(dim=1) > 0
    return (2 * (predicted * labels[:held]).sum() / (predicted.sum() + labels[:held].sum())).item()


def build_base(cfg: Config, folder: Path) -> None:
    """Train the base model: its vision tower as a classifier, then, tower frozen, projection and language model on
    captions. With the tower trained along, random early gradients wreck it and the model stays blind (F1 1 for 60)."""
    studies, images, labels = read_assets_data(cfg, "base")
    # a few reports are tagged: LoRA cannot make a token likely whose output row was never once the right answer
    texts = [wrap(s.report) if "FINDINGS" in s.report and i % 4 == 0 else s.report for i, s in enumerate(studies)]
    reports = [s.report for s in read_assets_data(cfg, "expert")[0]]
    tokenizer = policy_tokenizer(reports + texts + [f"USER: {cfg.data.prompt} ASSISTANT:"] * 100)
    processor, model = new_processor(tokenizer, cfg.phantom.image_size), new_llava(tokenizer, cfg.phantom.image_size)
    prepare(model, cfg)
    f1, held = train_tower(cfg, model.model.vision_tower, images, labels), held_out(len(studies))
    model.model.vision_tower.requires_grad_(False)
    prompt = encode_prompts(processor, [read_image(studies[0].image)], cfg.data.prompt, "cpu")  # batch 1

    def loss(step: int) -> Tensor:
        rows = [held + i for i in batch_ids(len(studies) - held, 48, cfg.assets_seed + 1, step)]
        inputs = {name: row.expand(len(rows), *row.shape[1:]) for name, row in prompt.items()}
        inputs["pixel_values"] = normalise(images[rows])
        logps, mask, _ = text_logps(model, processor, inputs, [texts[i] for i in rows], cfg)
        return sft_loss(logps, mask)

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimise(trainable, cfg.assets.base_steps, 1.5e-3, loss, "base model")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    report_quality(folder, {"vision_tower_sided_f1": f1, "studies": held})


# ---------------------------------------------------------------------------------------------------------- expert


def noisy_reports(cfg: Config, studies: list[Study]) -> tuple[list[str], Tensor]:
    """Reports of the expert's studies as noisy as the references are, and the labels they state (n, 15)."""
    truth = {row["id"]: row["findings"] for row in read_jsonl(asset_dir(cfg) / "data" / "truth.jsonl")}
    texts, stated = [], []
    for i, study in enumerate(studies):
        rng = np.random.default_rng([cfg.assets_seed, i])
        shown = [phantom.Finding(*(f[key] for key in ("name", "side", "site", "severity"))) for f in truth[study.id]]
        text, labels = phantom.write_report(shown, rng, cfg.phantom, noisy=True)
        texts.append(text)
        stated.append([label in labels for label in phantom.LABELS])
    return texts, torch.tensor(stated).float()


def build_expert(cfg: Config, folder: Path, noisy: bool = False) -> None:
    """Train the frozen expert: CLIP's loss, where studies with the same findings are all right answers.

    noisy: on reports that hallucinate and omit as the references do, where the default expert's are clean. What it
    learns then is no better than what the policy imitates.
    """
    import open_clip

    studies, images, labels = read_assets_data(cfg, "expert")
    reports, held = [s.report for s in studies], held_out(len(studies))
    if noisy:
        reports, labels = noisy_reports(cfg, studies)
    tokenizer = word_piece(reports, folder)
    settings = clip_config(len(tokenizer), tokenizer.sep_token_id)
    model = open_clip.model.CLIP(**settings["model_cfg"], cast_dtype=None)
    length = settings["model_cfg"]["text_cfg"]["context_length"]
    encoded = tokenizer(reports, padding="max_length", max_length=length, truncation=True)
    tokens = torch.tensor(encoded["input_ids"])  # (n, length)

    def features(rows: list[int]) -> tuple[Tensor, Tensor]:  # (B, D) each, normalised
        parts = by_length(list(range(len(rows))), [reports[i] for i in rows], 4)
        text = torch.empty(len(rows), settings["model_cfg"]["embed_dim"])
        for part in parts:
            text[part] = expert_module.encode_tokens(model, tokens[rows][part])
        return F.normalize(model.encode_image(normalise(images[rows])), dim=-1), F.normalize(text, dim=-1)

    def loss(step: int) -> Tensor:
        rows = [held + i for i in batch_ids(len(studies) - held, 128, cfg.assets_seed + 2, step)]
        image, text = features(rows)
        same = (labels[rows][:, None] == labels[rows][None]).all(dim=-1).float()  # (B, B)
        target = same / same.sum(dim=-1, keepdim=True)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimise(list(model.parameters()), cfg.assets.expert_steps, 1e-3, loss, "expert")
    model.eval()
    expert_module.save_expert(model, settings, tokenizer, folder)
    n = min(256, held)
    with torch.no_grad():
        image, text = features(list(range(n)))
    same = (labels[:n, None] == labels[None, :n]).all(dim=-1)
    hit = same[torch.arange(n), (image @ text.T).argmax(dim=-1)].float().mean().item()
    frozen = expert_module.load_expert(folder)
    report_quality(folder, {f"retrieval_at_1_of_{n}": hit} | probe_expert(frozen, studies[:held], cfg))


def probe_expert(frozen, studies: list[Study], cfg: Config) -> dict[str, float]:
    """How often the expert prefers the true report to one with a side flipped, a finding dropped, or one added."""
    rng, wins = np.random.default_rng(cfg.assets_seed), {}
    for study in studies:
        truth = [phantom.finding_of(label, rng) for label in study.labels]
        variants = {}
        sided = [f for f in truth if f.side and not any(g.name == f.name and g.side != f.side for g in truth)]
        if sided:
            flip = {"left": "right", "right": "left"}
            variants["side"] = [dataclasses.replace(f, side=flip[f.side]) if f is sided[0] else f for f in truth]
        if truth:
            variants["dropped"] = truth[1:]
        absent = [label for label in phantom.LABELS if label not in study.labels]
        variants["added"] = [*truth, phantom.finding_of(absent[rng.integers(len(absent))], rng)]
        texts = [phantom.write_report(f, rng, cfg.phantom, noisy=False)[0] for f in [truth, *variants.values()]]
        s = frozen.similarity([read_image(study.image)], [study.id], texts, len(texts))[0]
        for name, value in zip(variants, s[1:], strict=True):
            wins.setdefault(name, []).append(float(s[0] > value))
    return {f"prefers_truth_over_{name}": float(np.mean(v)) for name, v in wins.items()}


# -------------------------------------------------------------------------------------------------------- labeller


def build_labeller(cfg: Config, folder: Path) -> None:
    """Train the CheXbert-format labeller on texts of its own (no images), labelled by what each text states."""
    texts, classes = phantom.labelled_texts(cfg.phantom, cfg.assets_seed, cfg.phantom.expert)
    classes, held = torch.as_tensor(classes), held_out(len(texts))  # (n, 14)
    tokenizer = word_piece(texts, folder)
    bert = new_bert(len(tokenizer))
    model = clinical.CheXbert(bert)
    encoded = [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=512)["input_ids"]]

    def class_logits(rows: list[int]) -> list[Tensor]:  # 14 x (B, 4 or 2)
        ids = nn.utils.rnn.pad_sequence([encoded[i] for i in rows], batch_first=True)
        return model(ids, (ids != tokenizer.pad_token_id).long())

    def loss(step: int) -> Tensor:
        rows, total = [held + i for i in batch_ids(len(texts) - held, 64, cfg.assets_seed + 3, step)], 0.0
        for part in by_length(rows, texts, 4):
            heads = enumerate(class_logits(part))
            total = total + sum(F.cross_entropy(head, classes[part, i], reduction="sum") for i, head in heads)
        return total / (len(rows) * classes.shape[1])

    optimise(list(model.parameters()), cfg.assets.labeller_steps, 1e-3, loss, "labeller")
    with torch.no_grad():
        predicted = torch.stack([head.argmax(-1) for head in class_logits(range(held))], dim=1)  # (held, 14)
    positive, truth = (predicted == 1) | (predicted == 3), (classes[:held] == 1) | (classes[:held] == 3)
    f1 = 2 * (positive & truth).sum() / (positive.sum() + truth.sum())
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    clinical.save_chexbert(model, folder / "chexbert.pth")
    report_quality(
        folder, {"micro_f1": f1.item(), "class_accuracy": (predicted == classes[:held]).float().mean().item()}
    )


def build_data(cfg: Config, folder: Path) -> None:
    """Write the phantom data set and a contact sheet of 12 test studies."""
    phantom.build(cfg.phantom, cfg.assets_seed, folder)
    phantom.contact_sheet(folder, folder / "contact_sheet.png")


def report_quality(folder: Path, numbers: dict[str, float]) -> None:
    """Print an asset's held-out quality and keep it beside the asset."""
    (folder / "quality.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(
        f"{folder.name.removesuffix('.tmp')} on held-out studies: "
        + ", ".join(f"{k} {v:.3g}" for k, v in numbers.items())
    )


BUILDERS = {
    "data": build_data,
    "base": build_base,
    "expert": build_expert,
    "expert_noisy": partial(build_expert, noisy=True),
    "labeller": build_labeller,
}


@dataclass
class BuildConfig(Config):
    build: tuple[str, ...] = ("data", "base", "expert", "labeller")
    """which assets to build, of these and expert_noisy"""


def main() -> None:
    cfg = parse(BuildConfig, "Build the phantom's data set and models.")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for name in cfg.build:
        print(ensure(cfg, name))


if __name__ == "__main__":
    main()
