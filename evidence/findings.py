"""The evaluation's reader of real IU-Xray reports: which of the gold labels' findings a text states, by rules.

It reads less surely than people coded: how surely is measured on the references and stands beside every table, as what
is the most that a report can reach. A finding counts as stated unless a denial stands before it in its clause, or
"... is not seen" behind it. Shared with no reward but the oracle's.
"""

import re
import tomllib
from functools import lru_cache
from pathlib import Path

from evidence.reader import BOTH, Reading, counts_of, pairs_of, split_sentences
from formats.gold import FINDINGS

RULES = tomllib.loads(Path(__file__).with_name("findings.toml").read_text(encoding="utf-8"))
WORDS = {name: re.compile("|".join(patterns)) for name, patterns in RULES["words"].items()}
PHRASES = {name: re.compile("|".join(RULES["findings"][name]["phrases"])) for name in FINDINGS}
# {finding: (a sentence that states it, one that says the like without it)}
SENTENCES = {name: (rule["sentence"], rule["normal"]) for name, rule in RULES["findings"].items()}


@lru_cache(maxsize=10_000)
def read_findings(text: str) -> Reading:
    """Read a report, each finding with the sides that its sentence names; `denied` stays empty."""
    stated, unread, sentences = set(), 0, split_sentences(text)
    for sentence in sentences:
        found = [(name, match) for name, phrase in PHRASES.items() for match in phrase.finditer(sentence)]
        unread += not (found or WORDS["nothing_wrong"].search(sentence))
        for name, match in found:
            *_, start = 0, *(end.end() for end in WORDS["clause_ends"].finditer(sentence, 0, match.start()))
            denied = WORDS["no"].search(sentence, start, match.start()) or WORDS["absent"].search(sentence, match.end())
            if not denied:
                sides = [side for side in BOTH if WORDS[side].search(sentence, start)]
                stated |= {(name, side) for side in sides or [None]}
    return Reading(frozenset(stated), frozenset(), len(sentences), unread)


def finding_counts(text: str, labels: list[str]) -> dict[str, int]:
    """As reader.truth_counts, by finding: a side, which people coded for some only, makes no finding another one, but
    where both name one and none agrees it is a wrong side."""
    reading, known = read_findings(text), pairs_of(labels)
    stated, true = ({name for name, _ in of} for of in (reading.stated, known))
    both = reading.stated & known
    ours, theirs, agreed = ({name for name, side in of if side} for of in (reading.stated, known, both))
    return counts_of(reading, len(stated), len(true), len(stated & true), len(ours & theirs - agreed))
