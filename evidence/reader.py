"""The evaluation's reader of reports: which findings, on which side, a text states and which it denies.

Rules only, and shared with nothing: not with the generator of the phantom's reports, nor with the scorers that give
rewards, so that text which fools a reward is still read for what it says. Within a sentence the rules walk over
*events* from left to right (a finding, a side, a negation, a comma, ...); sampled and garbled text is read as far as
it goes, and sentences that say nothing the rules know are counted.
"""

import re
import tomllib
from collections import Counter
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
FEW = r"\b(?: (?!not\b|no\b|but\b|otherwise\b|enlarge)\w+){0,4}? "  # a few words, none of them a negation
EVENTS = RULES["normal"] | RULES["findings"] | RULES["words"]  # name: its patterns, the order matters
EVENT = re.compile("|".join(f"(?P<{name}>{'|'.join(EVENTS[name])})" for name in EVENTS).replace("<few>", FEW))
FINDINGS, DENIES = RULES["findings"], RULES["denies"]
NAMES, SEPARATORS = {*FINDINGS, *DENIES}, {"comma", "and", "or", "break"}
NOTHING_WRONG = re.compile("|".join(RULES["nothing_wrong"]))
NEW = re.compile(rf" (?:{'|'.join(RULES['new'])})\b")
HEART, AFTER = re.compile(r"\b(?:heart|cardiac|cardio\w+|silhouette)\b"), re.compile(RULES["after"])
PLAINER = [(re.compile("|".join(patterns)), plain) for plain, patterns in RULES["plainer"].items()]
BESIDE = rf"\W|\b(?:{'|'.join(RULES['new'] + RULES['filler'])})\b"  # what may stand beside a side, in both below
JOINT = re.compile(rf"(?:{BESIDE})*?\b(?:and|n?or|plus|than)\b(?:{BESIDE})*")  # "moderate right [and small] left ..."
SHORT = re.compile(rf"(?:{'|'.join([BESIDE, *sum((EVENTS[name] for name in (*SIDES, 'verb')), [])])})*")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text stand; tags and section headers belong to none, and empty ones are dropped."""
    blank = re.sub(r"<[^<>]*>|\b(?:findings|impression)\s*:", lambda match: "." * len(match[0]), text, flags=re.I)
    return [match.span() for match in re.finditer(r"[^\s.;:!?][^.;:!?\n]*", blank) if re.search(r"\w", match[0])]


def split_sentences(text: str) -> list[str]:
    """The sentences in lower case, with single blanks."""
    return [" ".join(text[start:end].lower().split()) for start, end in sentence_spans(text)]


class Event(NamedTuple):
    """A word or words that the rules know, sentence[start:end], and what stands behind."""

    name: str
    start: int
    end: int
    negates: bool  # a negation reaches over it
    lists: bool  # it is a comma in a list of bare nouns that "and" or "or" closes
    placed: str | None  # the side of a finding placed "in the left ..."
    ahead: str | None  # the first side word before the next finding or separator
    names: bool  # a finding, or that all is well, comes before the next separator


def events_of(sentence: str) -> list[Event]:
    """The events of a prepared sentence. From right to left, so that the work is linear.

    A negation reaches over a comma only in a list closed by "or" ("no effusion, nodule or edema", but not "no effusion,
    left nodule"); over "and" unless something new begins ("no effusion and a small nodule").
    """
    heart = HEART.search(sentence)  # only a heart can be "enlarged"
    matches = [match for match in EVENT.finditer(sentence) if heart or not match.group().startswith("enlarge")]
    found, stop, later, closed, side, names = [], len(sentence), None, False, None, False
    for match in reversed(matches):
        name, (start, end) = match.lastgroup, match.span()
        new = bool(NEW.match(sentence, end))
        placed = AFTER.match(sentence, end, stop) if name in FINDINGS else None
        found.append(Event(name, start, end, not new if name == "and" else later == "or", closed and not new,
                           placed and placed[1].replace("bilateral", "both"), side, names))  # fmt: skip
        later = name if name in ("break", "there", "no", "or") else later
        closed = closed if name in FINDINGS or name == "comma" else name in ("and", "or") and not new
        names = name in NAMES or names and name not in SEPARATORS
        if name in SIDES:
            side = name
        elif name in FINDINGS or name in SEPARATORS or name in ("there", "no"):
            stop, side = start, None
    return found[::-1]


class Walk:
    """One pass over a sentence's events, one *clause* after another: separators (comma, and, or, but ...) end them.

    mentions: [finding, side, stated], where stated is None for what is only asked for. A clause that has a side, no
    finding and little else speaks of the findings named last: "and one on the left", "but the left has cleared".
    """

    def __init__(self, sentence: str):
        self.sentence, self.mentions, self.stated = sentence, [], True  # stated: what the next finding will be
        self.group, self.told = [], False  # the mentions of the last list of nouns; whether it is over
        # the last side, whether a finding had it, where it ends; whether the next side belongs to the finding before it
        self.side, self.used, self.side_end, self.taken = None, False, 0, False
        self.start, self.here, self.named = 0, None, False  # the clause: where it starts, its side, whether it names

    def add(self, finding: str, side: str | None, stated: bool | None) -> list:
        self.mentions.append([finding, None if finding in UNSIDED else side, stated])
        self.named, self.used = True, self.used or finding not in UNSIDED
        return self.mentions[-1]

    def left_out(self, end: int, stated: bool | None) -> bool:
        """Say so of the findings named last if the clause, up to `end`, leaves its finding out; whether it does."""
        does = bool(self.here and not self.named and SHORT.fullmatch(self.sentence, self.start, end))
        for finding in {finding for finding, *_ in self.group if does and finding not in UNSIDED}:
            self.add(finding, self.here, stated)
        return does

    def separator(self, event: Event) -> None:
        name, clause = event.name, self.sentence[self.start : event.start]
        shared = event.ahead and not re.search(r"\b(?:on|in|at)\b", clause)
        if not (event.names and (shared or name in ("comma", "there"))):  # else its side is that of a finding to come
            self.left_out(event.start, self.stated)
        self.start, self.here, self.named = event.end, None, False
        if name in ("break", "there") or name == "comma" and not event.lists:
            self.told, self.side = True, None if self.used else self.side
        self.stated = self.stated if name == "or" or name in ("and", "comma") and event.negates else True

    def step(self, event: Event) -> None:
        name, start, end, _, _, placed, ahead, names = event
        if name in FINDINGS:
            behind = placed or (None if self.side else ahead)
            self.group, self.told, self.taken = [] if self.told else self.group, False, bool(placed or ahead)
            self.group.append(self.add(name, behind or self.side, self.stated))
            for mention in self.group:  # "effusion and atelectasis on the left"
                mention[1] = mention[1] or (None if mention[0] in UNSIDED else behind)
        elif name in DENIES:
            side = self.side if self.side in BOTH and not self.used else None
            for finding in DENIES[name]:
                self.add(finding, side, False)
        elif name in SIDES:
            joint = self.side and not self.used and JOINT.fullmatch(self.sentence, self.side_end, start)
            self.side, self.used, self.side_end = "both" if joint and name != self.side else name, self.taken, end
            self.here, self.taken = None if self.used else self.side, False
        elif name == "absent" and not (self.stated and (self.named or not names and not ahead)):
            self.stated = not self.stated  # "has not resolved"; "unlikely left effusion"
        elif name == "absent":
            if not self.left_out(start, False) and (self.named or not self.here):
                for mention in self.group:
                    mention[2] = False
        elif name in ("no", "asks"):
            self.start, self.here, self.named = (start, None, False) if self.named else (self.start, self.here, False)
            self.stated, self.told = None if name == "asks" else False, True
        elif name == "verb":
            self.told = True
        elif name == "there" and self.here and not self.named:  # "but on the left there is one"
            self.stated = True
        else:
            self.separator(event)


def read_sentence(sentence: str) -> tuple[set, set]:
    """The (finding, side) pairs that one prepared sentence states, and those it denies."""
    walk = Walk(sentence)
    for event in events_of(sentence):
        walk.step(event)
    walk.left_out(len(sentence), walk.stated)
    pairs = [(finding, s, stated) for finding, side, stated in walk.mentions
             for s in (BOTH if side == "both" else [side])]  # fmt: skip
    return tuple({(finding, side) for finding, side, stated in pairs if stated is wanted} for wanted in (True, False))


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
        unread += not (says or rejects or NOTHING_WRONG.search(sentence))
    # a finding without a side is no second one where its side is given elsewhere
    sided = {finding for finding, side in stated if side}
    settled = {(finding, side) for finding, side in stated if side or finding not in sided}
    return Reading(frozenset(settled), frozenset(denied - stated), len(sentences), unread)


def pairs_of(labels: list[str]) -> set[tuple[str, str | None]]:
    """(finding, side) of "edema", "effusion_left", ..."""
    return {(finding, side or None) for finding, _, side in (label.partition("_") for label in labels)}


def label_of(pair: tuple[str, str | None]) -> str:
    return "_".join(filter(None, pair))


def mark_of(pair: tuple[str, str | None], true: set, stated: frozenset = frozenset()) -> str:
    """What a pair that a report states, among all that are `stated`, is to an image with the `true` ones.

    right       it is there; a sided finding without a side: on any side, of which it then covers one
    wrong side  it is on the other side alone, unless that is stated as well: then this is a second one,
    invented    as is what is on neither
    """
    (finding, side), other = pair, (pair[0], "left" if pair[1] == "right" else "right")
    if pair in true or side is None and any((finding, s) in true for s in BOTH):
        return "right"
    return "wrong side" if side and other in true and other not in stated else "invented"


def counts_of(reading: Reading, stated: int, true: int, correct: int, wrong_side: int) -> dict[str, int]:
    """What a report says, in numbers: stated = correct + hallucinated, true = correct + omitted."""
    return {"stated": stated, "hallucinated": stated - correct, "true": true, "omitted": true - correct,
            "wrong_side": wrong_side, "correct": correct, "sentences": reading.sentences,
            "unread": reading.unread}  # fmt: skip


def truth_counts(text: str, labels: list[str]) -> dict[str, int]:
    """Counts of one report against the labels in its image ("edema", "effusion_left", ...), by (finding, side). Right
    finding on the wrong side: one hallucination (and one omission), counted in wrong_side too."""
    reading, true = read_report(text), pairs_of(labels)
    marks = Counter(mark_of(pair, true, reading.stated) for pair in reading.stated)
    return counts_of(reading, len(reading.stated), len(true), marks["right"], marks["wrong side"])
