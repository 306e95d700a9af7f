"""The evaluation's reader of reports: which findings, on which side, a text states and which it denies.

Rules only, and shared with nothing: not with the generator of the phantom's reports, nor with the scorers that give
rewards, so that text which fools a reward is still read for what it says. Within a sentence the rules walk over
*events* from left to right (a finding, a side, a negation, a comma, ...); sampled and garbled text is read as far as
it goes, and sentences that say nothing the rules know are counted.
"""

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

UNSIDED = ("cardiomegaly", "edema", "device")
BOTH = ("left", "right")


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
    sentence = NO_CHANGE.sub("unchanged", HEDGED_DENIAL.sub("possible", sentence))
    sentence = re.sub(r"\bwithin normal limits\b", "normal", sentence)
    return re.sub(r"\b(?:left (?:and|or) right|right (?:and|or) left)\b", "bilateral", sentence)


def _list_goes_on(sentence: str, events, at: int) -> bool:
    """Whether a negation reaches over the comma or "and" at events[at].

    Over a comma only in a list closed by "or" ("no effusion, nodule or edema", but not "no effusion, left nodule");
    over "and" unless something new begins ("no effusion and a small nodule").
    """
    name, _, end = events[at]
    if name == "and":
        return not NEW.match(sentence[end:])
    for later, _, _ in events[at + 1 :]:
        if later in ("break", "no"):
            return False
        if later == "or":
            return True
    return False


def _side_of(sentence: str, events, at: int, before: str | None) -> str | None:
    """Side word of the finding at events[at]: "in the left ..." after it, else the one before, else one after it."""
    end = events[at][2]
    upto = next((start for name, start, _ in events[at + 1 :] if name in (*FINDINGS, "comma", "break")),
                len(sentence))  # fmt: skip
    placed = AFTER.match(sentence[end:upto])
    if placed:
        return "both" if placed.group(1) in ("both", "bilateral") else placed.group(1)
    if before:
        return before
    return next((name for name, start, _ in events[at + 1 :] if name in (*BOTH, "both") and start < upto), None)


def _read_sentence(sentence: str) -> tuple[set, set]:
    """The (finding, side) pairs that one prepared sentence states, and those it denies."""
    # from left to right, not overlapping; only a heart can be "enlarged"
    found = [m for m in EVENT.finditer(sentence) if not m.group().startswith("enlarge") or HEART.search(sentence)]
    events = [(match.lastgroup, match.start(), match.end()) for match in found]
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
        elif name in FINDINGS:
            place = None if name in UNSIDED else _side_of(sentence, events, at, side)
            latest = [(name, s) for s in (BOTH if place == "both" else [place])]
            used = used or name not in UNSIDED
            (denied if negated else stated).update(latest)
    return stated, denied


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
