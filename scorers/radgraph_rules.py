"""RadGraph by rules (Eq. 4's s_rg): entities and relations of a chest X-ray report without a model.

A lexicon of general chest X-ray English with negation, uncertainty and simple relations. Enough for the phantom's
English; on real reports it reads the common phrases only.
"""

import re
import tomllib
from collections import defaultdict
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

WORDS = r"\b(?:{})\b"  # a pattern of phrases, which stand between two word boundaries
LEXICON = tomllib.loads(Path(__file__).with_name("radgraph_lexicon.toml").read_text(encoding="utf-8"))
KINDS = {word: kind for kind, words in LEXICON["words"].items() for word in words.split()}
# A clause's words as letters, which patterns can search: observation, degree, anatomy, position; lead in, glue
LETTERS = dict.fromkeys(LEXICON["in"], "i") | dict.fromkeys(LEXICON["glue"], "g") | {w: KINDS[w][0] for w in KINDS}
BEFORE, BEHIND, SAME_PLACE = map(re.compile, ("[dapg]*$", "i[dapg]*", "[apg]*"))
SUGGESTS, LINKS = (re.compile(WORDS.format("|".join(LEXICON[name]))) for name in ("suggests", "links"))
CUES = [(c["label"], c["stands"], re.compile(WORDS.format("|".join(c["phrases"])))) for c in LEXICON["cues"]]
CLAUSE_END = re.compile("|".join(LEXICON["clause_ends"]))
LONGEST = 100  # words of a clause read together, at their square's cost; those of 23,000 reports have at most 34


def _either(found: int, other: int) -> int:
    """The first of two indices that `str.find` found, which says -1 for none."""
    return found if found >= 0 else other


def _place(letters: str, start: int, end: int) -> int:
    """Of words [start, end) the anatomy (else the position word) that stands last; -1: there is none."""
    return _either(letters.rfind("a", start, end), letters.rfind("p", start, end))


def _located_at(words: list[str], letters: str, i: int) -> int:
    """Index of the place of observation i: named just before it, after a preposition, or as its subject; -1: none."""
    first, end = letters.rfind("o", 0, i) + 1, _either(letters.find("o", i + 1), len(letters))
    for run in (BEFORE.search(letters, first, i), *BEHIND.finditer(letters, i + 1, end)):
        place = _place(letters, *run.span())
        if place >= 0:
            return place
    subject = _place(letters, first, i)
    return subject if subject >= 0 and LINKS.search(" ".join(words[subject:i])) else -1


def _relations(words: list[str], letters: str) -> dict[int, list[tuple[str, int]]]:
    """RadGraph's relations inside one clause: word's index -> [(relation, index of its object)]."""
    found, clause = defaultdict(list), " ".join(words)
    for i, letter in enumerate(letters):
        relation, target = "modify", -1
        if letter == "d":
            target = _either(letters.find("o", i), letters.rfind("o"))
        elif letter == "p":
            run = SAME_PLACE.match(letters, i + 1).span()
            target = _either(letters.find("a", *run), letters.rfind("p", *run))
        elif letter == "o":
            relation, target = "located_at", _located_at(words, letters, i)
        if target >= 0:
            found[i].append((relation, target))
    cues = [clause.count(" ", 0, cue.start()) for cue in SUGGESTS.finditer(clause)]  # each its word's index
    for i, j in pairwise(at.start() for at in re.finditer("o", letters)):
        found[i] += [("suggestive_of", j) for cue in cues if i < cue <= j]  # it links the observations around it
    return found


def _certainty(words: list[str], i: int) -> str:
    """Is word i of a clause present, absent or uncertain? Of the cues before it the nearest counts, one behind more."""
    clause, nearest, label = " ".join(words), -1, "definitely present"
    start = len(" ".join([*words[:i], ""]))
    end = start + len(words[i])
    for name, stands, pattern in CUES:
        for cue in pattern.finditer(clause):
            if stands == "before" and nearest < cue.end() <= start:
                listed = name == "uncertain" and re.search(r",|\band\b", clause[cue.end() : start])  # ends its reach
                denied = label == "definitely absent" and SUGGESTS.match(cue.group())  # as in: no opacity to suggest it
                if not listed and not denied:
                    nearest, label = cue.end(), name
            elif stands == "behind" and cue.start() >= end and not LINKS.search(clause[end : cue.start()]):
                nearest, label = len(clause), name
    return label


@lru_cache(maxsize=100_000)
def annotate(text: str) -> dict:
    """Entities and relations of a report in the `radgraph` package's dict layout, one (lower-case) word an entity.

    Clauses are read one at a time, one of more than LONGEST words in parts; negation and uncertainty reach to the
    clause's end. Words outside the lexicon and headings are not read. Cached by text: do not change what it returns.
    """
    joined, entities, offset = " ".join(re.findall(r"\w+|[^\w\s]", text.lower())), {}, 0
    cuts = [0, *(cut.end() for cut in CLAUSE_END.finditer(joined)), len(joined)]
    clauses = [joined[start:end].split() for start, end in pairwise(cuts)]
    for words in (clause[i : i + LONGEST] for clause in clauses for i in range(0, len(clause), LONGEST)):
        heading = words[-1] == ":" and len(words) < 3
        letters = "" if heading else "".join(LETTERS.get(word, " ") for word in words)
        relations, read = _relations(words, letters), [i for i, letter in enumerate(letters) if letter in "odap"]
        number = {i: str(n) for n, i in enumerate(read, len(entities) + 1)}  # word's index -> entity id
        for i in read:
            label = f"Observation::{_certainty(words, i)}" if letters[i] in "od" else "Anatomy::definitely present"
            entities[number[i]] = {"tokens": words[i], "label": label, "start_ix": offset + i, "end_ix": offset + i,
                                   "relations": [[name, number[j]] for name, j in relations[i]]}  # fmt: skip
        offset += len(words)
    return {"text": joined, "entities": entities}


def _items(text: str, level: str) -> set[tuple]:
    """What RadGraph F1 compares at `level`: entities, entities with whether they have a relation, or triples."""
    items, entities = set(), annotate(text)["entities"]
    for entity in entities.values():
        key, relations = (entity["tokens"], entity["label"]), entity["relations"]
        if level == "complete" and relations:
            items |= {(*key, name, entities[other]["tokens"]) for name, other in relations}
        else:
            items.add((*key, True) if level == "partial" and relations else key)
    return items


def rule_radgraph(candidates: list[str], references: list[str], level: str = "partial") -> list[float]:
    """Eq. 4's s_rg of each pair by rules, in [0, 1]. level: simple, partial or complete, as config.py says.

    F1 as `radgraph.rewards.compute_reward`, but two texts without an entity score 1 (the package: 0).
    """
    pairs = [(_items(c, level), _items(r, level)) for c, r in zip(candidates, references, strict=True)]
    return [2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0 for ours, theirs in pairs]
