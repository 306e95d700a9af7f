"""The phantom world: what is in a study, what its reference report says of it, and the data set on disk.

image.py draws the images, text.py writes the English. References have the disease that the method is to cure: they
leave findings out and add others by language prior (`misremember`).
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from phantom import text
from phantom.config import PhantomConfig, Recipe
from phantom.findings import LABELS, SEVERITIES, SIDED, Finding, draw_finding, labels_of
from phantom.image import contact_sheet, encode_mask, render

SPLITS = ("expert", "base", "sft", "train", "val", "test")
# language priors, one a field `prior_<guess>_<cause>`: (field, cause, guess)
PRIORS = [(f.name, *reversed(f.name.split("_")[1:])) for f in dataclasses.fields(PhantomConfig) if "prior_" in f.name]
DRAWS = 10_000  # tries at an abnormal study; with the default rates four of five are good
MOST = 5  # findings in a reference: priors stop there, so that reports stay short


def _draw_side(side: str, rate: dict, rng) -> list[Finding]:
    """The findings of one side; a zone is used once, and the lower zone is not hidden behind fluid."""
    found, zones = [], ["upper", "mid", "lower"]
    for name in SIDED:
        wet = name == "atelectasis" and any(f.name == "effusion" for f in found)
        if rng.random() >= rate["atelectasis_with_effusion" if wet else name]:
            continue
        finding = draw_finding(name, side, rng, zones if name in ("consolidation", "lesion") else None)
        if name in ("consolidation", "lesion"):
            zones.remove(finding.site)
        if name == "effusion" and finding.severity != "small":
            zones.remove("lower")
        found.append(finding)
    return found


def sample_findings(rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """What the image of one study shows: nothing in a share cfg.normal of studies, else 1 to 4 findings.

    ValueError for rates under which that never comes about.
    """
    if rng.random() < cfg.normal:
        return []
    for _ in range(DRAWS):
        large, rate = rng.random() < cfg.cardiomegaly, vars(cfg)
        found = [draw_finding("cardiomegaly", None, rng)] if large else []
        if large:
            rate = rate | {"edema": cfg.edema_with_cardiomegaly, "effusion": cfg.effusion_with_cardiomegaly}
        found += [draw_finding(name, None, rng) for name in ("edema", "device") if rng.random() < rate[name]]
        found += _draw_side("left", rate, rng) + _draw_side("right", rate, rng)
        if 1 <= len(found) <= 4:
            return found
    raise ValueError(f"phantom: 1 to 4 findings never came about in {DRAWS} draws: raise or lower the findings' rates, "
                     "or set phantom.normal = 1")  # fmt: skip


def misremember(findings: list[Finding], rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """What a reference states: some of `findings` left out, and findings the image lacks added by language prior."""
    mild = {f: f.severity == SEVERITIES[f.name][0] for f in findings}
    kept = [f for f in findings if rng.random() >= (cfg.omit_mild if mild[f] else cfg.omit)]
    taken, added = {f.label for f in findings}, []
    for field, stated, name in PRIORS:
        for cause in [f for f in kept if f.name == stated]:
            sides = (None,) if name not in SIDED else (cause.side,) if cause.side else ("left", "right")
            for side in sides:
                guess = draw_finding(name, side, rng)
                if len(kept) + len(added) < MOST and guess.label not in taken and rng.random() < getattr(cfg, field):
                    taken.add(guess.label)
                    added.append(guess)
    return sorted(kept + added, key=lambda f: LABELS.index(f.label))


def write_report(
    findings: list[Finding], rng: np.random.Generator, cfg: PhantomConfig, noisy: bool, author: int | None = None
) -> tuple[str, list[str]]:
    """("FINDINGS: ... IMPRESSION: ...", labels it states) by author 0, 1, 2 or 3, None = a random one.

    `noisy`: with omissions and language priors; else the report is complete and true.
    """
    stated = misremember(findings, rng, cfg) if noisy else findings
    body, impression, _ = text.sections(stated, rng, cfg.hedge, author)
    return f"FINDINGS: {body} IMPRESSION: {impression}", labels_of(stated)


def write_caption(findings, rng: np.random.Generator, cfg: PhantomConfig) -> tuple[str, list[str]]:
    """A caption without headers and the labels it states; a share cfg.base_prior is as wrong as a reference."""
    believed = misremember(findings, rng, cfg) if rng.random() < cfg.base_prior else findings
    return text.caption(believed, rng)[0], labels_of(believed)


def make_study(cfg: PhantomConfig, seed: int, split: str, index: int) -> tuple[np.ndarray, dict, dict]:
    """(image (size, size) uint8, annotation.json row, truth.jsonl row) of one study, by (seed, split, index) alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    masks: dict = {"": np.zeros(1)}
    while not all(mask.any() for mask in masks.values()):  # about one film in 10,000 hides a finding: drawn again
        findings = sample_findings(rng, cfg)
        image, masks = render(findings, rng, cfg.image_size)
    if split == "base":
        report, stated = write_caption(findings, rng, cfg)
    else:
        report, stated = write_report(findings, rng, cfg, noisy=split != "expert")
    name = f"{split}{index:05d}"
    row = {"id": name, "report": report, "image_path": [f"{name}/0.png"], "split": split}
    shown = [{"label": f.label} | dataclasses.asdict(f) | {"mask": encode_mask(masks[f.label])} for f in findings]
    return image, row, {"id": name, "split": split, "labels": labels_of(findings), "findings": shown, "stated": stated}


def build(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Write the data set in R2Gen's layout, print and return noise_rates of its references (sft, train, val, test).

    A contact sheet of the first test studies stands beside it. Raises ValueError, see `sample_findings`.
    """
    cfg, annotation, pairs = recipe.phantom, {}, []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    jobs = [(split, index) for split in SPLITS for index in range(getattr(cfg, split))]
    with open(folder / "truth.jsonl", "w", encoding="utf-8") as truth_file:
        for split, index in tqdm(jobs, desc="phantom studies", unit="study"):
            image, row, truth = make_study(cfg, recipe.seed, split, index)
            (folder / "images" / row["id"]).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / "images" / row["image_path"][0], compress_level=1)
            annotation.setdefault(split, []).append(row)
            truth_file.write(json.dumps(truth) + "\n")
            if split in SPLITS[2:]:
                pairs.append((truth["labels"], truth["stated"]))
    (folder / "annotation.json").write_text(json.dumps(annotation, indent=1), encoding="utf-8")
    contact_sheet(folder, folder / "contact_sheet.png")
    rates = noise_rates(pairs)
    print("phantom references: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))
    return rates


def noise_rates(pairs: Iterable[tuple[list[str], list[str]]]) -> dict[str, float]:
    """From (labels in the image, labels stated): the shares of stated not in the image and of image not stated.

    Also each language prior's rate: P(b stated | a in the image and stated, b not in the image), both on one side.
    """
    pairs = [(set(true), set(stated)) for true, stated in pairs]
    rates = {"hallucinated": sum(len(s - t) for t, s in pairs) / max(sum(len(s) for _, s in pairs), 1),
             "omitted": sum(len(t - s) for t, s in pairs) / max(sum(len(t) for t, _ in pairs), 1)}  # fmt: skip
    for field, cause, guess in PRIORS:
        given_way = []  # of every study and side that could show this prior: whether it does
        for side in ("_left", "_right") if {cause, guess} & set(SIDED) else ("",):
            a, b = (name + side if name in SIDED else name for name in (cause, guess))
            given_way += [b in stated for true, stated in pairs if a in true & stated and b not in true]
        rates[field] = sum(given_way) / max(len(given_way), 1)
    return rates
