"""The phantom's findings: their names, where they can be, how severe, and the label under which each is known."""

from dataclasses import dataclass

import numpy as np

FINDINGS = ("cardiomegaly", "edema", "device", "effusion", "pneumothorax", "consolidation", "atelectasis", "lesion",
            "fracture")  # fmt: skip
SIDED = FINDINGS[3:]
LABELS = FINDINGS[:3] + tuple(f"{name}_{side}" for name in SIDED for side in ("left", "right"))
# mildest first
SEVERITIES = dict.fromkeys(FINDINGS, ("mild", "moderate", "severe"))
SEVERITIES |= dict.fromkeys(("effusion", "pneumothorax", "lesion"), ("small", "moderate", "large"))
SITES = {name: ("upper", "mid", "lower") for name in ("consolidation", "lesion", "fracture")}
SITES["device"] = ("pacemaker", "catheter")


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

    @property
    def level(self) -> int:
        """The severity as a number, 0 to 2."""
        return SEVERITIES[self.name].index(self.severity)


def finding_of(label: str, rng: np.random.Generator, sites=None) -> Finding:
    """A finding of one of LABELS with random site (of `sites`, by default all that it can have) and severity."""
    name, _, side = label.partition("_")
    sites = sites or SITES.get(name, ("",))
    return Finding(name, side or None, sites[int(rng.integers(len(sites)))], SEVERITIES[name][int(rng.integers(3))])


def labels_of(findings: list[Finding]) -> list[str]:
    """The labels of `findings`, in the order of LABELS."""
    return sorted((f.label for f in findings), key=LABELS.index)
