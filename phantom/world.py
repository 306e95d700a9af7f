"""The phantom world: what is in a study, what its reference report says of it, and the data set on disk.

The images are drawn by phantom_image.py, the English is phantom_text.py's. References have the disease that the
method is to cure: they leave findings out and add others by language prior (`misremember`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from phantom import text as phantom_text
from phantom.config import PhantomConfig
from phantom.image import contact_sheet as contact_sheet
from phantom.image import decode_mask as decode_mask
from phantom.image import encode_mask, render
from phantom.text import AUTHORS as AUTHORS
from phantom.text import NORMAL_TEMPLATE as NORMAL_TEMPLATE

FINDINGS = ("cardiomegaly", "edema", "device", "effusion", "pneumothorax", "consolidation", "atelectasis", "lesion",
            "fracture")  # fmt: skip
SIDED = FINDINGS[3:]
LABELS = FINDINGS[:3] + tuple(f"{name}_{side}" for name in SIDED for side in ("left", "right"))


# severities, mildest first
SEVERITIES = {name: ("mild", "moderate", "severe") for name in FINDINGS} | {
    name: ("small", "moderate", "large") for name in ("effusion", "pneumothorax", "lesion")
}
SITES = {name: ("upper", "mid", "lower") for name in ("consolidation", "lesion", "fracture")} | {
    "device": ("pacemaker", "catheter")
}


@dataclass(frozen=True)
class Finding:
    """One finding: name of FINDINGS, side "left"/"right" or None, site of SITES or "", severity of SEVERITIES."""

    name: str
    side: str | None
    site: str
    severity: str

    @property
    def label(self) -> str:
        return f"{self.name}_{self.side}" if self.side else self.name


def _draw(name: str, side: str | None, rng, sites=None) -> Finding:
    """A finding of random site (of `sites`) and severity."""
    sites = SITES.get(name, ("",)) if sites is None else sites
    return Finding(name, side, sites[int(rng.integers(len(sites)))], SEVERITIES[name][int(rng.integers(3))])


def finding_of(label: str, rng: np.random.Generator) -> Finding:
    """A finding of one of LABELS with random site and severity."""
    if label not in LABELS:
        raise ValueError(f"phantom: unknown label '{label}'; known: {', '.join(LABELS)}")
    name, _, side = label.partition("_")
    return _draw(name, side or None, rng)


def _draw_side(side: str, rate: dict, rng) -> list[Finding]:
    """The findings of one side; a zone is used once, and the lower zone is not hidden behind fluid."""
    found, zones = [], ["upper", "mid", "lower"]
    for name in SIDED:
        wet = name == "atelectasis" and any(f.name == "effusion" for f in found)
        if rng.random() >= rate["atelectasis_with_effusion" if wet else name]:
            continue
        finding = _draw(name, side, rng, zones if name in ("consolidation", "lesion") else None)
        if name in ("consolidation", "lesion"):
            zones.remove(finding.site)
        if name == "effusion" and finding.severity != "small":
            zones.remove("lower")
        found.append(finding)
    return found


def sample_findings(rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """What the image of one study shows: nothing in a share cfg.normal of studies, else 1 to 4 findings."""
    if rng.random() < cfg.normal:
        return []
    while True:
        large = rng.random() < cfg.cardiomegaly
        found = [_draw("cardiomegaly", None, rng)] if large else []
        for name, chance in (("edema", cfg.edema_with_cardiomegaly if large else cfg.edema), ("device", cfg.device)):
            if rng.random() < chance:
                found.append(_draw(name, None, rng))
        for side in ("left", "right"):
            rate = {name: getattr(cfg, name) for name in SIDED}
            rate["effusion"] = cfg.effusion_with_cardiomegaly if large else cfg.effusion
            rate["atelectasis_with_effusion"] = cfg.atelectasis_with_effusion
            found += _draw_side(side, rate, rng)
        if 1 <= len(found) <= 4:
            return found


# language priors: (what is stated, what is then written though the image does not show it, field of its rate)
PRIORS = (
    ("cardiomegaly", "edema", "prior_edema_cardiomegaly"),
    ("effusion", "atelectasis", "prior_atelectasis_effusion"),
    ("consolidation", "effusion", "prior_effusion_consolidation"),
    ("atelectasis", "effusion", "prior_effusion_atelectasis"),
    ("edema", "effusion", "prior_effusion_edema"),
    ("edema", "cardiomegaly", "prior_cardiomegaly_edema"),
    ("effusion", "device", "prior_device_effusion"),
    ("pneumothorax", "device", "prior_device_pneumothorax"),
    ("fracture", "pneumothorax", "prior_pneumothorax_fracture"),
)

MOST = 5  # findings in a reference: priors stop there, so that reports stay short


def misremember(findings: list[Finding], rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """What a reference states: some of `findings` left out, and findings the image lacks added by language prior."""
    mild = {f: f.severity == SEVERITIES[f.name][0] for f in findings}
    kept = [f for f in findings if rng.random() >= (cfg.omit_mild if mild[f] else cfg.omit)]
    taken = {f.label for f in findings}
    added = []
    for trigger, name, field in PRIORS:
        for cause in (f for f in kept if f.name == trigger):
            sides = (None,) if name not in SIDED else (cause.side,) if cause.side else ("left", "right")
            for side in sides:
                guess = _draw(name, side, rng)
                if len(kept) + len(added) < MOST and guess.label not in taken and rng.random() < getattr(cfg, field):
                    taken.add(guess.label)
                    added.append(guess)
    return sorted(kept + added, key=lambda f: LABELS.index(f.label))


def _labels(findings: Iterable[Finding]) -> list[str]:
    present = {f.label for f in findings}
    return [label for label in LABELS if label in present]


def write_report(
    findings: list[Finding], rng: np.random.Generator, cfg: PhantomConfig, noisy: bool, author: int | None = None
) -> tuple[str, list[str]]:
    """("FINDINGS: ... IMPRESSION: ...", labels it states) by one of AUTHORS authors, None = a random one.

    `noisy`: with omissions and language priors; else the report is complete and true.
    """
    stated = misremember(findings, rng, cfg) if noisy else findings
    text, impression, _ = phantom_text.sections(stated, rng, cfg.hedge, author)
    return f"FINDINGS: {text} IMPRESSION: {impression}", _labels(stated)


def write_caption(findings, rng: np.random.Generator, cfg: PhantomConfig) -> tuple[str, list[str]]:
    """A caption without headers and the labels it states; a share cfg.base_prior is as wrong as a reference."""
    believed = misremember(findings, rng, cfg) if rng.random() < cfg.base_prior else findings
    return phantom_text.caption(believed, rng)[0], _labels(believed)


SPLITS = ("expert", "base", "sft", "train", "val", "test")


def make_study(cfg: PhantomConfig, seed: int, split: str, index: int):
    """(image (size, size) uint8, annotation.json row, truth.jsonl row) of one study, by (seed, split, index) alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    masks: dict = {"": np.zeros(1)}
    while not all(mask.any() for mask in masks.values()):  # about one film in 10,000 hides a finding: drawn again
        findings = sample_findings(rng, cfg)
        image, masks = render(findings, rng, cfg)
    if split == "base":
        report, stated = write_caption(findings, rng, cfg)
    else:
        report, stated = write_report(findings, rng, cfg, noisy=split != "expert")
    name = f"{split}{index:05d}"
    row = {"id": name, "report": report, "image_path": [f"{name}/0.png"], "split": split}
    shown = [{"label": f.label, "name": f.name, "side": f.side, "site": f.site, "severity": f.severity,
              "mask": encode_mask(masks[f.label])} for f in findings]  # fmt: skip
    return image, row, {"id": name, "split": split, "labels": _labels(findings), "findings": shown, "stated": stated}


def check(cfg: PhantomConfig) -> None:
    """Raise ValueError, naming the field, for a rate outside [0, 1], a negative size, or a world without findings."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"phantom.{f.name} is a rate and must be in [0, 1], got {value:g}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"phantom.{f.name} must not be negative, got {value}")
    if cfg.image_size < 32:
        raise ValueError(f"phantom.image_size must be at least 32 for a finding to show, got {cfg.image_size}")
    if cfg.normal < 1 and not any(getattr(cfg, name) for name in FINDINGS):
        raise ValueError("phantom.normal must be 1 where the rate of every finding is 0")


def build(cfg: PhantomConfig, seed: int, folder: str | Path) -> dict:
    """Write the data set in R2Gen's layout, print and return noise_rates of its references (sft, train, val, test).

    `annotation.json` is written last, so where it stands the folder is complete. Raises ValueError, see `check`.
    """
    check(cfg)
    folder, annotation, pairs = Path(folder), {}, []
    jobs = [(split, index) for split in SPLITS for index in range(getattr(cfg, split))]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "truth.jsonl", "w", encoding="utf-8") as truth_file:
        for split, index in tqdm(jobs, desc="phantom studies", unit="study"):
            image, row, truth = make_study(cfg, seed, split, index)
            (folder / "images" / row["id"]).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / "images" / row["image_path"][0], compress_level=1)
            annotation.setdefault(split, []).append(row)
            truth_file.write(json.dumps(truth) + "\n")
            if split in SPLITS[2:]:
                pairs.append((truth["labels"], truth["stated"]))
    (folder / "annotation.json").write_text(json.dumps(annotation, indent=1), encoding="utf-8")
    rates = noise_rates(pairs)
    print("phantom references: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
    return rates


def noise_rates(pairs: Iterable[tuple[list[str], list[str]]]) -> dict:
    """From (labels in the image, labels stated): the shares of stated not in the image and of image not stated.

    Also each language prior's rate: P(b stated | a in the image and stated, b not in the image), both on one side.
    """
    pairs = [(set(true), set(stated)) for true, stated in pairs]
    count = {"stated": sum(len(s) for _, s in pairs), "true": sum(len(t) for t, _ in pairs)}
    rates = {"hallucinated": sum(len(s - t) for t, s in pairs) / max(count["stated"], 1),
             "omitted": sum(len(t - s) for t, s in pairs) / max(count["true"], 1)}  # fmt: skip
    for cause, name, field in PRIORS:
        hits = chances = 0
        for side in ("left", "right") if name in SIDED or cause in SIDED else ("",):
            a, b = (f"{x}_{side}" if x in SIDED else x for x in (cause, name))
            asked = [b in stated for true, stated in pairs if a in true & stated and b not in true]
            hits, chances = hits + sum(asked), chances + len(asked)
        rates[field] = hits / max(chances, 1)
    return rates


TOPIC_LABELS = {"cardiomegaly": "Cardiomegaly", "edema": "Edema", "device": "Support Devices",
                "effusion": "Pleural Effusion", "pneumothorax": "Pneumothorax", "consolidation": "Consolidation",
                "atelectasis": "Atelectasis", "lesion": "Lung Lesion", "fracture": "Fracture",
                "silhouette": "Enlarged Cardiomediastinum", "opacity": "Lung Opacity",
                "pneumonia": "Pneumonia"}  # fmt: skip


def _labelled_text(cfg: PhantomConfig, rng: np.random.Generator) -> tuple[str, dict]:
    """A report (of likely or of random findings), loose sentences, or a caption; and its facts."""
    kind, count = rng.random(), int(rng.integers(1, 6))
    mixed = [finding_of(LABELS[i], rng) for i in sorted(rng.choice(len(LABELS), count, replace=False))]
    if kind < 0.4:
        parts = [phantom_text.loose_sentence(f, rng) for f in (mixed if kind < 0.2 else mixed[:1])]
        return " ".join(text for text, _ in parts), phantom_text.merge_facts(facts for _, facts in parts)
    findings = mixed if kind < 0.6 else misremember(sample_findings(rng, cfg), rng, cfg)
    if kind > 0.9:
        return phantom_text.caption(findings, rng)
    text, impression, facts = phantom_text.sections(findings, rng, 2 * cfg.hedge)
    return f"FINDINGS: {text} IMPRESSION: {impression}" if rng.random() < 0.6 else f"{text} {impression}", facts


def labelled_texts(cfg: PhantomConfig, seed: int, n: int) -> tuple[list[str], np.ndarray]:
    """n texts and their (n, 14) CheXbert classes (order of clinical.CHEXPERT_LABELS): what the TEXT says, not an image.

    0 blank, 1 positive, 2 negative, 3 uncertain; No Finding is 1 where nothing but support devices is 1 or 3, else 0.
    Hedges are twice as frequent as in reports, and findings are also mixed as no image would.
    """
    from scorers.clinical import CHEXPERT_LABELS  # here, as it brings torch, which neither config.py nor a build needs

    texts, classes = [], np.zeros((n, len(CHEXPERT_LABELS)), dtype=np.int64)
    for row in range(n):
        text, facts = _labelled_text(cfg, np.random.default_rng([seed, len(SPLITS), row]))
        texts.append(text)
        for topic, cls in facts.items():
            classes[row, CHEXPERT_LABELS.index(TOPIC_LABELS[topic])] = cls
        abnormal = any(cls in (1, 3) for topic, cls in facts.items() if topic != "device")
        classes[row, CHEXPERT_LABELS.index("No Finding")] = int(not abnormal)
    return texts, classes
