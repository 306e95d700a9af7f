"""What is built on first use: the phantom and its models, small versions of the real components in their real layouts.

    data       R2Gen's layout                                     world.py writes it; data_clean: true references
    base       LlavaForConditionalGeneration + processor          sees, but hallucinates as a Med-VLM does;
               base_pooled: over a tower whose patches need not tell every label each
    expert     open_clip folder                                   frozen scorer of Eq. 6, learnt from true reports;
               expert_noisy: from the policy's own references; expert_50, ...: at 50%, ... of their rates of error
    labeller   BERT folder + chexbert.pth in CheXbert's format    clinical reward of Eq. 4, and BERTScore's encoder

Base and expert learn from splits of their own, the labeller from texts; a model's quality.json says how good it is on
held-out ones. `tiny:base`, `tiny:expert` and `tiny:labeller` are the same three, of the training split of cfg.data.
`python -m phantom.assets --build data base expert labeller` builds ahead of a run, which else does on first use.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import BertConfig, BertModel

from config import Config, DataConfig, parse
from data import Study, read_split
from formats.files import read_json
from formats.images import read_image
from phantom import cache, text
from phantom.config import PhantomConfig, Recipe
from phantom.findings import LABELS, finding_of
from phantom.world import SPLITS, build, build_clean, misremember, read_truth, sample_findings, write_report
from rewards import wrap
from running import parallel
from scorers.chexbert import CHEXPERT_LABELS, NEGATIVE, POSITIVE, UNCERTAIN, CheXbert
from scorers.expert import Expert, load_expert
from tiny import fit
from tiny.build import TINY_BUILDERS
from tiny.models import SIZES, policy_tokenizer, word_piece

PROMPT = "Write the report."  # under which the base learns; data.prompt is the policy's
MAX_TOKENS = 96  # the longest caption has 88, tags and EOS included


def held_out(n: int) -> int:
    """How many of n studies or texts, the first ones, measure a model instead of training it."""
    return max(1, min(512, n // 8))


def read_studies(folder: Path, *splits: str) -> list[Study]:
    """The studies of some splits; ValueError if one is damaged."""
    cfg = DataConfig(path=str(folder), format="r2gen", target="both", strict=True)
    return [study for split in splits for study in read_split(cfg, split)[0]]


def as_data(studies: list[Study], held: int) -> fit.Data:
    """What a model learns from, with LABELS (n, 15); the first `held` studies measure it."""
    images = torch.from_numpy(np.stack([np.asarray(read_image(s.image).convert("L")) for s in studies]))
    labels = torch.tensor([[label in s.labels for label in LABELS] for s in studies])
    return fit.Data(studies, images, labels, range(held, len(studies)), range(held))


def build_base(recipe: Recipe, folder: Path, pooled: bool = False) -> None:
    """Train the base model on captions."""
    studies = read_studies(folder.with_name("data"), "base")
    data = as_data(studies, held_out(len(studies)))
    # a few reports are tagged: LoRA cannot make a token likely whose output row was never once the right answer
    texts = [wrap(s.report) if "FINDINGS" in s.report and i % 4 == 0 else s.report for i, s in enumerate(studies)]
    reports = [row["report"] for row in read_json(folder.with_name("data") / "annotation.json")["expert"]]
    tokenizer = policy_tokenizer(reports + texts + [f"USER: {PROMPT} ASSISTANT:"] * 100)
    steps, by = (recipe.models.vision_steps, recipe.models.base_steps), "mean" if pooled else "patches"
    classify = fit.train_base(folder, data, texts, tokenizer, PROMPT, data.pixels, data.train, steps=steps,
                              seed=recipe.seed, by=by, max_tokens=MAX_TOKENS)  # fmt: skip
    with torch.no_grad():
        told = classify(data.pixels(data.held)).mean(dim=1) > 0
    f1 = fit.f1(told, data.labels[data.held]).item()
    fit.report_quality(folder, {"vision_tower_sided_f1": f1, "studies": len(data.held)})


def expert_data(recipe: Recipe, folder: Path, noise: float | None) -> fit.Data:
    """The studies with the reports that an expert learns from, and the LABELS that these state; noise, see
    build_expert: None gives the LABELS of the images."""
    studies = read_studies(folder, "expert")
    held = held_out(len(studies))
    if noise is None:
        studies = studies[:held] + read_studies(folder, "sft", "train")
    elif noise:
        truth, rates = read_truth(folder), vars(recipe.data).items()
        rates = {name: min(1.0, noise * rate) for name, rate in rates if name.startswith(("omit", "prior_"))}
        cfg = dataclasses.replace(recipe.data, **rates)
        for i, study in enumerate(studies):
            rng = np.random.default_rng([recipe.seed, i])
            study.report, study.labels = write_report(truth[study.id], rng, cfg, noisy=True)
    return as_data(studies, held)


def excerpt(report: str, rng: np.random.Generator) -> str:
    """A section of a report or all of it, mostly the impression: it names each finding in a quarter of the words."""
    findings, _, impression = report.partition(" IMPRESSION: ")
    return (f"IMPRESSION: {impression}", findings, report)[rng.choice(3, p=(0.6, 0.2, 0.2))]


def build_expert(recipe: Recipe, folder: Path, noise: float | None = 0.0) -> None:
    """Train the frozen expert: CLIP's loss, where studies with the same findings are all right answers, on reports of
    its own that err at `noise` times the references' rates. None: on the policy's own pairs, the references of splits
    sft and train, with plain InfoNCE: it is told nothing that the policy is not."""
    data, rng = expert_data(recipe, folder.with_name("data"), noise), np.random.default_rng(recipe.seed)
    reports, n = [study.report for study in data.studies], min(256, len(data.held))
    model, tokenizer = fit.train_expert(folder, data, reports, lambda i: excerpt(reports[i], rng), data.pixels,
                                        data.train, labels=None if noise is None else data.labels,
                                        steps=recipe.models.expert_steps, seed=recipe.seed + 2)  # fmt: skip
    with torch.no_grad():
        image, report = fit.clip_features(model, tokenizer, data.pixels(range(n)), reports[:n])
    hit = fit.alike(data.labels[:n])[torch.arange(n), (image @ report.T).argmax(dim=-1)].float().mean().item()
    studies = read_studies(folder.with_name("data"), "expert")[: len(data.held)]
    preferred = probe_expert(load_expert(folder), studies, recipe.data, recipe.seed)
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
    texts, classes = labelled_texts(recipe.data, recipe.seed, recipe.data.expert)
    classes, held = torch.as_tensor(classes), held_out(len(texts))  # (n, 14)
    tokenizer = word_piece(texts, folder)
    model = CheXbert(BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES["labeller"])))
    labeller = fit.train_labeller(folder, model, tokenizer, texts, classes, range(held, len(texts)),
                                  steps=recipe.models.labeller_steps, lr=1e-3, seed=recipe.seed + 3)  # fmt: skip
    predicted, true = torch.from_numpy(labeller.classes(texts[:held])), classes[:held]  # (held, 14)
    f1 = fit.f1(*((c == POSITIVE) | (c == UNCERTAIN) for c in (predicted, true)))
    exact = (predicted == true).float().mean()
    fit.report_quality(folder, {"micro_f1": f1.item(), "class_accuracy": exact.item()})


# name: function of the recipe and the folder to fill, beside which the data set lies
BUILDERS = {"data": build, "data_clean": build_clean, "base": build_base,
            "base_pooled": partial(build_base, pooled=True), "labeller": build_labeller, **TINY_BUILDERS,
            "expert": build_expert, "expert_noisy": partial(build_expert, noise=None),
            **{f"expert_{rate}": partial(build_expert, noise=rate / 100) for rate in (50, 100, 150, 200)}}  # fmt: skip
resolve = partial(cache.resolve, builders=BUILDERS)
ensure = partial(cache.ensure, builders=BUILDERS)


@dataclasses.dataclass
class BuildConfig(Config):
    # which to build where they are missing
    build: tuple[Literal[cache.NAMES + cache.TINY], ...] = ("data", "base", "expert", "labeller")


@parallel.script("phantom.assets")
def main() -> None:
    cfg = parse(BuildConfig, "Build the phantom and its models, or those of a data set.")
    for name in cfg.build:
        print(ensure(cfg, name))


if __name__ == "__main__":
    main()
