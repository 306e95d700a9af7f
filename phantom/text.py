"""The phantom's radiologists: reports and captions in English for a list of findings, by four authors.

The phrases stand in phrases.toml, the grammar here. A *group* is the one or two findings of a kind that are told
together. Writers return their text and its *facts*, a list of (topic, class) with CheXbert's classes 1 positive,
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
Facts = list[tuple[str, int]]


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _tidy(text: str) -> str:
    """One blank between words, and a capital first letter."""
    text = " ".join(text.split()).replace(" .", ".").replace(" ,", ",")
    return text[:1].upper() + text[1:]


def _facts(text: str, names: list[str], cls: int) -> Facts:
    """The topics that a sentence about `names` settles, of class `cls`; but pneumonia is never more than possible."""
    implied = [topic for word, topic in PHRASES.implied.items() if word in text]
    return [(topic, UNCERTAIN if topic == "pneumonia" else cls) for topic in [*names, *implied]]


def noun_phrase(group: list[Finding], rng, short: bool = False) -> str:
    """ "small left pleural effusion", lower case without article; `short` leaves the severity out."""
    first, both = group[0], len(group) == 2
    one_severity, one_site = (len({getattr(f, key) for f in group}) == 1 for key in ("severity", "site"))
    words = PHRASES.severities[first.name][first.severity] if one_severity and not short else [""]
    zones = PHRASES.zones.get(first.name, {}).get(first.site, [""]) if one_site else [""]
    patterns = PHRASES.nouns[first.site if first.name == "device" else first.name]
    text = patterns[0] if short else _pick(rng, patterns)
    side, plural = ("bilateral", "s") if both else (first.side, "")
    return " ".join(text.format(sev=_pick(rng, words), side=side, zone=_pick(rng, zones), s=plural).split())


class Radiologist:
    """Author number `author` of AUTHORS (None: any of them), who chooses words with `rng`."""

    def __init__(self, rng: np.random.Generator, author: int | None = None):
        self.rng, self.author = rng, int(rng.integers(len(AUTHORS))) if author is None else author
        self.style = AUTHORS[self.author]

    def usual(self, options: list[str]) -> str:
        """About half the time everybody's stock sentence, else the author's own: normal reports are near copies."""
        return options[0] if self.rng.random() < 0.45 else options[self.author]

    def positive(self, group: list[Finding], hedged: bool) -> tuple[str, Facts]:
        """One sentence that states (or hedges) a finding."""
        first, options = group[0], self.style["hedges" if hedged else "plain"]
        if not hedged and self.rng.random() < 0.35:
            options = PHRASES.special[first.name]
        phrase, text = noun_phrase(group, self.rng), _pick(self.rng, options)
        if "blunted" in text and len(group) == 2:
            text = PHRASES.special["effusion"][1]  # an angle is on one side
        plural = phrase.startswith("bilateral") and phrase.endswith("s") and not phrase.endswith(("sis", "ax"))
        no_article = phrase.startswith("bilateral") or any(word in phrase for word in PHRASES.no_article)
        article = "" if no_article else "an " if phrase[0] in "aeiou" else "a "
        severe = PHRASES.severities[first.name][first.severity][0]
        words = {"np": phrase, "a": article + phrase, "sev": severe, "sevly": severe + "ly", "side": first.side}
        text = text.format(**words, **{"is": "are" if plural else "is"})
        return _tidy(text), _facts(text, [first.name], UNCERTAIN if hedged else POSITIVE)

    def denial(self, names: list[str]) -> tuple[str, Facts]:
        """ "No pleural effusion or pneumothorax is seen.": one sentence that denies every finding in `names`."""
        nouns = [PHRASES.denied[name] for name in names]
        if len(nouns) > 1 and nouns[0] == "pleural effusion" and self.rng.random() < 0.1:
            nouns[0] = "effusion"
        listed = " or ".join(", ".join(nouns).rsplit(", ", 1))  # "a, b or c"
        return self.usual(PHRASES.denials).format(np=listed), [(name, NEGATIVE) for name in names]

    def normal(self, topic: str, stated: list[str]) -> list[tuple[str, Facts]]:
        """What is said about a topic beside the findings `stated` (names): mostly that the rest is absent."""
        absent = [name for name in PHRASES.topics[topic] if name not in stated]
        if topic == "device" or not absent or (topic == "bones" and stated and self.rng.random() < 0.6):
            return []
        if absent == PHRASES.topics[topic] and topic != "pleura":
            sentence = self.usual(PHRASES.normal[topic])
            return [(sentence, _facts(sentence, PHRASES.cleared[topic], NEGATIVE))]
        if topic == "lungs":
            absent = [name for name in absent if name in ("edema", "consolidation")] or absent
        return [self.denial(absent)] if topic == "pleura" or self.rng.random() < 0.3 else []

    def impression(self, said: list[tuple[list[Finding], bool]]) -> str:
        """The list of everything stated, or that there is nothing."""
        if not said:
            return self.usual(PHRASES.normal["impression"])
        parts = [("possible " if hedged else "") + noun_phrase(group, self.rng, short=True) for group, hedged in said]
        if self.author == 1:
            return " ".join(_tidy(part + ".") for part in parts)
        return _tidy((", " if self.author == 2 else " and ").join(", ".join(parts).rsplit(", ", 1)) + ".")

    def report(self, findings: list[Finding], hedge: float) -> tuple[str, Facts]:
        """("FINDINGS: ... IMPRESSION: ...", facts): a report that states exactly `findings`; a group is hedged at the
        rate `hedge` times the author's, but no device: a pacemaker is there or it is not."""
        names, hedge = list(dict.fromkeys(f.name for f in findings)), hedge * self.style["hedging"]
        said, sentences = [], []  # (group, whether it is hedged); (0 for what is wrong else 1, (text, facts))
        for name in names:
            both = [f for f in findings if f.name == name]
            for group in [both] if len(both) == 1 or self.rng.random() < 0.6 else [[f] for f in both]:
                said.append((group, name != "device" and self.rng.random() < hedge))
        fluid = {f.side for f in findings if f.name == "effusion"}
        for topic in self.style["order"]:
            sentences += [(0, self.positive(*told)) for told in said if told[0][0].name in PHRASES.topics[topic]]
            if topic == "pleura" and len(fluid) == 1 and self.rng.random() < 0.2:  # denied on one side alone: no fact
                sentences.append((1, (f"No {'left' if 'right' in fluid else 'right'} pleural effusion.", [])))
            sentences += [(1, sentence) for sentence in self.normal(topic, names)]
        if self.author == 3:
            sentences.sort(key=lambda item: item[0])
        texts, facts = zip(*(sentence for _, sentence in sentences), strict=True)
        return f"FINDINGS: {' '.join(texts)} IMPRESSION: {self.impression(said)}", sum(facts, [])


def caption(findings: list[Finding], rng: np.random.Generator) -> tuple[str, Facts]:
    """A caption and its facts: keywords in a fixed order (45%), the same with severities (25%), which teach a model to
    see as almost every token hangs on the image, or a report (30%), which teaches it the reports' English."""
    kind = rng.random()
    if kind >= 0.7:
        return Radiologist(rng).report(findings, hedge=0.1)
    parts = [noun_phrase([f], rng, short=kind < 0.45) for f in findings]
    facts = [_facts(part, [f.name], POSITIVE) for part, f in zip(parts, findings, strict=True)]
    return ", ".join(parts or ["no finding"]) + ".", sum(facts, [])


def loose_sentence(finding: Finding, rng: np.random.Generator) -> tuple[str, Facts]:
    """One sentence, on its own, that states, hedges or denies a finding of this kind, and its facts."""
    author, kind, name = Radiologist(rng), rng.random(), finding.name
    if kind < 0.65 or name == "device":
        return author.positive([finding], 0.4 < kind < 0.65 and name != "device")
    others = [other for other in PHRASES.denied if other != name and rng.random() < 0.15]
    topic = {"cardiomegaly": "heart", "fracture": "bones", "consolidation": "lungs"}.get(name)
    if kind < 0.93 or topic is None:
        return author.denial([name, *others])
    sentence = _pick(rng, PHRASES.normal[topic])
    return sentence, _facts(sentence, PHRASES.cleared[topic], NEGATIVE)
