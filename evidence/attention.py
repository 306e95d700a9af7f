"""Where a policy looks while it writes a finding: the paper's Figure 5, and beside it a number.

    python -m evidence.attention --run runs/phantom        # every stage -> <run>/attention/attention.md, .json, .png
    python -m evidence.attention --run R --also phantom:base_pooled    # and another base
    python evaluate.py --image X.png --attention OUT.png   # any policy, any image: a panel a sentence

Its greedy report is read once more by a plan that keeps its attention weights (vlm/attention.Recording). A word's map:
what the tokens that write it look at in the image, mean over layers and heads. The *share* of a finding that the report
rightly states is its words' mean attention inside the finding's mask, over the mean of the whole image: 1 = chance. A
policy that looks where such findings mostly are has more than 1 too. So it is held against the mask's mirror image
(findings with a side), and against the masks of other studies with the same label. Intervals: bootstrap over studies.
"""

import math
import textwrap
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config
from data import load_studies, read_views
from evidence.generate import batches
from evidence.inputs import begin, find_policies
from evidence.metrics import divide, measured, resample
from evidence.phrases import mark_report, sentence_spans
from evidence.tables import draw, write_json
from model import completion_logps, get_base, load_policy, sampling_rules
from phantom.assets import resolve
from phantom.image import read_masks
from rollout import EVALUATION, rollout
from running import parallel
from running.folder import write_text
from vlm.attention import Recording, pack

RESAMPLES = 2000
SHOWN = 3  # studies in the picture
SCALE = 2  # the colours go from 2 halvings to 2 doublings of an even share
# of `summarise`'s sums
RATIOS = {name: lambda sums, i=2 * i: divide(sums[..., i], sums[..., i + 1])
          for i, name in enumerate(("share", "own / others'", "own / mirrored"))}  # fmt: skip


@dataclass
class AttentionRun(Config):
    policy: str = ""  # as in evaluate.py: base, names of folders inside the run, or adapter folders [ours]
    split: str = ""  # split whose reports are looked at; empty = data.test_split [ours]
    also: str = ""  # another base, as in model.path, in the last row and column [ours]


class Look(NamedTuple):
    """A greedy report: its raw text, where in it each of the T tokens begins (and the last ends), maps (L, T, h, w) of
    the weight that layer l gives each patch while token t is written, and the picture (H, W) in which they lie."""

    text: str
    places: list[int]
    maps: np.ndarray
    picture: np.ndarray

    def during(self, start: int, end: int) -> list[int]:
        """The tokens that write text[start:end]."""
        spans = enumerate(zip(self.places, self.places[1:], strict=False))
        return [t for t, (first, last) in spans if first < end and last > start]


@torch.no_grad()
def look(model, processor, images: list, cfg: Config, ids: list[str]) -> list[Look]:
    """Write a greedy report of each image and record where the model looks. ValueError for a study of two images."""
    out, texts, inputs = rollout(model, processor, images, ids, cfg, EVALUATION, samples=0)
    base, decode = get_base(model), processor.tokenizer.decode
    if len(inputs["image_counts"]) < inputs["image_counts"].sum():
        raise ValueError("attention is drawn over one image: set data.views = 1")
    plan = pack(inputs["attention_mask"], out.completion_mask, base.dtype, Recording)
    completion_logps(model, inputs, out.completions, out.completion_mask, sampling_rules(model, processor, cfg), plan)
    weights, looks = torch.stack(plan.weights), []  # (L, B, 1 + S, P)
    first = inputs["attention_mask"].shape[1] - 1  # the row of `outputs` that is recorded first
    for i, [text] in enumerate(texts):
        tokens = out.completions[i, : int(out.completion_mask[i].sum() - out.finished[i].long())].tolist()
        rows = (plan.outputs[i, 0, : len(tokens)] - first).cpu()  # (T,)
        patches = (inputs["input_ids"][i] == base.config.image_token_id).nonzero()[:, 0].cpu()  # (image tokens,)
        height = width = math.isqrt(len(patches))  # LLaVA: a square, which may follow a class token
        if "image_grid_thw" in inputs:
            height, width = (inputs["image_grid_thw"][i, 1:] // base.model.visual.spatial_merge_size).tolist()
        maps = weights[:, i][:, rows][:, :, patches[-height * width :]].unflatten(-1, (height, width))
        places = [len(decode(tokens[:n], skip_special_tokens=True)) for n in range(len(tokens) + 1)]
        pixels = None if "image_grid_thw" in inputs else inputs["pixel_values"][i].mean(dim=0).float().cpu()  # (H, W)
        picture = np.asarray(images[i][0].convert("L") if pixels is None else pixels)
        looks.append(Look(text, places, maps.float().numpy(), picture))
    return looks


def share(weights: np.ndarray, mask: np.ndarray) -> float:
    """Mean weight of the patches (h, w) over the pixels inside a mask (H, W), relative to all pixels': 1 = chance."""
    rows, columns = (np.arange(n) * k // n for n, k in zip(mask.shape, weights.shape, strict=True))
    pixels = weights[rows][:, columns]  # (H, W)
    return float(pixels[mask].mean() / pixels.mean())


def measure(looks: dict[str, Look], masks: dict[str, dict[str, np.ndarray]]) -> list[dict]:
    """A row for each finding that a report rightly states, with its side: the shares of its mask and of the controls.

    looks: by study; masks: by study and label (H, W), of all that the image shows.
    """
    rows = []
    for study, seen in looks.items():
        words: dict[str, list[int]] = {}
        for phrase in mark_report(seen.text, [*masks[study]])[0]:
            for label in masks[study].keys() & set(phrase.labels) if phrase.mark == "right" else ():
                words.setdefault(label, []).extend(seen.during(phrase.start, phrase.end))
        for label, tokens in sorted(words.items()):
            layers, own = seen.maps[:, tokens].mean(axis=1), masks[study][label]  # (L, h, w), (H, W)
            mean, others = layers.mean(axis=0), [m[label] for s, m in masks.items() if s != study and label in m]
            rows.append({"id": study, "label": label, "tokens": tokens, "own": share(mean, own),
                         "others": float(np.mean([share(mean, mask) for mask in others])) if others else None,
                         "mirrored": share(mean, own[:, ::-1]) if "_" in label else None,
                         "layers": [share(layer, own) for layer in layers]})  # fmt: skip
    return rows


def summarise(rows: list[dict], seed: int) -> dict:
    """{"findings", "studies", "layers": share by layer, each of RATIOS: {"value", "lo", "hi"}} of `measure`'s rows."""
    sums: dict[str, np.ndarray] = {}
    for row in rows:
        pairs = [(row["own"], row[other]) if row[other] is not None else (0, 0) for other in ("others", "mirrored")]
        sums[row["id"]] = sums.get(row["id"], 0) + np.array([row["own"], 1, *pairs[0], *pairs[1]], dtype=float)
    found = {"findings": len(rows), "studies": len(sums)}
    if rows:
        found["layers"] = np.mean([row["layers"] for row in rows], axis=0).tolist()
        table = np.stack([*sums.values()])  # (studies, 6)
        drawn = resample({"": table}, RESAMPLES, np.random.default_rng(seed))[""]
        found |= {name: measured(ratio, table.sum(0), drawn) for name, ratio in RATIOS.items()}
    return found


def markdown(found: dict[str, dict], what: str) -> str:
    """attention.md: a row for each policy."""

    def cell(entry: dict | None) -> str:
        return "n/a" if not entry or math.isnan(entry["value"]) else "{value:.2f} [{lo:.2f}, {hi:.2f}]".format(**entry)

    body = [[name, f"{row['findings']} ({row['studies']})", *(cell(row.get(ratio)) for ratio in RATIOS),
             " ".join(f"{value:.2f}" for value in row.get("layers", []))] for name, row in found.items()]  # fmt: skip
    notes = ("share: attention inside the mask of a rightly stated finding while its words are written, in even shares "
             "(1 = chance). others': the same label's masks in other studies. mirrored: findings with a side alone. "
             "95% intervals, bootstrap over studies.")  # fmt: skip
    heads = ["", "findings (studies)", *RATIOS, "share by layer"]
    return f"{what}\n\n{draw(heads, body, 'pipe')}\n\n{notes}\n"


def draw_panels(panels: list[list[tuple]], size: tuple[float, float], path: Path, note: str = "") -> None:
    """Write rows of panels of that size in inches, (a Look, its tokens, title, a mask to outline or None) each, below a
    note: the picture in grey; over it, orange where a patch gets more than an even share of attention, purple: less."""
    from matplotlib.cm import ScalarMappable  # a second of every script's start
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    height, width, ticks = len(panels), max(map(len, panels)), range(-SCALE, SCALE + 1)
    figure = Figure(figsize=(size[0] * width + 1, size[1] * height), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (seen, tokens, title, mask) in zip(axes.flat, chain(*panels), strict=False):
        weights, (h, w) = seen.maps[:, tokens].mean(axis=(0, 1)), seen.picture.shape
        doublings = np.log2(np.maximum(weights / weights.mean(), 2.0**-SCALE))  # (rows, columns) of patches
        axis.imshow(seen.picture, cmap="gray", interpolation="nearest")
        strength = 0.7 * np.minimum(np.abs(doublings), 1)  # a patch with its even share stays as it is
        axis.imshow(doublings, "PuOr_r", vmin=-SCALE, vmax=SCALE, alpha=strength, interpolation="nearest",
                    extent=(-0.5, w - 0.5, h - 0.5, -0.5))  # fmt: skip
        axis.set_title(title, fontsize=8)
        if mask is not None:
            axis.contour(mask, levels=[0.5], colors=["#56B4E9"], linewidths=1.2)
    figure.suptitle(note, fontsize=9)
    bar = figure.colorbar(ScalarMappable(Normalize(-SCALE, SCALE), "PuOr_r"), ax=axes, shrink=0.8, aspect=30)
    bar.set_ticks(ticks, labels=[f"{2.0**tick:g}" for tick in ticks])
    bar.set_label("attention, in even shares", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_image(model, processor, image, cfg: Config, path: Path) -> None:
    """Write a picture of where the policy looks while it writes each sentence of its report of an image."""
    [seen] = look(model, processor, [[image]], cfg, [cfg.image])
    spans = sentence_spans(seen.text)
    if not spans:
        raise ValueError(f"--attention: the report of {cfg.image} has no sentence")
    panels = [(seen, seen.during(*span), textwrap.fill(seen.text[slice(*span)], 32), None) for span in spans]
    draw_panels([panels[i : i + 4] for i in range(0, len(panels), 4)], (2.3, 2.7), path)


def draw_studies(looks: dict[str, dict[str, Look]], rows: dict[str, list[dict]], masks: dict, path: Path,
                 note: str) -> None:  # fmt: skip
    """A column for each policy, a row for each of the first SHOWN studies of which all policies rightly state some
    finding with a side: the one with the smallest mask, outlined. Nothing is drawn where there is no such study."""
    stated = {name: {(row["id"], row["label"]): row for row in found} for name, found in rows.items()}
    sided = sorted((study, masks[study][label].sum(), label)
                   for study, label in set.intersection(*map(set, stated.values())) if "_" in label)  # fmt: skip
    smallest, panels = {study: label for study, _, label in reversed(sided)}, []
    for study, label in sorted(smallest.items())[:SHOWN]:
        panels.append([])
        for name, found in stated.items():
            row, where = found[study, label], "" if panels[-1] else f"{study}, {label.replace('_', ' ')}"
            title = f"{where}\n{name.replace('_', ' ')}: {row['own']:.2f}"
            panels[-1].append((looks[name][study], row["tokens"], title, masks[study][label]))
    if panels:
        draw_panels(panels, (2, 2.2), path, note)


def measure_run(cfg: AttentionRun) -> None:
    """Measure and draw the chosen policies of a run; ValueError for data without masks."""
    given, also, cfg = cfg, Path(cfg.also.removeprefix("phantom:")).name, resolve(cfg, ("data", "base"))
    policies = {name: (cfg, adapter) for name, adapter in find_policies(Path(cfg.run), cfg.policy).items()}
    if also in policies:
        raise ValueError(f"--also {cfg.also}: {also} is the name of a policy already")
    if also:
        other = replace(given, model=replace(given.model, path=cfg.also))
        policies[also] = (resolve(other, ("data", "base")), None)
        load_policy(*policies[also])  # before the others take their minutes
    studies = load_studies(cfg.data, cfg.split or cfg.data.test_split)
    advice = "only the phantom knows its findings' masks"
    masks = read_masks(Path(cfg.data.path), [study.id for study in studies], advice)
    looks: dict[str, dict[str, Look]] = {}
    for name, of in policies.items():
        (model, processor), looks[name] = load_policy(*of), {}
        for some in batches(studies, cfg.eval.batch_size, name):
            ids, views = [study.id for study in some], [read_views(study) for study in some]
            looks[name] |= zip(ids, look(model, processor, views, cfg, ids), strict=True)
    rows, folder = {name: measure(seen, masks) for name, seen in looks.items()}, Path(cfg.run) / "attention"
    found = {name: summarise(row, cfg.seed) for name, row in rows.items()}
    text = markdown(found, f"{len(studies)} studies, {studies[0].split}, greedy reports")
    write_text(folder / "attention.md", text)
    write_json(folder / "attention.json", {"policies": found, "findings": rows})
    ratio = "own / others'"
    told = ", ".join(f"{name} {row[ratio]['value']:.2f}" for name, row in found.items() if row["findings"])
    note = f"own mask / the label's masks in other studies, all findings (1 = does not look for it): {told}"
    draw_studies(looks, rows, masks, folder / "attention.png", note)
    print(f"\n{text}\nwritten: {folder}/attention.md, .json, .png")


@parallel.script("attention")
def main() -> None:
    measure_run(begin(AttentionRun(), __doc__))


if __name__ == "__main__":
    main()
