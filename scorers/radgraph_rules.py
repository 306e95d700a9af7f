"""RadGraph by rules (Eq. 4's s_rg): entities and relations of a chest X-ray report without a model.

A lexicon of general chest X-ray English with negation, uncertainty and simple relations. Enough for the phantom's
English; on real reports it reads the common phrases only.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path

WORDS = r"\b(?:{})\b"  # a pattern of phrases, which stand between two word boundaries
LEXICON = tomllib.loads(Path(__file__).with_name("radgraph_lexicon.toml").read_text(encoding="utf-8"))
KINDS = {word: kind for kind, words in LEXICON["words"].items() for word in words.split()}
IN, GLUE = set(LEXICON["in"]), set(LEXICON["glue"])
SUGGESTS, LINKS = (re.compile(WORDS.format("|".join(LEXICON[name]))) for name in ("suggests", "links"))
CUES = [(c["label"], c["stands"], re.compile(WORDS.format("|".join(c["phrases"])))) for c in LEXICON["cues"]]
CLAUSE_END = re.compile("|".join(LEXICON["clause_ends"]))
LONGEST = 100  # words of a clause read together, at their square's cost; those of 23,000 reports have at most 34


def _place(kinds: list[str], run: Iterable[int]) -> int | None:
    """The anatomy (else the position word) that stands last among the token indices `run`, if there is one."""
    last = {kinds[i]: i for i in sorted(run)}
    return last.get("anatomy", last.get("position"))


def _located_at(words: list[str], kinds: list[str], i: int) -> int | None:
    """Token index of the place of observation i: named just before it, after a preposition, or as its subject."""
    first = next((j + 1 for j in range(i - 1, -1, -1) if kinds[j] == "observation"), 0)
    end = next((j for j in range(i + 1, len(words)) if kinds[j] == "observation"), len(words))
    behind = (range(j + 1, end) for j in range(i + 1, end) if words[j] in IN)
    for run in (range(i - 1, first - 1, -1), *behind):
        place = _place(kinds, takewhile(lambda j: kinds[j] or words[j] in GLUE, run))
        if place is not None:
            return place
    subject = _place(kinds, range(first, i))
    return subject if subject is not None and LINKS.search(" ".join(words[subject:i])) else None


def _relations(words: list[str], kinds: list[str]) -> dict[int, list[tuple[str, int]]]:
    """RadGraph's relations inside one clause: token index -> [(relation, token index of its object)]."""
    found = defaultdict(list)
    observations = [i for i, kind in enumerate(kinds) if kind == "observation"]
    for i, kind in enumerate(kinds):
        relation, target = "modify", None
        if kind == "degree" and observations:
            target = next((j for j in observations if j > i), observations[-1])
        elif kind == "position":
            behind = range(i + 1, len(words))
            run = list(takewhile(lambda j: kinds[j] in ("anatomy", "position") or words[j] in GLUE, behind))
            target = next((j for j in run if kinds[j] == "anatomy"), _place(kinds, run))
        elif kind == "observation":
            relation, target = "located_at", _located_at(words, kinds, i)
        if target is not None:
            found[i].append((relation, target))
    clause = " ".join(words)
    for cue in SUGGESTS.finditer(clause):
        at = clause.count(" ", 0, cue.start())  # the cue's token index; it links the observations around it
        for i, j in (pair for pair in pairwise(observations) if pair[0] < at <= pair[1]):
            found[i].append(("suggestive_of", j))
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
        kinds = ["" if heading else KINDS.get(word, "") for word in words]
        relations, read = _relations(words, kinds), [i for i, kind in enumerate(kinds) if kind]
        number = {i: str(n) for n, i in enumerate(read, len(entities) + 1)}  # word's index -> entity id
        for i in read:
            seen = kinds[i] in ("observation", "degree")
            label = f"Observation::{_certainty(words, i)}" if seen else "Anatomy::definitely present"
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
