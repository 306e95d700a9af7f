"""The evaluation's reader of reports: which findings, on which side, a text states and which it denies.

Rules only, and shared with nothing: not with the generator of the phantom's reports, nor with the scorers that give
rewards, so that text which fools a reward is still read for what it says. Within a sentence the rules walk over
*events* from left to right (a finding, a side, a negation, a comma, ...); sampled and garbled text is read as far as
it goes, and sentences that say nothing the rules know are counted.
"""

import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

UNSIDED = ("cardiomegaly", "edema", "device")
BOTH = ("left", "right")
SIDES = (*BOTH, "both")


class Reading(NamedTuple):
    """What a text says: (finding, side) pairs, side None = not given or not applicable; counts of sentences."""

    stated: frozenset[tuple[str, str | None]]
    denied: frozenset[tuple[str, str | None]]
    sentences: int
    unread: int


RULES = tomllib.loads(Path(__file__).with_name("reader_rules.toml").read_text(encoding="utf-8"))
FEW = r"\b(?: (?!not\b|no\b)\w+){0,4}? "  # a few words, none of them a negation
EVENTS = RULES["normal"] | RULES["findings"] | RULES["words"]  # name: its patterns, the order matters
EVENT = re.compile("|".join(f"(?P<{name}>{'|'.join(EVENTS[name])})" for name in EVENTS).replace("<few>", FEW))
FINDINGS, DENIES = RULES["findings"], RULES["denies"]
NOTHING_WRONG = re.compile("|".join(RULES["nothing_wrong"]))
NEW = re.compile(rf" (?:{'|'.join(RULES['new'])})\b")
HEART = re.compile(r"\b(?:heart|cardiac|cardio\w+|silhouette)\b")
PLAINER = (  # done before the events are looked for: a doubt is a statement here, and no change is no denial
    (re.compile(r"\b(?:cannot|can not|could not|not) (?:be )?(?:\w+ly )?(?:excluded|ruled out)\b"), "possible"),
    (re.compile(r"\b(?:no|without) (?:\w+ ){0,2}change\b|\bnot (?:\w+ )?changed\b"), "unchanged"),
    (re.compile(r"\bwithin normal limits\b"), "normal"),
    (re.compile(r"\b(?:left (?:and|or) right|right (?:and|or) left)\b"), "bilateral"),
)
AFTER = re.compile(r"\W*(?:is |are |was |seen |noted |present )*(?:in|at|on|of|along|within) (?:a |an |the )?(?:\w+ )??"
                   r"(left|right|both|bilateral)\b")  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """Lower-case sentences without tags and section headers; empty ones dropped."""
    text = re.sub(r"<[^<>]*>", " . ", text.lower())
    text = re.sub(r"\b(?:findings|impression)\s*:", " . ", text)
    parts = re.split(r"[.;:!?\n]+", text)
    return [" ".join(part.split()) for part in parts if re.search(r"\w", part)]


def look_ahead(sentence: str, events: list[tuple[str, int, int]]) -> list[tuple[bool, str | None, str | None]]:
    """What stands behind each event: (whether a negation reaches over it, the side of a finding placed "in the left
    ...", the side word before the next finding, comma or break). From right to left, so that the work is linear.

    A negation reaches over a comma only in a list closed by "or" ("no effusion, nodule or edema", but not "no effusion,
    left nodule"); over "and" unless something new begins ("no effusion and a small nodule").
    """
    found, stop, later, side = [], len(sentence), None, None
    for name, start, end in reversed(events):
        goes_on = not NEW.match(sentence, end) if name == "and" else later == "or"
        placed = AFTER.match(sentence, end, stop) if name in FINDINGS else None
        found.append((goes_on, placed and placed[1].replace("bilateral", "both"), side))
        if name in ("break", "no", "or"):
            later = name
        if name in SIDES:
            side = name
        elif name in FINDINGS or name in ("comma", "break"):
            stop, side = start, None
    return found[::-1]


def read_sentence(sentence: str) -> tuple[set, set]:
    """The (finding, side) pairs that one prepared sentence states, and those it denies."""
    heart = HEART.search(sentence)  # only a heart can be "enlarged"
    found = [match for match in EVENT.finditer(sentence) if heart or not match.group().startswith("enlarge")]
    events = [(match.lastgroup, match.start(), match.end()) for match in found]  # left to right, not overlapping
    stated, denied = set(), set()
    negated, side, used, latest = False, None, False, []
    for (name, _, _), (goes_on, placed, following) in zip(events, look_ahead(sentence, events), strict=True):
        if name in DENIES:
            denied.update((finding, None) for finding in DENIES[name])
        elif name in SIDES:
            side, used = name, False
        elif name == "no":
            negated = True
        elif name == "absent" and not negated:  # "a left effusion is not seen"
            stated.difference_update(latest)
            denied.update(latest)
        elif name in ("break", "comma"):
            negated = negated and name == "comma" and goes_on
            side = None if used else side  # "on the right, an effusion": a side nobody used yet is carried on
        elif name == "and":
            negated = negated and goes_on
        elif name in FINDINGS:
            place = None if name in UNSIDED else placed or side or following
            latest = [(name, s) for s in (BOTH if place == "both" else [place])]
            used = used or name not in UNSIDED
            (denied if negated else stated).update(latest)
    return stated, denied


@lru_cache(maxsize=10_000)
def read_report(text: str) -> Reading:
    """Read a report, a caption or any other text; a repetition counts once and a hedge counts as stated.

    A pair both stated and denied in one text counts as stated. `unread` = sentences in which no rule found anything.
    """
    stated, denied, unread = set(), set(), 0
    sentences = split_sentences(text)
    for sentence in sentences:
        for pattern, plain in PLAINER:
            sentence = pattern.sub(plain, sentence)
        says, rejects = read_sentence(sentence)
        stated |= says
        denied |= rejects
        if not (says or rejects or NOTHING_WRONG.search(sentence)):
            unread += 1
    # a finding without a side is no second one where its side is given elsewhere
    sided = {finding for finding, side in stated if side}
    settled = {(finding, side) for finding, side in stated if side or finding not in sided}
    return Reading(frozenset(settled), frozenset(denied - stated), len(sentences), unread)


def truth_counts(text: str, labels: list[str]) -> dict[str, int]:
    """Counts of one report against the labels in its image ("edema", "effusion_left", ...), by (finding, side).

    stated = correct + hallucinated and true = correct + omitted. A sided finding stated without a side is correct
    when the image has it on any side, and then covers one of them. Right finding on the wrong side: one
    hallucination (and one omission), counted in wrong_side too, unless the text states the right side as well.
    """
    reading = read_report(text)
    true = {(finding, side or None) for finding, _, side in (label.partition("_") for label in labels)}
    hallucinated = wrong_side = 0
    omitted = set(true)
    for finding, side in sorted(reading.stated, key=str):
        options = [(finding, side)] if side or finding in UNSIDED else [(finding, s) for s in BOTH]
        match = next((pair for pair in options if pair in omitted), None)
        if match:
            omitted.discard(match)
            continue
        hallucinated += 1
        other = (finding, "left" if side == "right" else "right")
        wrong_side += int(side is not None and other in true and other not in reading.stated)
    stated, correct = len(reading.stated), len(true) - len(omitted)
    return {"stated": stated, "true": len(true), "correct": correct, "hallucinated": hallucinated,
            "omitted": len(omitted), "wrong_side": wrong_side,
            "sentences": reading.sentences, "unread": reading.unread}  # fmt: skip
