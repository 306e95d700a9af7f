"""The phantom world: what is in a study, what its reference report says of it, and the data set on disk.

image.py draws the images, text.py writes the English. References have the disease that the method is to cure: they
leave findings out and add others by language prior (`misremember`).
"""

import json
import shutil
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.files import read_json, read_jsonl
from phantom import text
from phantom.config import PhantomConfig, Recipe
from phantom.findings import FINDINGS, LABELS, SIDED, SITES, Finding, finding_of, labels_of
from phantom.image import contact_sheet, encode_mask, render

SPLITS = ("expert", "base", "sft", "train", "val", "test")
# language priors (field, cause, guess): where a report states the label `cause`, `guess` is made up at the field's rate
PRIORS = dict.fromkeys(
    (field.name, *(f"{name}_{side}" if name in SIDED else name for name in reversed(field.name.split("_")[1:])))
    for field in fields(PhantomConfig) if field.name.startswith("prior_") for side in ("left", "right")
)  # fmt: skip
# the labels in the order in which they are drawn
ORDER = FINDINGS[:3] + tuple(f"{name}_{side}" for side in ("left", "right") for name in SIDED)
ZONED = ("consolidation", "lesion")
DRAWS = 10_000  # tries at an abnormal study; with the default rates four of five are good
MOST = 5  # findings in a reference: priors stop there, so that reports stay short


def sample_findings(rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """No finding in a share cfg.normal of studies, else 1 to 4; ValueError for rates that never draw that many.

    Of one side, a zone holds one consolidation or lesion, and the lower zone none that fluid would hide.
    """
    if rng.random() < cfg.normal:
        return []
    for _ in range(DRAWS):
        found, rates = [], vars(cfg)
        for label in ORDER:
            name, _, side = label.partition("_")
            beside = [f for f in found if f.side in (None, side)]
            with_these = [rates[key] for key in (f"{name}_with_{f.name}" for f in beside) if key in rates]
            if rng.random() < (with_these or [rates[name]])[0]:
                taken = {"lower" if f.name == "effusion" and f.level else f.site for f in beside}
                free = [zone for zone in SITES[name] if zone not in taken] if name in ZONED else None
                found.append(finding_of(label, rng, free))
        if 1 <= len(found) <= 4:
            return found
    raise ValueError("phantom: 1 to 4 findings never came about: change their rates, or set phantom.normal = 1")


def misremember(findings: list[Finding], rng: np.random.Generator, cfg: PhantomConfig) -> list[Finding]:
    """What a reference states: some of `findings` left out, and findings the image lacks added by language prior."""
    told = [f for f in findings if rng.random() >= (cfg.omit if f.level else cfg.omit_mild)]
    kept, taken = labels_of(told), set(labels_of(findings))
    for field, cause, label in PRIORS:
        if cause in kept:
            guess = finding_of(label, rng)
            if len(told) < MOST and label not in taken and rng.random() < getattr(cfg, field):
                taken.add(label)
                told.append(guess)
    return sorted(told, key=lambda f: LABELS.index(f.label))


def write_report(findings, rng, cfg: PhantomConfig, noisy: bool, author: int | None = None) -> tuple[str, list[str]]:
    """(report, labels it states) by author 0 to 3 or any; noisy: with omissions and priors, else complete and true."""
    stated = misremember(findings, rng, cfg) if noisy else findings
    return text.Radiologist(rng, author).report(stated, cfg.hedge)[0], labels_of(stated)


def write_caption(findings, rng, cfg: PhantomConfig) -> tuple[str, list[str]]:
    """(caption, labels it states); a share cfg.base_prior is as wrong as a reference."""
    believed = misremember(findings, rng, cfg) if rng.random() < cfg.base_prior else findings
    return text.caption(believed, rng)[0], labels_of(believed)


def make_study(cfg: PhantomConfig, seed: int, split: str, index: int) -> tuple[np.ndarray, dict, dict]:
    """(image (size, size) uint8, annotation.json row, truth.jsonl row) of one study, by (seed, split, index) alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    masks: dict = {"": np.zeros(1)}
    while not all(mask.any() for mask in masks.values()):  # about one film in 10,000 hides a finding: drawn again
        findings = sample_findings(rng, cfg)
        image, masks = render(findings, rng, cfg.image_size)
    write = write_caption if split == "base" else partial(write_report, noisy=split != "expert")
    report, stated = write(findings, rng, cfg)
    name = f"{split}{index:05d}"
    row = {"id": name, "report": report, "image_path": [f"{name}/0.png"], "split": split}
    shown = [{"label": f.label} | asdict(f) | {"mask": encode_mask(masks[f.label])} for f in findings]
    return image, row, {"id": name, "split": split, "labels": labels_of(findings), "findings": shown, "stated": stated}


def counterfactuals(cfg: PhantomConfig, seed: int, index: int) -> tuple[str, str, list[str], list[np.ndarray]]:
    """(cause, guess, labels, images) number `index` of prior spill: the language priors take turns, and a study of no
    split that has both of a prior's findings is filmed three times, with the same random numbers: as it is, without
    the guess, without both. ValueError where the rates let no such study come about.
    """
    _, cause, guess = list(PRIORS)[index % len(PRIORS)]
    rng = np.random.default_rng([seed, len(SPLITS), index])
    for _ in range(DRAWS):
        labels = labels_of(findings := sample_findings(rng, cfg))
        if {cause, guess} <= set(labels):
            drawn = int(rng.integers(2**32))
            films = [render(findings, np.random.default_rng(drawn), cfg.image_size, without)
                     for without in ((), (guess,), (cause, guess))]  # fmt: skip
            if all(mask.any() for _, masks in films for mask in masks.values()):
                return cause, guess, labels, [image for image, _ in films]
    raise ValueError(f"phantom: no study has both {cause} and {guess}: change their rates")


def build(recipe: Recipe, folder: Path) -> None:
    """Write the data set in R2Gen's layout with truth.jsonl and a contact sheet of test studies; print how wrong the
    references (sft, train, val, test) are. ValueError, see `sample_findings`."""
    annotation, truths, shown = {}, [], []
    jobs = [(split, index) for split in SPLITS for index in range(getattr(recipe.data, split))]
    for split, index in tqdm(jobs, desc="phantom studies", unit="study"):
        image, row, truth = study = make_study(recipe.data, recipe.seed, split, index)
        path = folder / "images" / row["image_path"][0]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, compress_level=1)
        annotation.setdefault(split, []).append(row)
        truths.append(truth)
        if split == "test" and index < 12:
            shown.append(study)
    (folder / "annotation.json").write_text(json.dumps(annotation, indent=1), encoding="utf-8")
    (folder / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truths), encoding="utf-8")
    contact_sheet(shown, folder / "contact_sheet.png")
    rates = noise_rates([row for row in truths if row["split"] in SPLITS[2:]])
    print("phantom references: " + ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items()))


def build_clean(recipe: Recipe, folder: Path) -> None:
    """The data set again with the images of `data`, but complete and true references in split `train`."""
    data, truth = folder.with_name("data"), read_truth(folder.with_name("data"))
    annotation = read_json(data / "annotation.json")
    for i, row in enumerate(annotation["train"]):
        rng = np.random.default_rng([recipe.seed, SPLITS.index("train"), i, 1])
        row["report"], _ = write_report(truth[row["id"]], rng, recipe.data, noisy=False)
    (folder / "annotation.json").write_text(json.dumps(annotation, indent=1), encoding="utf-8")
    shutil.copyfile(data / "truth.jsonl", folder / "truth.jsonl")
    (folder / "images").symlink_to(Path("..") / "data" / "images")


def read_truth(folder: Path) -> dict[str, list[Finding]]:
    """{id: the findings that its image shows} of a phantom's data set."""
    keys, rows = [field.name for field in fields(Finding)], read_jsonl(folder / "truth.jsonl")
    return {row["id"]: [Finding(*(shown[key] for key in keys)) for shown in row["findings"]] for row in rows}


def noise_rates(truths: list[dict]) -> dict[str, float]:
    """From truth.jsonl's rows: the shares of what is stated that is not in the image, and of that which is not stated.

    Also each language prior's rate: P(guess stated | cause in the image and stated, guess not in the image).
    """
    pairs = [(set(row["labels"]), set(row["stated"])) for row in truths]
    false = {"hallucinated": [label not in true for true, stated in pairs for label in stated],
             "omitted": [label not in stated for true, stated in pairs for label in true]}  # fmt: skip
    for field, cause, guess in PRIORS:
        false.setdefault(field, []).extend(guess in s for t, s in pairs if cause in t & s and guess not in t)
    return {name: sum(which) / max(len(which), 1) for name, which in false.items()}
