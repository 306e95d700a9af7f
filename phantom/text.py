"""The phantom's radiologists: reports and captions in English for a list of findings, by four authors.

The phrases stand in phrases.toml, the grammar here. A *mention* is what is said about one kind of finding: (name,
findings, hedged). Every writer returns its text and its *facts*, {topic: class} with CheXbert's classes 1 positive,
2 negative, 3 uncertain; a topic is a finding's name or "silhouette", "opacity" or "pneumonia".
"""

import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from phantom.findings import Finding

PHRASES = SimpleNamespace(**tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8")))
AUTHORS = PHRASES.authors
NORMAL_TEMPLATE = PHRASES.normal_template
POSITIVE, NEGATIVE, UNCERTAIN = 1, 2, 3


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
    told = {"opacit": {"opacity": cls}, "pneumonia": {"pneumonia": UNCERTAIN}, "cardiomediastinal": {"silhouette": cls}}
    return merge_facts([dict.fromkeys(names, cls), *(facts for word, facts in told.items() if word in text)])


def merge_facts(parts) -> dict:
    """One {topic: class} for several sentences: positive beats uncertain beats negative."""
    merged = {}
    for topic, cls in (item for part in parts for item in part.items()):
        merged[topic] = max(cls, merged.get(topic, cls), key=(NEGATIVE, UNCERTAIN, POSITIVE).index)
    return merged


def mentions(findings: list[Finding], rng, hedge: float) -> list[tuple]:
    """Group findings into mentions: both sides of a kind often become one "bilateral"; each is hedged at a rate.

    Devices are never hedged: a pacemaker is there or it is not.
    """
    groups, said = {}, []
    for f in findings:
        groups.setdefault(f.name, []).append(f)
    for name, group in groups.items():
        together = len(group) == 1 or rng.random() < 0.6
        for part in [group] if together else [[f] for f in group]:
            said.append((name, part, name != "device" and rng.random() < hedge))
    return said


def noun_phrase(name: str, group: list[Finding], rng, short: bool = False) -> str:
    """ "small left pleural effusion", lower case without article; `short` leaves the severity out."""
    first, both = group[0], len(group) == 2
    same = all(f.severity == first.severity for f in group)
    words = PHRASES.severities[name][first.severity] if same and not short else [""]
    one_site = all(f.site == first.site for f in group)
    zones = PHRASES.zones[name][first.site] if one_site and name in PHRASES.zones else [""]
    patterns = PHRASES.nouns[first.site if name == "device" else name]
    text = patterns[0] if short else _pick(rng, patterns)
    text = text.format(sev=_pick(rng, words), side="bilateral" if both else first.side, zone=_pick(rng, zones),
                       s="s" if both else "")  # fmt: skip
    return " ".join(text.split())


def positive(name: str, group: list[Finding], hedged: bool, rng, author: int) -> tuple[str, dict]:
    """One sentence that states (or hedges) a finding."""
    options = AUTHORS[author]["hedges" if hedged else "plain"]
    if not hedged and rng.random() < 0.35:
        options = PHRASES.special[name]
    phrase = noun_phrase(name, group, rng)
    severe = PHRASES.severities[name][group[0].severity][0]
    text = _pick(rng, options)
    if "blunted" in text and len(group) == 2:
        text = PHRASES.special["effusion"][1]  # an angle is on one side
    plural = phrase.startswith("bilateral") and phrase.endswith("s") and not phrase.endswith(("sis", "ax"))
    no_article = phrase.startswith("bilateral") or any(word in phrase for word in PHRASES.no_article)
    article = "" if no_article else "an " if phrase[0] in "aeiou" else "a "
    text = text.format(np=phrase, a=article + phrase, sev=severe, sevly=severe + "ly", side=group[0].side,
                       **{"is": "are" if plural else "is"})  # fmt: skip
    return _tidy(text), _facts(text, [name], UNCERTAIN if hedged else POSITIVE)


def denial(names: list[str], rng, author: int) -> tuple[str, dict]:
    """ "No pleural effusion or pneumothorax is seen.": one sentence that denies every finding in `names`."""
    nouns = [PHRASES.denied[name] for name in names]
    if len(nouns) > 1 and nouns[0] == "pleural effusion" and rng.random() < 0.1:
        nouns[0] = "effusion"
    listed = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " or " + nouns[-1]
    return _usual(rng, PHRASES.denials, author).format(np=listed), dict.fromkeys(names, NEGATIVE)


def _other_side(findings: list[Finding], rng) -> list[tuple[str, dict]]:
    """At times "No right pleural effusion." where only the left has one: denied on that side alone, so no fact."""
    sides = {f.side for f in findings if f.name == "effusion"}
    said = len(sides) == 1 and rng.random() < 0.2
    return [(f"No {'left' if 'right' in sides else 'right'} pleural effusion.", {})] if said else []


def _clear(topic: str, sentence: str) -> tuple[str, dict]:
    """A sentence by which all is well with the heart, the lungs or the bones, and its facts."""
    return sentence, _facts(sentence, ["opacity"] if topic == "lungs" else PHRASES.topics[topic], NEGATIVE)


def _normal(topic: str, stated: set, rng, author: int) -> list[tuple[str, dict]]:
    """What an author says about a topic beside the findings `stated` (names): mostly that the rest is absent."""
    absent = [name for name in PHRASES.topics[topic] if name not in stated]
    if topic == "device" or not absent or (topic == "bones" and stated and rng.random() < 0.6):
        return []
    if topic == "pleura":
        return [denial(absent, rng, author)]
    if absent == PHRASES.topics[topic]:
        return [_clear(topic, _usual(rng, PHRASES.normal[topic], author))]
    if rng.random() < 0.3:  # some of the lungs' findings are there
        return [denial([name for name in absent if name in ("edema", "consolidation")] or absent, rng, author)]
    return []


def _impression(said: list[tuple], rng, author: int) -> tuple[str, dict]:
    """The list of everything stated, or that there is nothing."""
    if not said:
        return _usual(rng, PHRASES.normal["impression"], author), {}
    parts = [("possible " if hedged else "") + noun_phrase(name, group, rng, True) for name, group, hedged in said]
    facts = merge_facts({name: UNCERTAIN if hedged else POSITIVE} for name, _, hedged in said)
    if author == 1:
        return " ".join(_tidy(part + ".") for part in parts), facts
    last = ", " if author == 2 else " and "
    return _tidy(last.join(filter(None, [", ".join(parts[:-1]), parts[-1]])) + "."), facts


def sections(findings: list[Finding], rng: np.random.Generator, hedge: float, author: int | None = None):
    """(findings text, impression text, facts) of a report that states exactly `findings`; author None = any."""
    author = int(rng.integers(len(AUTHORS))) if author is None else author
    said = mentions(findings, rng, hedge * AUTHORS[author]["hedging"])
    stated, sentences = {f.name for f in findings}, []
    for topic in AUTHORS[author]["order"]:
        for name, group, hedged in said:
            if name in PHRASES.topics[topic]:
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
    author, kind = int(rng.integers(len(AUTHORS))), rng.random()
    if kind < 0.65 or finding.name == "device":
        return positive(finding.name, [finding], 0.4 < kind < 0.65 and finding.name != "device", rng, author)
    others = [name for name in PHRASES.denied if name != finding.name and rng.random() < 0.15]
    topic = {"cardiomegaly": "heart", "fracture": "bones", "consolidation": "lungs"}.get(finding.name)
    if kind < 0.93 or topic is None:
        return denial([finding.name, *others], rng, author)
    return _clear(topic, _pick(rng, PHRASES.normal[topic]))
