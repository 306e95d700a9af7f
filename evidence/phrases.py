"""Which words of a report are true: its text in phrases, each marked by what the image shows, and what it leaves out.

What a sentence states is for evidence/reader.py to say; here it is only found again where it stands. A sentence falls
into the clauses around its findings ("left effusion" | ", " | "mild cardiomegaly"), and all phrases together are the
text, letter by letter. The numbers of a report are reader.truth_counts'; the marks agree with them.
"""

from typing import NamedTuple

from evidence.reader import BOTH, DENIES, EVENT, SAYS, UNSIDED, label_of, mark_of, pairs_of, read_report, sentence_spans

# mark: (symbol, colour, what it says); colour-blind safe (Okabe & Ito 2008), and never told by the colour alone
MARKS = {
    "right": ("✓", "#009E73", "in the image"),
    "invented": ("✗", "#D55E00", "not in the image"),
    "wrong side": ("⇄", "#CC79A7", "in the image, but on the other side"),
    "denied": ("⊘", "#0072B2", "denied, but in the image"),
    "plain": ("", "#000000", "states no finding, or denies what is not there"),
}
WORST = ("invented", "wrong side", "denied", "right", "plain")  # of several findings in one phrase, the first here
BETWEEN = ("comma", "and", "or", "break")  # the reader's events that end a clause


class Phrase(NamedTuple):
    """text[start:end] of a report, its mark (a key of MARKS) and the labels it states or denies ("lesion_left", ...;
    of a sided finding without a side "lesion")."""

    start: int
    end: int
    mark: str
    labels: tuple[str, ...] = ()


def mark_report(text: str, labels: list[str]) -> tuple[list[Phrase], list[str]]:
    """(phrases that make up `text`, labels of the image that it omits); labels: all that the image shows."""
    true, stated = pairs_of(labels), read_report(text).stated
    left_out = true - stated
    for name in (name for name, side in stated if side is None and name not in UNSIDED):
        left_out.discard(next(((name, side) for side in BOTH if (name, side) in left_out), None))  # it covers one
    phrases, place = [], 0
    for start, end in sentence_spans(text):
        for first, last, says, rejects in clauses(text[start:end]):
            marks = {mark_of(pair, true, stated) for pair in says}
            marks |= {"denied" for pair in rejects if mark_of(pair, true) == "right"}
            mark = next((mark for mark in WORST if mark in marks), "plain")
            said = tuple(sorted(map(label_of, says | rejects)))
            phrases += [Phrase(place, start + first, "plain"), Phrase(start + first, start + last, mark, said)]
            place = start + last
    phrases.append(Phrase(place, len(text), "plain"))
    return [phrase for phrase in phrases if phrase.start < phrase.end], sorted(map(label_of, left_out))


def clauses(sentence: str) -> list[tuple[int, int, set, set]]:
    """(start, end, pairs stated, pairs denied) of a sentence's clauses, in order; [] where it says nothing.

    A clause is what stands around one finding word, up to the comma, "and", "or" or "with" before the next one.
    """
    reading = read_report(sentence)
    lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in sentence)  # letter by letter: places stay
    events = [(match.lastgroup, *match.span()) for match in EVENT.finditer(lower)]
    names = {name for name, _ in reading.stated | reading.denied}
    words = [event for event in events if names & SAYS.get(event[0], set())]
    if not words:  # said in words that stand together only after the reader's tidying
        return [(0, len(sentence), set(reading.stated), set(reading.denied))] if names else []
    found, start = [], 0
    for i, (word, _, end) in enumerate(words):
        later, following, _ = words[i + 1] if i + 1 < len(words) else ("", len(sentence), 0)
        breaks = [event[1:] for event in events if event[0] in BETWEEN and end <= event[1] and event[2] <= following]
        if word == later and not breaks:  # "a nodular lesion" is one thing
            continue
        stop, after = (len(sentence),) * 2 if not later else breaks[-1] if breaks else (end, end)
        said, alone = SAYS[word], read_report(sentence[start:stop])
        says = {pair for pair in reading.stated if pair[0] in said and word not in DENIES}
        rejects = {pair for pair in reading.denied if pair[0] in said}
        several = sum(bool(said & SAYS[other]) for other, *_ in words) > 1
        if several and (says & alone.stated or rejects & alone.denied):
            says, rejects = says & alone.stated, rejects & alone.denied  # which of several of a kind it is
        found.append((start, len(sentence[:stop].rstrip()), says, set() if says else rejects))
        start = after + len(sentence[after:]) - len(sentence[after:].lstrip())
    for pair in reading.stated.difference(*(says for *_, says, _ in found)):  # a side from elsewhere in the sentence,
        alike = (says for *_, says, _ in found if any(pair[0] == name for name, _ in says))
        next(alike, found[-1][2]).add(pair)  # or said in the reader's plainer words alone
    return found
