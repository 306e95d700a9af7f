"""The evaluation's reader of reports: which findings, on which side, a text states and which it denies.

Rules only, and shared with nothing: not with the generator of the phantom's reports, nor with the scorers that give
rewards, so that text which fools a reward is still read for what it says. Within a sentence the rules walk over
*events* from left to right (a finding, a side, a negation, a comma, ...); sampled and garbled text is read as far as
it goes, and sentences that say nothing the rules know are counted.
"""

import re
from dataclasses import dataclass

UNSIDED = ("cardiomegaly", "edema", "device")
BOTH = ("left", "right")


@dataclass(frozen=True)
class Reading:
    """What a text says: (finding, side) pairs, side None = not given or not applicable; counts of sentences."""

    stated: frozenset[tuple[str, str | None]]
    denied: frozenset[tuple[str, str | None]]
    sentences: int
    unread: int


QUALIFIER = r"(?:a|an|the|there|small|trace|tiny|mild\w*|minimal|subtle|moderate\w*|large|severe\w*|dense|marked)"
UP_TO = r"\b(?: (?!not\b|no\b)\w+){0,4}? "  # a few words, none of them a negation
# every event the rules know; the order matters where two match at the same place
EVENTS = (
    ("normal_heart", r"\b(?:heart|cardiac|cardio\w+|mediastinal)" + UP_TO + r"(?:normal|unremarkable)\b"),
    ("normal_heart", r"\bnormal (?:heart|cardiac|cardio\w+)\b"),
    ("clear_lungs", r"\blungs?" + UP_TO + r"clear\b|\bclear lungs?\b"),
    ("intact_bones", r"\b(?:bony|osseous|bones?|ribs?|skelet\w+)" + UP_TO + r"(?:intact|unremarkable)\b"),
    ("effusion", r"\beffusions?\b|\bpleural fluid(?: collections?)?\b|\bblunt\w*"),
    ("pneumothorax", r"\bpneumothora\w+|\bpleural line\b"),
    ("consolidation", r"\bconsolidat\w+|\b(?:airspace |patchy )?opacit\w+|\bpneumonia\b|\bair bronchograms?\b"),
    ("atelectasis", r"\batelecta\w+"),
    ("lesion", r"\bnodul\w+|\blesions?\b|\bmass(?:es)?\b"),
    ("fracture", r"\bfractur\w+"),
    ("cardiomegaly", r"\bcardiomegaly\b|\benlarge\w*"),
    ("edema", r"\b(?:edema|haze|congestion)\b"),
    ("device", r"\b(?:pacemakers?|pacing device|catheters?|central line|support devices?|devices?|leads?)\b"),
    ("both", r"\b(?:bilateral\w*|both|bibasilar)\b"),
    ("left", r"\bleft\b"),
    ("right", r"\bright\b"),
    ("absent", r"\b(?:not (?:seen|present|identified|evident|visualized|noted|demonstrated)|absent|resolved)\b"),
    ("absent", r"\b(?:excluded|ruled out)\b"),
    ("no", r"\b(?:no|not|without|free of|negative for|absence of|clear of|neither)\b"),
    ("break", r"\b(?:but|however|although|though|with|there (?:is|are))\b"),
    ("or", r"\b(?:or|nor)\b"),
    ("and", r"\band\b"),
    ("comma", r","),
)
EVENT = re.compile("|".join(f"(?P<e{i}>{pattern})" for i, (_, pattern) in enumerate(EVENTS)))
HEART = re.compile(r"\b(?:heart|cardiac|cardio\w+|silhouette)\b")
FINDING_EVENTS = frozenset(name for name, _ in EVENTS[4:13])
# what a normal statement denies
DENIES = {"normal_heart": ("cardiomegaly",), "intact_bones": ("fracture",),
          "clear_lungs": ("edema", "consolidation", "atelectasis", "lesion")}  # fmt: skip
NOTHING_WRONG = re.compile(
    r"\bno (?:\w+ ){0,3}(?:abnormalit\w+|diseases?|findings?|process)\b|\bnormal (?:chest|study|radiograph)\b"
    r"|\bunremarkable\b|\bwithin normal limits\b"
)
# a doubt is a statement here, and no change is no denial: taken out before negations are looked for
HEDGED_DENIAL = re.compile(r"\b(?:cannot|can not|could not|not) (?:be )?(?:\w+ly )?(?:excluded|ruled out)\b")
NO_CHANGE = re.compile(r"\b(?:no|without) (?:\w+ ){0,2}change\b|\bnot (?:\w+ )?changed\b")
AFTER = re.compile(r"\W*(?:is |are |was |seen |noted |present )*(?:in|at|on|of|along|within) (?:a |an |the )?(?:\w+ )??"
                   r"(left|right|both|bilateral)\b")  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """Lower-case sentences without tags and section headers; empty ones dropped."""
    text = re.sub(r"<[^<>]*>", " . ", text.lower())
    text = re.sub(r"\b(?:findings|impression)\s*:", " . ", text)
    parts = re.split(r"[.;:!?\n]+", text)
    return [" ".join(part.split()) for part in parts if re.search(r"\w", part)]


def _prepare(sentence: str) -> str:
    sentence = HEDGED_DENIAL.sub("possible", sentence)
    sentence = NO_CHANGE.sub("unchanged", sentence)
    sentence = re.sub(r"\bwithin normal limits\b", "normal", sentence)
    return re.sub(r"\b(?:left (?:and|or) right|right (?:and|or) left)\b", "bilateral", sentence)


def _events(sentence: str) -> list[tuple[str, int, int]]:
    """(event, start, end) from left to right, not overlapping; only a heart can be "enlarged"."""
    found = [m for m in EVENT.finditer(sentence) if not m.group().startswith("enlarge") or HEART.search(sentence)]
    return [(EVENTS[int(m.lastgroup[1:])][0], m.start(), m.end()) for m in found]


def _list_goes_on(sentence: str, events, at: int) -> bool:
    """Whether a negation reaches over the comma or "and" at events[at].

    Over a comma only in a list closed by "or" ("no effusion, nodule or edema", but not "no effusion, left nodule");
    over "and" unless something new begins ("no effusion and a small nodule").
    """
    name, _, end = events[at]
    if name == "and":
        return not re.match(rf" {QUALIFIER}\b", sentence[end:])
    for later, _, _ in events[at + 1 :]:
        if later in ("break", "no"):
            return False
        if later == "or":
            return True
    return False


def _sides(finding: str, side: str | None) -> list[str | None]:
    """The sides that a finding with side word `side` ("left", "right", "both" or None) covers."""
    if finding in UNSIDED or side is None:
        return [None]
    return list(BOTH) if side == "both" else [side]


def _side_of(sentence: str, events, at: int, before: str | None) -> str | None:
    """Side word of the finding at events[at]: "in the left ..." after it, else the one before, else one after it."""
    end = events[at][2]
    upto = next((start for name, start, _ in events[at + 1 :] if name in FINDING_EVENTS | {"comma", "break"}),
                len(sentence))  # fmt: skip
    placed = AFTER.match(sentence[end:upto])
    if placed:
        return "both" if placed.group(1) in ("both", "bilateral") else placed.group(1)
    if before:
        return before
    return next((name for name, start, _ in events[at + 1 :] if name in (*BOTH, "both") and start < upto), None)


def _read_sentence(sentence: str) -> tuple[set, set]:
    """The (finding, side) pairs that one prepared sentence states, and those it denies."""
    events = _events(sentence)
    stated, denied = set(), set()
    negated, side, used, latest = False, None, False, []
    for at, (name, _, _) in enumerate(events):
        if name in DENIES:
            denied.update((finding, None) for finding in DENIES[name])
        elif name in (*BOTH, "both"):
            side, used = name, False
        elif name == "no":
            negated = True
        elif name == "absent" and not negated:  # "a left effusion is not seen"
            stated.difference_update(latest)
            denied.update(latest)
        elif name in ("break", "comma"):
            negated = negated and name == "comma" and _list_goes_on(sentence, events, at)
            side = None if used else side  # "on the right, an effusion": a side nobody used yet is carried on
        elif name == "and":
            negated = negated and _list_goes_on(sentence, events, at)
        elif name in FINDING_EVENTS:
            latest = [(name, s) for s in _sides(name, _side_of(sentence, events, at, side))]
            used = used or name not in UNSIDED
            (denied if negated else stated).update(latest)
    return stated, denied


def _settle(pairs: set) -> set:
    """Without the sideless mention of a finding whose side is given elsewhere: a repetition, not a second finding."""
    with_side = {finding for finding, side in pairs if side}
    return {(finding, side) for finding, side in pairs if side or finding not in with_side}


def read_report(text: str) -> Reading:
    """Read a report, a caption or any other text; a repetition counts once and a hedge counts as stated.

    A pair both stated and denied in one text counts as stated. `unread` = sentences in which no rule found anything.
    """
    stated, denied, unread = set(), set(), 0
    sentences = split_sentences(text)
    for sentence in sentences:
        ready = _prepare(sentence)
        says, rejects = _read_sentence(ready)
        stated |= says
        denied |= rejects
        if not (says or rejects or NOTHING_WRONG.search(ready)):
            unread += 1
    return Reading(frozenset(_settle(stated)), frozenset(denied - stated), len(sentences), unread)


def _pair(label: str) -> tuple[str, str | None]:
    finding, _, side = label.partition("_")
    return finding, side or None


def truth_counts(text: str, labels: list[str]) -> dict[str, int]:
    """Counts of one report against the labels in its image ("edema", "effusion_left", ...), by (finding, side).

    stated = correct + hallucinated and true = correct + omitted. A sided finding stated without a side is correct
    when the image has it on any side, and then covers one of them. Right finding on the wrong side: one
    hallucination (and one omission), counted in wrong_side too, unless the text states the right side as well.
    """
    reading, true = read_report(text), {_pair(label) for label in labels}
    correct = hallucinated = wrong_side = 0
    open_ = set(true)
    for finding, side in sorted(reading.stated, key=str):
        options = [(finding, side)] if side or finding in UNSIDED else [(finding, s) for s in BOTH]
        match = next((pair for pair in options if pair in open_), None)
        if match:
            correct += 1
            open_.discard(match)
            continue
        hallucinated += 1
        other = (finding, "left" if side == "right" else "right")
        wrong_side += int(side is not None and other in true and other not in reading.stated)
    return {
        "stated": len(reading.stated),
        "true": len(true),
        "correct": correct,
        "hallucinated": hallucinated,
        "omitted": len(open_),
        "wrong_side": wrong_side,
        "sentences": reading.sentences,
        "unread": reading.unread,
    }
