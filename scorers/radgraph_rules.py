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
# A clause's words as letters: (o)bservation, (d)egree, (a)natomy, (p)osition, (i)n and its like, (g)lue
LETTERS = dict.fromkeys(LEXICON["in"], "i") | dict.fromkeys(LEXICON["glue"], "g") | {w: KINDS[w][0] for w in KINDS}
# Where the word stands that another one's relation leads to: each match ends with it. A place is an anatomy, else a
# position word: the last of a run of words, for an observation just before it, behind a preposition or as its subject
JUST_BEFORE, BEHIND = re.compile("a(?=[dpg]*$)|p(?=[dg]*$)"), re.compile("i(?:[dapg]*a|[dpg]*p)")
SUBJECT, SAME_PLACE = re.compile(".*a|.*p"), re.compile("[pg]*a|[pg]*p")  # the latter of a position word
NEXT, LAST = re.compile(".*?o"), re.compile(".*o")  # observation
SUGGESTS, LINKS = (re.compile(WORDS.format("|".join(LEXICON[name]))) for name in ("suggests", "links"))
CUES = [(c["label"], c["stands"], re.compile(WORDS.format("|".join(c["phrases"])))) for c in LEXICON["cues"]]
CLAUSE_END = re.compile("|".join(LEXICON["clause_ends"]))
LONGEST = 100  # words of a clause read together, at their square's cost; those of 23,000 reports have at most 34


def _located_at(words: list[str], letters: str, i: int) -> re.Match | None:
    """The place of observation i, as a match that ends with it."""
    first, end = letters.rfind("o", 0, i) + 1, f"{letters}o".find("o", i + 1)
    place = JUST_BEFORE.search(letters, first, i) or BEHIND.search(letters, i + 1, end)
    subject = SUBJECT.match(letters, first, i)
    if not place and subject and LINKS.search(" ".join(words[subject.end() - 1 : i])):
        return subject
    return place


def _relations(words: list[str], letters: str) -> dict[int, list[tuple[str, int]]]:
    """RadGraph's relations inside one clause: word's index -> [(relation, index of its object)]."""
    found, clause = defaultdict(list), " ".join(words)
    for i, letter in enumerate(letters):
        target = None
        if letter == "d":
            target = NEXT.match(letters, i) or LAST.match(letters)
        elif letter == "p":
            target = SAME_PLACE.match(letters, i + 1)
        elif letter == "o":
            target = _located_at(words, letters, i)
        if target:
            found[i].append(("located_at" if letter == "o" else "modify", target.end() - 1))
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
