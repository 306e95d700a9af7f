"""The evaluation's reader of reports: which findings, on which side, a text states and which it denies.

Rules only, and shared with nothing: not with the generator of the phantom's reports, nor with the scorers that give
rewards, so that text which fools a reward is still read for what it says. Within a sentence the rules walk over
*events* from left to right (a finding, a side, a negation, a comma, ...); sampled and garbled text is read as far as
it goes, and sentences that say nothing the rules know are counted. A report is read as a whole, so a finding that the
IMPRESSION adds, or takes back, hides behind the other section: `section_counts` reads each section alone.
"""

import re
import tomllib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

SECTION_KEYS = ("reports", "disagreeing", "stated", "contradicted", "impression_only")
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
SAYS = {name: {*DENIES.get(name, [name])} for name in (*FINDINGS, *DENIES)}  # the findings that an event names
# A sentence's events as letters: f a finding, d a denial, s a side, "." those not below; where something new begins
# behind a comma, "and" or "or", the second of two. Patterns on these letters tell what stands behind an event.
LETTERS = {**dict.fromkeys(FINDINGS, "f"), **dict.fromkeys(DENIES, "d"), **dict.fromkeys(SIDES, "s"), "end": "$",
           "comma": ",;", "and": "aA", "or": "oO", "break": "b", "there": "t", "no": "n"}  # fmt: skip
SIDE = re.compile(".[d.]*s")  # the first side word before the next finding or separator
UP_TO = re.compile(".[ds.]*")  # all before the next finding or separator
NAMES = re.compile(".[^,;aAoOb]*[fd]")  # a finding, or that all is well, comes before the next separator
LISTS = re.compile(",[f,;]*[ao]")  # a comma in a list of bare nouns that "and" or "or" closes
# What a negation reaches over: a comma only in a list closed by "or" ("no effusion, nodule or edema", but not "no
# effusion, left nodule"); "and" unless something new begins ("no effusion and a small nodule").
REACHES = re.compile("[aoO]|[,;][^btnoO]*[oO]")
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
        heart = HEART.search(sentence)  # only a heart can be "enlarged"
        found = [match for match in EVENT.finditer(sentence) if heart or not match.group().startswith("enlarge")]
        self.events = [*((match.lastgroup, *match.span()) for match in found), ("end", len(sentence), len(sentence))]
        letters = [(LETTERS.get(name, "."), NEW.match(sentence, end)) for name, _, end in self.events]
        self.letters = "".join(some[-1] if new else some[0] for some, new in letters)
        for place, event in enumerate(self.events):  # left to right, not overlapping
            self.step(place, *event)

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

    def separator(self, place: int, name: str, start: int, end: int, ahead: str | None) -> None:
        shared = ahead and not re.search(r"\b(?:on|in|at)\b", self.sentence[self.start : start])
        if not (NAMES.match(self.letters, place) and (shared or name in ("comma", "there"))):
            self.left_out(start, self.stated)  # else its side is that of a finding to come
        self.start, self.here, self.named = end, None, False
        if name in ("break", "there") or name == "comma" and not LISTS.match(self.letters, place):
            self.told, self.side = True, None if self.used else self.side
        self.stated = self.stated if REACHES.match(self.letters, place) else True

    def step(self, place: int, name: str, start: int, end: int) -> None:
        ahead = SIDE.match(self.letters, place)
        ahead = ahead and self.events[ahead.end() - 1][0]
        if name in FINDINGS:
            stop = self.events[UP_TO.match(self.letters, place).end()][1]
            placed = AFTER.match(self.sentence, end, stop)  # "in the left ..."
            placed = placed and placed[1].replace("bilateral", "both")
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
        elif name == "absent" and not (self.stated and (self.named or not (ahead or NAMES.match(self.letters, place)))):
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
            self.separator(place, name, start, end, ahead)

    def pairs(self, wanted: bool) -> set[tuple[str, str | None]]:
        """What the sentence states (True), or denies."""
        return {(finding, one) for finding, side, stated in self.mentions if stated is wanted
                for one in (BOTH if side == "both" else [side])}  # fmt: skip


@lru_cache(maxsize=10_000)
def read_report(text: str) -> Reading:
    """Read a report, a caption or any other text; a repetition counts once and a hedge counts as stated.

    A pair both stated and denied in one text counts as stated. `unread` = sentences in which no rule found anything.
    """
    stated, denied, unread, sentences = set(), set(), 0, split_sentences(text)
    for sentence in sentences:
        for pattern, plain in PLAINER:
            sentence = pattern.sub(plain, sentence)
        walk = Walk(sentence)
        stated |= walk.pairs(True)
        denied |= walk.pairs(False)
        unread += not (walk.pairs(True) or walk.pairs(False) or NOTHING_WRONG.search(sentence))
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


def split_sections(text: str) -> dict[str, str]:
    """{header in lower case, "" before the first: what stands under it}; two sections of one name are one."""
    name, *rest = re.split(r"\b(findings|impression)\s*:", text, flags=re.I)
    parts = [("", name), *zip((header.lower() for header in rest[::2]), rest[1::2], strict=True)]
    return {header: ". ".join(part for other, part in parts if other == header) for header, _ in parts}


def alone(one: Reading, other: Reading) -> set[tuple[str, str | None]]:
    """What `one` states and `other` does not; a finding without a side is the same as on either side."""
    named = dict(other.stated)
    return {(f, s) for f, s in one.stated if not {(f, None), (f, s)} & other.stated and (s or f not in named)}


def denied_by(one: Reading, other: Reading) -> set[tuple[str, str | None]]:
    """What `one` states and `other` denies, on that side or in general."""
    return {(f, s) for f, s in one.stated if {(f, None), (f, s)} & other.denied}


def section_counts(text: str) -> list[int]:
    """The SECTION_KEYS of one report; all 0, not applicable, where it lacks FINDINGS or IMPRESSION.

    disagreeing: 1 if the sections state other findings (a finding without a side agrees with either side). Of the
    findings `stated` by the whole, contradicted: stated in a section and denied, on that side or in general, in the
    other; impression_only: stated in the IMPRESSION and not in the FINDINGS.
    """
    parts = split_sections(text)
    if not {"findings", "impression"} <= parts.keys():
        return [0] * len(SECTION_KEYS)
    findings, impression = read_report(parts["findings"]), read_report(parts["impression"])
    added, contradicted = alone(impression, findings), denied_by(findings, impression) | denied_by(impression, findings)
    disagree = bool(added or alone(findings, impression))
    return [1, int(disagree), len(read_report(text).stated), len(contradicted), len(added)]


def repeats(text: str) -> bool:
    """Whether one section, or a text without any, says the same sentence twice (case, blanks and tags apart)."""
    sections = [Counter(split_sentences(part)) for part in split_sections(text).values()]
    return any(n > 1 and re.search("[a-z]{2}", sentence) for count in sections for sentence, n in count.items())
