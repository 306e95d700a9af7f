"""Procedural frontal chest radiographs: varying anatomy, drawn findings, and each finding's exact pixel mask.

Coordinates are the patient's: x, y in [-1, 1] across the film, y downwards. As on a real frontal film the patient
faces us, so the image's left half (x < 0) is the patient's right side. `out` is the distance from the midline towards
the chest wall, `out = x` on the patient's left and `-x` on the right; one pixel of a 64-pixel film is 0.031 wide.
"""

import itertools
import textwrap
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from formats.files import read_jsonl
from phantom.findings import Finding

ZONE_Y = {"upper": -0.36, "mid": -0.02, "lower": 0.30}
TEXTURE = 9  # coarse random values along each axis; bilinear in between
# in this order: what is drawn later covers what is drawn earlier
DRAWN = ("edema", "pneumothorax", "consolidation", "effusion", "atelectasis", "lesion", "fracture", "device")


def _edge(distance, width: float):
    """Soft step: 0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


class Film:
    """A radiograph that is being drawn; arrays are (size, size). The method of a finding's name draws such a finding
    into its half of the chest and returns the bool mask of its pixels."""

    def __init__(self, findings: list[Finding], rng: np.random.Generator, size: int):
        """Where each pixel lies in the patient, who stands a little rotated, shifted and scaled at the detector. Of a
        half of the chest: the lung's `outline` (below 1 inside) and pixels' share of `lung`, the diaphragm's `dome` and
        its lowest point `base`, and how deep the `fluid` is."""
        axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)  # of the pixels' centres
        place, self.rng, self.uniform = (axis + 1) / 2 * (TEXTURE - 1), rng, rng.uniform
        angle, scale = rng.uniform(-0.07, 0.07), rng.uniform(0.92, 1.06)
        dx, dy = rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
        cos, sin, x, y = np.cos(angle) / scale, np.sin(angle) / scale, axis[None, :] - dx, axis[:, None] - dy
        self.x, self.y = (cos * x + sin * y).astype(np.float32), (-sin * x + cos * y).astype(np.float32)
        self.upsample = np.clip(1 - np.abs(place[:, None] - np.arange(TEXTURE)), 0, 1).astype(np.float32)
        self.rx, self.ry = rng.uniform(0.31, 0.36), rng.uniform(0.92, 1.04)
        base, slant = rng.uniform(0.56, 0.68), rng.uniform(0.03, 0.09)
        raised = {f.side: (0.15, 0.20, 0.25)[f.level] for f in findings if f.name == "atelectasis"}
        fluid = {f.side: (0.08, 0.22, 0.36)[f.level] for f in findings if f.name == "effusion"}
        self.halves = {}
        for side, sign in (("left", 1.0), ("right", -1.0)):
            half = self.halves[side] = SimpleNamespace(sign=sign, out=sign * self.x, fluid=fluid.get(side, 0.0))
            half.outline = ((half.out - (0.38 + slant * self.y)) / self.rx) ** 2 + ((self.y - 0.25) / self.ry) ** 2
            half.base = base - (raised.get(side, 0.0) + (0.04 if side == "right" else 0.0) + rng.uniform(-0.02, 0.02))
            half.dome = half.base - 0.15 * (1 - ((half.out - 0.34) / 0.38) ** 2)
            half.lung = _edge(1 - half.outline, 0.18) * _edge(half.dome - self.y, 0.05)
        self.lungs = self.halves["left"].lung + self.halves["right"].lung

    def blob(self, x0: float, y0: float, rx: float, ry: float):
        """Squared elliptical distance from (x0, y0), 1 on the ellipse."""
        return ((self.x - x0) / rx) ** 2 + ((self.y - y0) / ry) ** 2

    def texture(self, amplitude: float):
        """Smooth random field of standard deviation about `amplitude`."""
        coarse = self.rng.standard_normal((TEXTURE, TEXTURE), dtype=np.float32) * (1.4 * amplitude)
        return self.upsample @ coarse @ self.upsample.T

    def blend(self, weight, target: float) -> None:
        """Move the film towards intensity `target` where `weight`, in [0, 1], is large."""
        self.image += weight * (target - self.image)

    def anatomy(self, findings: list[Finding]) -> dict:
        """Draw the chest of a patient; returns the heart's mask under "cardiomegaly" where the heart is enlarged."""
        enlarged, distance = next((f for f in findings if f.name == "cardiomegaly"), None), np.abs(self.x)
        shoulder = np.minimum(0.93 - distance, (self.y + 1.0) - 0.55 * np.maximum(distance - 0.22, 0))
        self.image = 0.03 + self.uniform(0.46, 0.54) * _edge(shoulder, 0.12)
        dome = np.where(self.x > 0, self.halves["left"].dome, self.halves["right"].dome)
        self.image += 0.16 * _edge(self.y - dome, 0.06)
        self.image *= 1 - self.uniform(0.62, 0.74) * self.lungs
        ribs = np.cos((self.y - 0.30 * distance + 0.55 * distance**2) * (2 * np.pi / 0.23) + self.uniform(0, 6.28))
        self.image += np.maximum(ribs, 0) * self.lungs * self.uniform(0.05, 0.09) + self.texture(0.022)
        hila = np.exp(-self.blob(0.20, 0.02, 0.12, 0.20)) + np.exp(-self.blob(-0.20, 0.02, 0.12, 0.20))
        self.image += self.uniform(0.08, 0.14) * hila
        clavicles = _edge(0.035 - np.abs(self.y + 0.60 + 0.14 * distance), 0.05) * _edge(distance - 0.10, 0.05)
        self.image += 0.11 * clavicles
        normal, *large = (self.uniform(*range_) for range_ in ((0.27, 0.32), (0.40, 0.43), (0.43, 0.47), (0.47, 0.52)))
        width = large[enlarged.level] if enlarged else normal
        heart_x = 0.09 + 0.10 * (width - 0.28) + self.uniform(-0.02, 0.02)
        tilt = 0.35 * (self.y - 0.34)
        heart = ((self.x - heart_x - tilt) / width) ** 2 + ((self.y - 0.34) / (0.27 + 0.25 * (width - 0.28))) ** 2
        column = _edge(0.10 - distance + 0.03 * self.y, 0.08) * _edge(self.y + 0.95, 0.2)
        knob = _edge(1 - self.blob(0.13, -0.26, 0.10, 0.12), 0.7)
        self.blend(0.9 * np.maximum(np.maximum(_edge(1 - heart, 0.35), 0.95 * knob), column), self.uniform(0.60, 0.68))
        self.image += 0.05 * _edge(0.05 - distance, 0.04)
        return {"cardiomegaly": heart < 1} if enlarged else {}

    def edema(self, finding, half):
        """Haze around both hila, fading outwards like a bat's wings."""
        y0, ry = self.uniform(-0.05, 0.05), self.uniform(0.34, 0.42)
        distance = np.minimum(self.blob(0.28, y0, 0.26, ry), self.blob(-0.28, y0, 0.26, ry))
        haze = np.exp(-(distance**2) * 0.5) * (0.35 + 0.65 * self.lungs)
        self.blend(np.clip(haze * (0.34, 0.46, 0.58)[finding.level] * (1 + self.texture(0.25)), 0, 1), 0.80)
        return (haze > 0.45) & (self.lungs > 0.5)

    def effusion(self, finding, half):
        """Fluid at the base with a meniscus that climbs the chest wall."""
        depth = (0.15, 0.30, 0.50)[finding.level] + self.uniform(-0.02, 0.02)
        level = half.base - depth - self.uniform(0.10, 0.18) * np.clip((half.out - 0.20) / 0.40, 0, 1.4) ** 2
        # the fluid also hides the dome under it, so the blunted angle reads as one bright area
        fluid = _edge(self.y - level, 0.06) * _edge(1 - half.outline, 0.15) * _edge(half.out - 0.10, 0.06)
        self.blend(0.92 * fluid, self.uniform(0.72, 0.80))
        return (fluid > 0.5) & (self.y < half.base + 0.08)

    def pneumothorax(self, finding, half):
        """Air between lung and chest wall: a dark rim without markings, and the bright line of the pleura."""
        gap = (0.13, 0.19, 0.26)[finding.level] + self.uniform(-0.01, 0.01)
        top = 0.25 - self.ry + 1.5 * gap  # the collapsed lung is lower and narrower
        inner = ((half.out - 0.36 + gap * 0.8) / (self.rx - gap * 0.35)) ** 2
        inner += (np.minimum(self.y - 0.35, 0) / (0.35 - top)) ** 2
        space = half.lung * _edge(inner - 1, 0.2) * _edge(half.out - 0.12, 0.08)
        self.blend(0.9 * space, 0.03)
        line = _edge(0.30 - np.abs(inner - 1), 0.25) * half.lung * _edge(half.out - 0.16, 0.05)
        self.blend(0.75 * line, 0.72)
        return (space + line) > 0.5

    def consolidation(self, finding, half):
        """A fuzzy bright patch in one zone, above the dome."""
        x0 = half.sign * self.uniform(0.36, 0.46)
        y0 = min(ZONE_Y[finding.site] + self.uniform(-0.04, 0.04), half.base - 0.30)
        distance = self.blob(x0, y0, self.uniform(0.20, 0.26), self.uniform(0.17, 0.22))
        patch = np.clip(1.45 - distance + self.texture(0.35), 0, 1) * (distance < 2.2) * np.maximum(half.lung, 0.25)
        self.blend((0.62, 0.76, 0.88)[finding.level] * patch, 0.86)
        return patch > 0.5

    def atelectasis(self, finding, half):
        """Bright bands above a diaphragm that is raised."""
        height = half.base - half.fluid - 0.26 + self.uniform(-0.12, 0.20) * (half.out - 0.40)
        bands = [_edge(0.030 - np.abs(self.y - height), 0.03), _edge(0.022 - np.abs(self.y - height - 0.13), 0.03)]
        band = np.maximum(*bands) * (_edge(half.out - 0.18, 0.06) * _edge(0.66 - half.out, 0.06))
        self.blend((0.70, 0.80, 0.90)[finding.level] * band, 0.95)
        return band > 0.5

    def lesion(self, finding, half):
        """A round nodule with a sharp border."""
        radius = (0.085, 0.11, 0.14)[finding.level] + self.uniform(-0.005, 0.01)
        x0 = half.sign * self.uniform(0.34, 0.50)
        y0 = min(ZONE_Y[finding.site] + self.uniform(-0.08, 0.05), half.base - 0.28)
        distance = self.blob(x0, y0, radius, radius)
        self.blend(0.85 * _edge(1.2 - distance, 0.5), 0.95)
        return distance < 1.2

    def fracture(self, finding, half):
        """A lateral rib in two bright pieces with a step and a dark gap between them."""
        step = (0.07, 0.10, 0.13)[finding.level]
        y0 = ZONE_Y[finding.site] * 0.8 + 0.02 + self.uniform(-0.05, 0.05)
        reach = self.rx * np.sqrt(max(0.0, 1 - ((y0 - 0.25) / self.ry) ** 2))
        along = half.out - (0.38 + 0.06 * y0 + reach) - self.uniform(-0.02, 0.02)
        height = self.y - y0 - 0.35 * along
        inner = _edge(0.045 - np.abs(height - step / 2), 0.03) * _edge(-along, 0.03) * _edge(along + 0.20, 0.04)
        outer = _edge(0.045 - np.abs(height + step / 2), 0.03) * _edge(along, 0.03) * _edge(0.20 - along, 0.04)
        gap = _edge(0.025 - np.abs(along), 0.02) * _edge(0.13 - np.abs(height), 0.04)
        self.blend(0.85 * np.maximum(inner, outer), 1.0)
        self.blend(0.80 * gap, 0.05)
        return (inner + outer + gap) > 0.5

    def device(self, finding, half):
        """A pacemaker's box with a lead into the heart, or a central venous catheter."""
        shift, drawn = self.uniform(-0.03, 0.03), np.zeros_like(self.x)
        if finding.site == "pacemaker":
            x0, y0 = 0.56 + shift, -0.52 + self.uniform(-0.04, 0.04)
            drawn = _edge(np.minimum(0.12 - np.abs(self.x - x0), 0.09 - np.abs(self.y - y0)), 0.03)
            points, width = [(x0 - 0.1, y0), (0.10, -0.55 + shift), (-0.06, -0.1), (0.16 + shift, 0.42)], 0.028
        else:
            points, width = [(-0.34 + shift, -0.92), (-0.24, -0.62), (-0.10, -0.45), (-0.12, 0.06 + shift)], 0.034
        for (x0, y0), (x1, y1) in itertools.pairwise(points):  # a soft line of half-width `width`
            dx, dy = x1 - x0, y1 - y0
            t = np.clip(((self.x - x0) * dx + (self.y - y0) * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
            distance = np.sqrt((self.x - x0 - t * dx) ** 2 + (self.y - y0 - t * dy) ** 2)
            drawn = np.maximum(drawn, _edge(width - distance, 0.03))
        self.blend(0.9 * drawn, 1.0)
        return drawn > 0.5


def render(findings: list[Finding], rng: np.random.Generator, size: int, without: Collection[str] = ()):
    """((size, size) uint8 image, {label: (size, size) bool mask}); rarely, a mask is empty (air under fluid, a site off
    the film), and callers draw again.

    without: labels of `findings` to leave out of the film, which else stays as it is: they use up their random numbers.
    """
    shown = [finding for finding in findings if finding.label not in without]
    film = Film(shown, rng, size)
    masks = film.anatomy(shown)
    for finding in sorted((f for f in findings if f.name in DRAWN), key=lambda f: DRAWN.index(f.name)):
        before = film.image.copy()
        mask = getattr(film, finding.name)(finding, film.halves.get(finding.side))
        if finding in shown:
            masks[finding.label] = mask
        else:
            film.image = before
    for side in film.halves:  # air above fluid: what the fluid covers shows no air
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


def decode_mask(mask: dict) -> np.ndarray:
    """`encode_mask` undone: (H, W) bool."""
    runs = mask["counts"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(mask["size"], order="F")


def read_masks(folder: Path, ids: Collection[str], advice: str) -> dict[str, dict[str, np.ndarray]]:
    """{id: {label: (H, W) bool mask}} of what the images of a data set show; ValueError, which ends with `advice`, for
    one that does not tell."""
    truth = folder / "truth.jsonl"
    found = {row.get("id"): row.get("findings") for row in (read_jsonl(truth) if truth.exists() else ())}
    for study in ids:
        if not isinstance(found.get(study), list):
            raise ValueError(f"{truth} has no masks of study {study}: {advice}")
    return {study: {finding["label"]: decode_mask(finding["mask"]) for finding in found[study]} for study in ids}


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """The lines around an (H, W) bool mask, each (n, 2) points x, y in pixels from the film's upper left corner."""
    from contourpy import contour_generator  # as matplotlib below

    return [line - 0.5 for line in contour_generator(z=np.pad(mask, 1) * 1.0).lines(0.5)]


def contact_sheet(studies: list[tuple[np.ndarray, dict, dict]], path: Path) -> None:
    """Save a PNG of studies, each as world.make_study gives it: image, findings with their outlines, those only stated
    in grey, and the reference report."""
    from matplotlib.figure import Figure  # a second of every script's start

    height = max(1, -(-len(studies) // 4))
    figure = Figure(figsize=(15, 5.4 * height))
    for place, (image, row, truth) in enumerate(studies, 1):
        axis = figure.add_subplot(height, 4, place)
        axis.set_axis_off()
        axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="bicubic")
        for i, finding in enumerate(truth["findings"]):
            axis.contour(decode_mask(finding["mask"]), levels=[0.5], colors=[f"C{i}"], linewidths=1.2)
        names = [(finding["label"], f"C{i}") for i, finding in enumerate(truth["findings"])]
        names += [(f"{label}: not in the image", "grey") for label in truth["stated"] if label not in truth["labels"]]
        for i, (name, colour) in enumerate(names or [("no finding", "C2")]):
            axis.text(0, -1.5 - 3.2 * i, name.replace("_", " "), color=colour, fontsize=10)
        sections = row["report"].replace(" IMPRESSION:", "\nIMPRESSION:").split("\n")
        axis.text(0, len(image) + 1, "\n".join(textwrap.fill(s, 49) for s in sections), fontsize=8.5, va="top")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.11, hspace=0.68, wspace=0.06)
    figure.savefig(path, dpi=90)
