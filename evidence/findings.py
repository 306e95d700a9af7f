"""The evaluation's reader of real IU-Xray reports: which of the gold labels' findings a text states, by rules.

It reads less surely than people coded: how surely is measured on the references and stands beside every table, as what
is the most that a report can reach. A finding counts as stated unless a denial stands before it in its clause, or
"... is not seen" behind it. Shared with no reward but the oracle's.
"""

import re
import tomllib
from functools import lru_cache
from pathlib import Path

from evidence.reader import split_sentences
from formats.gold import FINDINGS, plain

RULES = tomllib.loads(Path(__file__).with_name("findings.toml").read_text(encoding="utf-8"))
NO, ENDS, ABSENT, *SIDES = (re.compile("|".join(RULES["words"][name]))
                            for name in ("no", "clause_ends", "absent", "left", "right", "both"))  # fmt: skip
PHRASES = {name: re.compile("|".join(RULES["findings"][name]["phrases"])) for name in FINDINGS}
# {finding: (a sentence that states it, one that says the like without it)}
SENTENCES = {name: (rule["sentence"], rule["normal"]) for name, rule in RULES["findings"].items()}


@lru_cache(maxsize=10_000)
def read_findings(text: str) -> tuple[frozenset[str], int, int]:
    """(labels that a text states, as the gold labels write them: "effusion_left", or "effusion" without a side; its
    sentences; how many of them have no phrase that the rules know)."""
    stated, unread, sentences = set(), 0, split_sentences(text)
    for sentence in sentences:
        found = [(name, match) for name, phrase in PHRASES.items() for match in phrase.finditer(sentence)]
        unread += not found and not re.search(r"\b(?:normal|clear|intact|unremarkable|stable|no|limits)\b", sentence)
        for name, match in found:
            start = max([0, *(end.end() for end in ENDS.finditer(sentence, 0, match.start()))])
            if NO.search(sentence, start, match.start()) or ABSENT.search(sentence, match.end()):
                continue
            left, right, both = (bool(side.search(sentence, start)) for side in SIDES)
            sides = [side for side, there in (("left", left or both), ("right", right or both)) if there]
            stated |= {f"{name}_{side}" for side in sides} or {name}
    return frozenset(stated), len(sentences), unread


def finding_counts(text: str, labels: list[str]) -> dict[str, int]:
    """As reader.truth_counts, by finding: a side, which people coded for some only, makes no finding another one, but
    where both name one and none agrees it is a wrong side."""
    read, sentences, unread = read_findings(text)
    stated, true = {*plain(sorted(read))}, {*plain(labels)}
    sides = [{name: {label for label in of if label.startswith(f"{name}_")} for name in stated & true}
             for of in (read, labels)]  # fmt: skip
    pairs = zip(*map(dict.values, sides), strict=True)
    wrong = sum(bool(ours and theirs and not ours & theirs) for ours, theirs in pairs)
    return {"stated": len(stated), "true": len(true), "correct": len(stated & true), "hallucinated": len(stated - true),
            "omitted": len(true - stated), "wrong_side": wrong, "sentences": sentences, "unread": unread}  # fmt: skip
