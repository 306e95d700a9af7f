"""The phantom's radiologists: reports and captions in English for a list of findings, by four authors.

A *mention* is what is said about one kind of finding: (name, findings, hedged). Every writer returns its text and
its *facts*, {topic: class} with CheXbert's classes 1 positive, 2 negative, 3 uncertain; a topic is a finding's name
or "silhouette", "opacity" or "pneumonia".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from phantom.world import Finding

NORMAL_TEMPLATE = (
    "FINDINGS: The heart size is normal. The lungs are clear. No pleural effusion or pneumothorax is seen. "
    "The bony thorax is intact. IMPRESSION: No acute cardiopulmonary abnormality."
)
POSITIVE, NEGATIVE, UNCERTAIN = 1, 2, 3
ZONES = {"upper": ("upper lobe", "upper zone"), "mid": ("mid zone", "mid lung"), "lower": ("lower lobe", "lower zone")}
LEVELS = {"upper": ("upper",), "mid": ("middle",), "lower": ("lower",)}
WORDS = {  # how a severity is worded; "" = not at all
    "effusion": {"small": ("small", "trace"), "moderate": ("moderate",), "large": ("large",)},
    "pneumothorax": {"small": ("small",), "moderate": ("moderate",), "large": ("large",)},
    "lesion": {"small": ("small",), "moderate": ("",), "large": ("large",)},
    "consolidation": {"mild": ("subtle", "mild"), "moderate": ("",), "severe": ("dense",)},
    "fracture": {"mild": ("nondisplaced",), "moderate": ("",), "severe": ("displaced",)},
    "device": {"mild": ("",), "moderate": ("",), "severe": ("",)},
}
DEFAULT_WORDS = {"mild": ("mild", "minimal"), "moderate": ("moderate",), "severe": ("severe", "marked")}
# noun phrases; the first of each also serves the impression. {s} = plural for both sides together
NOUNS = {
    "cardiomegaly": ("cardiomegaly", "{sev} cardiomegaly", "{sev} enlargement of the heart",
                     "{sev} cardiac enlargement"),
    "edema": ("pulmonary edema", "{sev} pulmonary edema", "{sev} interstitial edema", "{sev} perihilar edema",
              "{sev} vascular congestion with edema"),
    "effusion": ("{side} pleural effusion{s}", "{sev} {side} pleural effusion{s}", "{sev} {side} effusion{s}",
                 "{sev} {side} pleural fluid collection{s}"),
    "pneumothorax": ("{side} pneumothorax", "{sev} {side} pneumothorax", "{sev} {side} apical pneumothorax"),
    "consolidation": ("{side} {zone} consolidation", "{sev} {side} {zone} consolidation",
                      "{sev} {side} {zone} airspace opacity", "{sev} {side} {zone} patchy opacity"),
    "atelectasis": ("{side} basilar atelectasis", "{sev} {side} basilar atelectasis", "{sev} {side} basal atelectasis",
                    "{sev} linear {side} lower lobe atelectasis"),
    "lesion": ("{side} {zone} nodule{s}", "{sev} {side} {zone} nodule{s}", "{sev} rounded {side} {zone} nodule{s}",
               "{sev} {side} {zone} nodular lesion{s}"),
    "fracture": ("{side} rib fracture{s}", "{sev} {side} {zone} rib fracture{s}",
                 "{sev} {side} lateral rib fracture{s}"),
    "pacemaker": ("pacemaker", "cardiac pacemaker", "pacemaker with its lead in the heart", "pacing device"),
    "catheter": ("central venous catheter", "central line", "central venous catheter with its tip in the vena cava"),
}  # fmt: skip
MASS = ("cardiomegaly", "enlargement", "edema", "atelectasis")  # take no article
PLAIN = (  # how each author states a finding outright; {a} = with article, {np} = without
    ("There {is} {a}.", "There {is} {a}.", "There is evidence of {a}.", "{np} {is} seen."),
    ("{np}.", "{np} noted.", "{np} again seen."),
    ("{np} {is} present.", "{np} {is} seen.", "{np} {is} demonstrated.", "{np} {is} identified."),
    ("There {is} {a}.", "{np} {is} noted.", "{np} {is} visualized.", "The image shows {a}."),
)
HEDGES = (  # and how each hedges
    ("There may be {a}.", "Possible {np}."),
    ("Possible {np}.", "Questionable {np}."),
    ("{np} cannot be excluded.", "{np} {is} suspected.", "{np} {is} likely."),
    ("Findings may represent {a}.", "{np} cannot be excluded.", "Probable {np}.", "Findings suggest {a}."),
)
SPECIAL = {  # sentences that only suit one finding
    "cardiomegaly": ("The heart is {sevly} enlarged.", "The cardiac silhouette is {sevly} enlarged.",
                     "The heart size is enlarged.", "The cardiomediastinal silhouette is enlarged."),
    "edema": ("Perihilar haze is consistent with {sev} pulmonary edema.", "Bilateral haze is due to {sev} edema."),
    "effusion": ("The {side} costophrenic angle is blunted by {a}.", "{np} {is} layering at the base.",
                 "{np} with blunting of the costophrenic angle."),
    "pneumothorax": ("A pleural line is seen with {a}.", "{np} {is} seen with a visible pleural line.",
                     "{np} with partial collapse of the lung."),
    "consolidation": ("{np} may represent pneumonia.", "{np} {is} concerning for pneumonia.",
                      "{np} with air bronchograms."),
    "atelectasis": ("{np} with elevation of the diaphragm.", "{np} with low lung volume."),
    "lesion": ("{np} {is} well circumscribed.", "{np} for which follow up is recommended."),
    "fracture": ("{np} {is} noted along the chest wall.",),
    "device": ("{np} {is} in place.", "{np} {is} in satisfactory position."),
}  # fmt: skip
HEART_NORMAL = ("The heart size is normal.", "The cardiomediastinal silhouette is within normal limits.",
                "Heart size is within normal limits.", "The heart is not enlarged.")  # fmt: skip
LUNGS_CLEAR = ("The lungs are clear.", "Both lungs are clear.", "Lungs are clear.",
               "The lungs are well expanded and clear.")  # fmt: skip
BONES_INTACT = ("The bony thorax is intact.", "No rib fracture.", "No displaced rib fracture is seen.",
                "The osseous structures are intact.")  # fmt: skip
DENIALS = ("No {np} is seen.", "No {np}.", "There is no {np}.", "No evidence of {np}.")
NORMAL_IMPRESSION = ("No acute cardiopulmonary abnormality.", "No acute cardiopulmonary disease.", "Normal chest.",
                     "No acute abnormality.")  # fmt: skip
DENIED_NOUN = {"cardiomegaly": "cardiomegaly", "edema": "pulmonary edema", "device": "support device",
               "effusion": "pleural effusion", "pneumothorax": "pneumothorax", "consolidation": "focal consolidation",
               "atelectasis": "atelectasis", "lesion": "nodule", "fracture": "rib fracture"}  # fmt: skip
ORDER = (("heart", "lungs", "pleura", "bones", "device"), ("device", "lungs", "pleura", "heart", "bones"),
         ("lungs", "pleura", "heart", "device", "bones"), ("heart", "lungs", "pleura", "device", "bones"))  # fmt: skip
TOPICS = {"heart": ("cardiomegaly",), "lungs": ("edema", "consolidation", "atelectasis", "lesion"),
          "pleura": ("effusion", "pneumothorax"), "bones": ("fracture",), "device": ("device",)}  # fmt: skip
HEDGING = (0.4, 0.7, 1.0, 1.9)  # each author's share of hedges, times the configured rate
AUTHORS = len(ORDER)


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _usual(rng, options, author: int):
    """About half the time everybody's stock sentence, else the author's own: normal reports are near copies."""
    return options[0] if rng.random() < 0.45 else options[author]


def _tidy(text: str) -> str:
    """One blank between words, and a capital first letter."""
    text = " ".join(text.split()).replace(" .", ".").replace(" ,", ",")
    return text[:1].upper() + text[1:]


def _facts(text: str, names, cls: int) -> dict:
    """The topics that a sentence about findings `names` settles, all of class `cls`."""
    facts = dict.fromkeys(names, cls)
    if "opacity" in text or "opacities" in text:
        facts["opacity"] = cls
    if "pneumonia" in text:
        facts["pneumonia"] = UNCERTAIN
    if "cardiomediastinal" in text:
        facts["silhouette"] = cls
    return facts


def merge_facts(parts) -> dict:
    """One {topic: class} for several sentences: positive beats uncertain beats negative."""
    merged, rank = {}, {POSITIVE: 3, UNCERTAIN: 2, NEGATIVE: 1}
    for part in parts:
        for topic, cls in part.items():
            if rank[cls] > rank.get(merged.get(topic), 0):
                merged[topic] = cls
    return merged


def mentions(findings: list[Finding], rng, hedge: float) -> list[tuple]:
    """Group findings into mentions: both sides of a kind often become one "bilateral"; each is hedged at a rate.

    Devices are never hedged: a pacemaker is there or it is not.
    """
    groups = {}
    for f in findings:
        groups.setdefault(f.name, []).append(f)
    said = []
    for name, group in groups.items():
        together = len(group) == 1 or rng.random() < 0.6
        for part in [group] if together else [[f] for f in group]:
            said.append((name, part, name != "device" and rng.random() < hedge))
    return said


def noun_phrase(name: str, group: list[Finding], rng, short: bool = False) -> str:
    """ "small left pleural effusion", lower case without article; `short` leaves the severity out."""
    first = group[0]
    patterns = NOUNS[first.site if name == "device" else name]
    same = all(f.severity == first.severity for f in group)
    words = WORDS.get(name, DEFAULT_WORDS)[first.severity] if same and not short else ("",)
    zones = (LEVELS if name == "fracture" else ZONES).get(first.site, ("",))
    if any(f.site != first.site for f in group):
        zones = ("",)
    text = patterns[0] if short else _pick(rng, patterns)
    both = len(group) == 2
    text = text.format(sev=_pick(rng, words), side="bilateral" if both else first.side, zone=_pick(rng, zones),
                       s="s" if both else "")  # fmt: skip
    return " ".join(text.split())


def _article(phrase: str) -> str:
    """The phrase with "a" or "an" where English wants one."""
    if phrase.startswith("bilateral") or any(word in phrase for word in MASS):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def positive(name: str, group: list[Finding], hedged: bool, rng, author: int) -> tuple[str, dict]:
    """One sentence that states (or hedges) a finding."""
    options = HEDGES[author] if hedged else PLAIN[author]
    if not hedged and name in SPECIAL and rng.random() < 0.35:
        options = SPECIAL[name]
    phrase = noun_phrase(name, group, rng)
    severe = WORDS.get(name, DEFAULT_WORDS)[group[0].severity][0]
    text = _pick(rng, options)
    if "blunted" in text and len(group) == 2:
        text = SPECIAL["effusion"][1]
    plural = phrase.startswith("bilateral") and (phrase.endswith("s") and not phrase.endswith(("sis", "ax")))
    text = text.format(np=phrase, a=_article(phrase), sev=severe, sevly=severe + "ly", side=group[0].side,
                       **{"is": "are" if plural else "is"})  # fmt: skip
    return _tidy(text), _facts(text, [name], UNCERTAIN if hedged else POSITIVE)


def denial(names: list[str], rng, author: int) -> tuple[str, dict]:
    """ "No pleural effusion or pneumothorax is seen.": one sentence that denies every finding in `names`."""
    nouns = [DENIED_NOUN[name] for name in names]
    if len(nouns) > 1 and nouns[0] == "pleural effusion" and rng.random() < 0.1:
        nouns[0] = "effusion"
    listed = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " or " + nouns[-1]
    return _usual(rng, DENIALS, author).format(np=listed), dict.fromkeys(names, NEGATIVE)


def _other_side(findings: list[Finding], rng) -> list[tuple[str, dict]]:
    """At times "No right pleural effusion." where only the left has one: denied on that side alone, so no fact."""
    sides = {f.side for f in findings if f.name == "effusion"}
    if len(sides) != 1 or rng.random() >= 0.2:
        return []
    return [(f"No {'left' if 'right' in sides else 'right'} pleural effusion.", {})]


def _normal(topic: str, stated: set, rng, author: int) -> list[tuple[str, dict]]:
    """What an author says about a topic beside the findings `stated` (names): mostly that the rest is absent."""
    absent = [name for name in TOPICS[topic] if name not in stated]
    if topic == "device" or not absent:
        return []
    if topic == "heart":
        text = _usual(rng, HEART_NORMAL, author)
        return [(text, _facts(text, absent, NEGATIVE))]
    if topic == "bones":
        if stated and rng.random() < 0.6:
            return []
        text = _usual(rng, BONES_INTACT, author)
        return [(text, {"fracture": NEGATIVE})]
    if topic == "pleura":
        return [denial(absent, rng, author)]
    if len(absent) == len(TOPICS["lungs"]):
        return [(_usual(rng, LUNGS_CLEAR, author), {"opacity": NEGATIVE})]
    if rng.random() < 0.3:
        return [denial([name for name in absent if name in ("edema", "consolidation")] or absent, rng, author)]
    return []


def _impression(said: list[tuple], rng, author: int) -> tuple[str, dict]:
    """The list of everything stated, or that there is nothing."""
    if not said:
        return _usual(rng, NORMAL_IMPRESSION, author), {}
    parts = [("possible " if hedged else "") + noun_phrase(name, group, rng, True) for name, group, hedged in said]
    facts = merge_facts(_facts("", [name], UNCERTAIN if hedged else POSITIVE) for name, _, hedged in said)
    if author == 1:
        return " ".join(_tidy(part + ".") for part in parts), facts
    if author == 2 and len(parts) > 1:
        return _tidy(", ".join(parts) + "."), facts
    return _tidy(", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] + "."), facts


def sections(findings: list[Finding], rng: np.random.Generator, hedge: float, author: int | None = None):
    """(findings text, impression text, facts) of a report that states exactly `findings`; author None = any."""
    author = int(rng.integers(AUTHORS)) if author is None else author
    said = mentions(findings, rng, hedge * HEDGING[author])
    stated, sentences = {f.name for f in findings}, []
    for topic in ORDER[author]:
        for name, group, hedged in said:
            if name in TOPICS[topic]:
                sentences.append((0, positive(name, group, hedged, rng, author)))
        extra = _other_side(findings, rng) if topic == "pleura" else []
        sentences += [(1, item) for item in extra + _normal(topic, stated, rng, author)]
    if author == 3:  # what is wrong comes first
        sentences.sort(key=lambda item: item[0])
    impression, facts = _impression(said, rng, author)
    text = " ".join(sentence for _, (sentence, _) in sentences)
    return text, impression, merge_facts([facts] + [item[1] for _, item in sentences])


def caption(findings: list[Finding], rng: np.random.Generator) -> tuple[str, dict]:
    """A caption and its facts: keywords in a fixed order (45%), the same with severities (25%), or a report (30%).

    Keywords are what teaches a small model to see, as almost every token of them hangs on the image; the reports
    teach it the English that fine-tuning only has to select.
    """
    kind = rng.random()
    if kind >= 0.7:
        text, impression, facts = sections(findings, rng, hedge=0.1)
        return f"FINDINGS: {text} IMPRESSION: {impression}", facts
    parts = [noun_phrase(f.name, [f], rng, short=kind < 0.45) for f in findings]
    facts = merge_facts(_facts(part, [f.name], POSITIVE) for part, f in zip(parts, findings, strict=True))
    return ", ".join(parts or ["no finding"]) + ".", facts


def loose_sentence(finding: Finding, rng: np.random.Generator) -> tuple[str, dict]:
    """One sentence, on its own, that states, hedges or denies a finding of this kind, and its facts."""
    author, kind = int(rng.integers(AUTHORS)), rng.random()
    if kind < 0.65 or finding.name == "device":
        return positive(finding.name, [finding], 0.4 < kind < 0.65 and finding.name != "device", rng, author)
    others = [name for name in DENIED_NOUN if name != finding.name and rng.random() < 0.15]
    if kind < 0.93 or finding.name not in ("cardiomegaly", "fracture", "consolidation"):
        return denial([finding.name, *others], rng, author)
    text = _pick(rng, {"cardiomegaly": HEART_NORMAL, "fracture": BONES_INTACT}.get(finding.name, LUNGS_CLEAR))
    topic = "opacity" if finding.name == "consolidation" else finding.name
    return text, _facts(text, [topic], NEGATIVE)
