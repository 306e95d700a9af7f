"""Procedural frontal chest radiographs: varying anatomy, drawn findings, and each finding's exact pixel mask.

Coordinates are the patient's: x, y in [-1, 1] across the film, y downwards. As on a real frontal film the patient
faces us, so the image's left half (x < 0) is the patient's right side. `out` is the distance from the midline towards
the chest wall, `out = x` on the patient's left and `-x` on the right; one pixel of a 64-pixel film is 0.031 wide.
"""

import json
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from phantom.findings import SEVERITIES, Finding

SIGN = {"left": 1.0, "right": -1.0}
ZONE_Y = {"upper": -0.36, "mid": -0.02, "lower": 0.30}
TEXTURE = 9  # coarse random values along each axis; bilinear in between


def _level(finding: Finding, *values: float) -> float:
    """The one of three values that belongs to the finding's severity, mildest first."""
    return values[SEVERITIES[finding.name].index(finding.severity)]


def _edge(distance, width: float):
    """Soft step: 0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def _blob(film, x0: float, y0: float, rx: float, ry: float):
    """Squared elliptical distance from (x0, y0), 1 on the ellipse."""
    return ((film.x - x0) / rx) ** 2 + ((film.y - y0) / ry) ** 2


def _texture(film, rng, amplitude: float):
    """Smooth random field (size, size) of standard deviation about `amplitude`."""
    coarse = rng.standard_normal((TEXTURE, TEXTURE), dtype=np.float32) * (1.4 * amplitude)
    return film.upsample @ coarse @ film.upsample.T


def _blend(film, weight, target: float) -> None:
    """Move the film towards intensity `target` where `weight` (size, size) in [0, 1] is large."""
    film.image += weight * (target - film.image)


def _expose(rng, size: int) -> SimpleNamespace:
    """An empty film in the patient's coordinates, who stands a little rotated, shifted and scaled at the detector."""
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)  # of the pixels' centres
    place = (axis + 1) / 2 * (TEXTURE - 1)
    angle, scale = rng.uniform(-0.07, 0.07), rng.uniform(0.92, 1.06)
    dx, dy = rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
    cos, sin, x, y = np.cos(angle) / scale, np.sin(angle) / scale, axis[None, :] - dx, axis[:, None] - dy
    return SimpleNamespace(
        x=(cos * x + sin * y).astype(np.float32),  # (size, size), as all of a film
        y=(-sin * x + cos * y).astype(np.float32),
        upsample=np.clip(1 - np.abs(place[:, None] - np.arange(TEXTURE)), 0, 1).astype(np.float32),  # (size, TEXTURE)
    )


def _lungs(film, findings, rng) -> None:
    """Both lungs: their outline, the domes of the diaphragm below, and how much of each pixel is lung."""
    film.rx, film.ry = rng.uniform(0.31, 0.36), rng.uniform(0.92, 1.04)
    base, slant = rng.uniform(0.56, 0.68), rng.uniform(0.03, 0.09)
    raised = {f.side: _level(f, 0.15, 0.20, 0.25) for f in findings if f.name == "atelectasis"}
    film.out, film.outline, film.dome, film.lung, film.base = {}, {}, {}, {}, {}
    for side, sign in SIGN.items():
        out = film.out[side] = sign * film.x
        centre = 0.38 + slant * film.y
        film.outline[side] = ((out - centre) / film.rx) ** 2 + ((film.y - 0.25) / film.ry) ** 2
        lift = raised.get(side, 0.0) + (0.04 if side == "right" else 0.0) + rng.uniform(-0.02, 0.02)
        film.base[side] = base - lift
        film.dome[side] = base - lift - 0.15 * (1 - ((out - 0.34) / 0.38) ** 2)
        film.lung[side] = _edge(1 - film.outline[side], 0.18) * _edge(film.dome[side] - film.y, 0.05)


def _anatomy(film, findings, rng) -> dict:
    """Draw the chest of a patient; returns the heart's mask under "cardiomegaly" where the heart is enlarged."""
    enlarged = next((f for f in findings if f.name == "cardiomegaly"), None)
    _lungs(film, findings, rng)
    lung = film.lung["left"] + film.lung["right"]
    distance = np.abs(film.x)
    shoulder = np.minimum(0.93 - distance, (film.y + 1.0) - 0.55 * np.maximum(distance - 0.22, 0))
    film.image = 0.03 + rng.uniform(0.46, 0.54) * _edge(shoulder, 0.12)
    film.image += 0.16 * _edge(film.y - np.where(film.x > 0, film.dome["left"], film.dome["right"]), 0.06)
    film.image *= 1 - rng.uniform(0.62, 0.74) * lung
    ribs = np.cos((film.y - 0.30 * distance + 0.55 * distance**2) * (2 * np.pi / 0.23) + rng.uniform(0, 6.28))
    film.image += np.maximum(ribs, 0) * lung * rng.uniform(0.05, 0.09) + _texture(film, rng, 0.022)
    hila = np.exp(-_blob(film, 0.20, 0.02, 0.12, 0.20)) + np.exp(-_blob(film, -0.20, 0.02, 0.12, 0.20))
    film.image += rng.uniform(0.08, 0.14) * hila
    clavicles = _edge(0.035 - np.abs(film.y + 0.60 + 0.14 * distance), 0.05) * _edge(distance - 0.10, 0.05)
    film.image += 0.11 * clavicles
    normal, *large = (rng.uniform(*range_) for range_ in ((0.27, 0.32), (0.40, 0.43), (0.43, 0.47), (0.47, 0.52)))
    width = _level(enlarged, *large) if enlarged else normal
    heart_x = 0.09 + 0.10 * (width - 0.28) + rng.uniform(-0.02, 0.02)
    tilt = 0.35 * (film.y - 0.34)
    heart = ((film.x - heart_x - tilt) / width) ** 2 + ((film.y - 0.34) / (0.27 + 0.25 * (width - 0.28))) ** 2
    column = _edge(0.10 - distance + 0.03 * film.y, 0.08) * _edge(film.y + 0.95, 0.2)
    knob = _edge(1 - _blob(film, 0.13, -0.26, 0.10, 0.12), 0.7)
    shadow = np.maximum(np.maximum(_edge(1 - heart, 0.35), 0.95 * knob), column)
    _blend(film, 0.9 * shadow, rng.uniform(0.60, 0.68))
    film.image += 0.05 * _edge(0.05 - distance, 0.04)
    return {"cardiomegaly": heart < 1} if enlarged else {}


def _edema(film, finding, rng):
    """Haze around both hila, fading outwards like a bat's wings."""
    y0, ry = rng.uniform(-0.05, 0.05), rng.uniform(0.34, 0.42)
    distance = np.minimum(_blob(film, 0.28, y0, 0.26, ry), _blob(film, -0.28, y0, 0.26, ry))
    lung = film.lung["left"] + film.lung["right"]
    haze = np.exp(-(distance**2) * 0.5) * (0.35 + 0.65 * lung)
    _blend(film, np.clip(haze * _level(finding, 0.34, 0.46, 0.58) * (1 + _texture(film, rng, 0.25)), 0, 1), 0.80)
    return (haze > 0.45) & (lung > 0.5)


def _effusion(film, finding, rng):
    """Fluid at the base with a meniscus that climbs the chest wall."""
    depth = _level(finding, 0.15, 0.30, 0.50) + rng.uniform(-0.02, 0.02)
    out, rise = film.out[finding.side], rng.uniform(0.10, 0.18)
    level = film.base[finding.side] - depth - rise * np.clip((out - 0.20) / 0.40, 0, 1.4) ** 2
    # the fluid also hides the dome under it, so the blunted angle reads as one bright area
    fluid = _edge(film.y - level, 0.06) * _edge(1 - film.outline[finding.side], 0.15) * _edge(out - 0.10, 0.06)
    _blend(film, 0.92 * fluid, rng.uniform(0.72, 0.80))
    return (fluid > 0.5) & (film.y < film.base[finding.side] + 0.08)


def _pneumothorax(film, finding, rng):
    """Air between lung and chest wall: a dark rim without markings, and the bright line of the pleura."""
    gap = _level(finding, 0.13, 0.19, 0.26) + rng.uniform(-0.01, 0.01)
    out = film.out[finding.side]
    top = 0.25 - film.ry + 1.5 * gap  # the collapsed lung is lower and narrower
    inner = ((out - 0.36 + gap * 0.8) / (film.rx - gap * 0.35)) ** 2
    inner += (np.minimum(film.y - 0.35, 0) / (0.35 - top)) ** 2
    space = film.lung[finding.side] * _edge(inner - 1, 0.2) * _edge(out - 0.12, 0.08)
    _blend(film, 0.9 * space, 0.03)
    line = _edge(0.30 - np.abs(inner - 1), 0.25) * film.lung[finding.side] * _edge(out - 0.16, 0.05)
    _blend(film, 0.75 * line, 0.72)
    return (space + line) > 0.5


def _consolidation(film, finding, rng):
    """A fuzzy bright patch in one zone."""
    x0 = SIGN[finding.side] * rng.uniform(0.36, 0.46)
    y0 = min(ZONE_Y[finding.site] + rng.uniform(-0.04, 0.04), film.base[finding.side] - 0.30)  # above the dome
    distance = _blob(film, x0, y0, rng.uniform(0.20, 0.26), rng.uniform(0.17, 0.22))
    patch = np.clip(1.45 - distance + _texture(film, rng, 0.35), 0, 1) * (distance < 2.2)
    patch = patch * np.maximum(film.lung[finding.side], 0.25)
    _blend(film, _level(finding, 0.62, 0.76, 0.88) * patch, 0.86)
    return patch > 0.5


def _atelectasis(film, finding, rng):
    """Bright bands above a raised diaphragm (`_lungs` has raised it)."""
    out, tilt = film.out[finding.side], rng.uniform(-0.12, 0.20)
    height = film.base[finding.side] - film.fluid.get(finding.side, 0.0) - 0.26 + tilt * (out - 0.40)
    wide = _edge(out - 0.18, 0.06) * _edge(0.66 - out, 0.06)
    band = _edge(0.030 - np.abs(film.y - height), 0.03)
    band = np.maximum(band, _edge(0.022 - np.abs(film.y - height - 0.13), 0.03)) * wide
    _blend(film, _level(finding, 0.70, 0.80, 0.90) * band, 0.95)
    return band > 0.5


def _lesion(film, finding, rng):
    """A round nodule with a sharp border."""
    radius = _level(finding, 0.085, 0.11, 0.14) + rng.uniform(-0.005, 0.01)
    x0 = SIGN[finding.side] * rng.uniform(0.34, 0.50)
    y0 = min(ZONE_Y[finding.site] + rng.uniform(-0.08, 0.05), film.base[finding.side] - 0.28)
    distance = _blob(film, x0, y0, radius, radius)
    _blend(film, 0.85 * _edge(1.2 - distance, 0.5), 0.95)
    return distance < 1.2


def _fracture(film, finding, rng):
    """A lateral rib in two bright pieces with a step and a dark gap between them."""
    step = _level(finding, 0.07, 0.10, 0.13)
    y0 = ZONE_Y[finding.site] * 0.8 + 0.02 + rng.uniform(-0.05, 0.05)
    reach = film.rx * np.sqrt(max(0.0, 1 - ((y0 - 0.25) / film.ry) ** 2))
    along = film.out[finding.side] - (0.38 + 0.06 * y0 + reach) - rng.uniform(-0.02, 0.02)
    height = film.y - y0 - 0.35 * along
    inner = _edge(0.045 - np.abs(height - step / 2), 0.03) * _edge(-along, 0.03) * _edge(along + 0.20, 0.04)
    outer = _edge(0.045 - np.abs(height + step / 2), 0.03) * _edge(along, 0.03) * _edge(0.20 - along, 0.04)
    gap = _edge(0.025 - np.abs(along), 0.02) * _edge(0.13 - np.abs(height), 0.04)
    _blend(film, 0.85 * np.maximum(inner, outer), 1.0)
    _blend(film, 0.80 * gap, 0.05)
    return (inner + outer + gap) > 0.5


def _stroke(film, points, width: float):
    """Soft polyline through `points` [(x, y), ...] of half-width `width`."""
    line = np.zeros_like(film.x)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((film.x - x0) * dx + (film.y - y0) * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
        distance = np.sqrt((film.x - x0 - t * dx) ** 2 + (film.y - y0 - t * dy) ** 2)
        line = np.maximum(line, _edge(width - distance, 0.03))
    return line


def _device(film, finding, rng):
    """A pacemaker's box with a lead into the heart, or a central venous catheter."""
    shift = rng.uniform(-0.03, 0.03)
    if finding.site == "pacemaker":
        x0, y0 = 0.56 + shift, -0.52 + rng.uniform(-0.04, 0.04)
        box = np.minimum(0.12 - np.abs(film.x - x0), 0.09 - np.abs(film.y - y0))
        lead = _stroke(film, [(x0 - 0.1, y0), (0.10, -0.55 + shift), (-0.06, -0.1), (0.16 + shift, 0.42)], 0.028)
        drawn = np.maximum(_edge(box, 0.03), lead)
    else:
        drawn = _stroke(film, [(-0.34 + shift, -0.92), (-0.24, -0.62), (-0.10, -0.45), (-0.12, 0.06 + shift)], 0.034)
    _blend(film, 0.9 * drawn, 1.0)
    return drawn > 0.5


# in the order of drawing: what is drawn later covers what is drawn earlier
PAINTERS = {"edema": _edema, "pneumothorax": _pneumothorax, "consolidation": _consolidation, "effusion": _effusion,
            "atelectasis": _atelectasis, "lesion": _lesion, "fracture": _fracture, "device": _device}  # fmt: skip


def render(findings: list[Finding], rng: np.random.Generator, size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw a study: ((size, size) uint8 image, {label: (size, size) bool mask}), one mask per finding.

    A finding may, rarely, end without a pixel of its own (air under fluid, a site off the film): callers draw again.
    """
    film = _expose(rng, size)
    film.fluid = {f.side: _level(f, 0.08, 0.22, 0.36) for f in findings if f.name == "effusion"}
    masks = _anatomy(film, findings, rng)
    for name, paint in PAINTERS.items():
        for finding in findings:
            if finding.name == name:
                masks[finding.label] = paint(film, finding, rng)
    for side in SIGN:  # air above fluid: what the fluid covers shows no air
        if {f"pneumothorax_{side}", f"effusion_{side}"} <= masks.keys():
            masks[f"pneumothorax_{side}"] &= ~masks[f"effusion_{side}"]
    contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.06, 0.06)
    image = (film.image - 0.45) * contrast + 0.45 + brightness
    image += rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.02, 0.045)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), masks


def encode_mask(mask: np.ndarray) -> dict:
    """(H, W) bool -> COCO's uncompressed RLE: lengths of runs of 0, 1, 0, ... down the columns."""
    starts = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))  # of every run but the first, of zeros
    return {"size": list(mask.shape), "counts": np.diff(starts, prepend=0, append=mask.size).tolist()}


def decode_mask(rle: dict) -> np.ndarray:
    """Inverse of encode_mask."""
    values = np.arange(len(rle["counts"])) % 2 == 1
    return np.repeat(values, rle["counts"]).reshape(rle["size"], order="F")


def contact_sheet(folder: Path, path: Path, n: int = 12) -> None:
    """Save a PNG of the first n test studies of a built data set: image, outlined findings and reference report.

    A label in the image is printed in its outline's colour, one only stated as "not in the image", in grey.
    """
    rows = json.loads((folder / "annotation.json").read_text(encoding="utf-8")).get("test", [])[:n]
    truth = [json.loads(line) for line in (folder / "truth.jsonl").read_text(encoding="utf-8").splitlines()]
    truth = [row for row in truth if row["split"] == "test"]
    height = max(1, -(-len(rows) // 4))
    figure = Figure(figsize=(15, 5.4 * height))
    axes = figure.subplots(height, 4, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, row, study in zip(axes, rows, truth, strict=False):
        image = np.asarray(Image.open(folder / "images" / row["image_path"][0]))
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        names = [(f["label"], f"C{i}") for i, f in enumerate(study["findings"])]
        for finding, (_, colour) in zip(study["findings"], names, strict=True):
            axis.contour(decode_mask(finding["mask"]), levels=[0.5], colors=[colour], linewidths=1.2)
        names += [(f"{label}: not in the image", "grey") for label in study["stated"] if label not in study["labels"]]
        for i, (name, colour) in enumerate(names or [("no finding", "C2")]):
            axis.text(0, -1.5 - 3.2 * i, name.replace("_", " "), color=colour, fontsize=10)
        sections = row["report"].replace(" IMPRESSION:", "\nIMPRESSION:").split("\n")
        text = "\n".join(textwrap.fill(section, 49) for section in sections)
        axis.text(0, len(image) + 1, text, fontsize=8.5, va="top")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.11, hspace=0.68, wspace=0.06)
    figure.savefig(path, dpi=90)
