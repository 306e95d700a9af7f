"""RadGraph by rules (Eq. 4's s_rg): entities and relations of a chest X-ray report without a model.

A lexicon of general chest X-ray English with negation, uncertainty and simple relations, in the layout and behind the
interface of the `radgraph` package. Enough for the phantom's English; on real reports it reads the common phrases only.
"""

import re
from collections import defaultdict
from functools import lru_cache

import numpy as np

OBSERVATION = set("""
    abnormal abnormalities abnormality adenopathy aeration air aspiration atelectasis atelectatic blunted
    blunting bronchiectasis calcification calcifications cannula cardiomegaly cath catheter catheters
    cavitation cephalization changes clear clip clips collapse congested congestion consolidation
    consolidations contusion crowding curvature defibrillator deformities deformity degenerative densities
    density device devices disease displacement drain ectasia ectatic edema effusion effusions electrode
    elevated elevation emphysema emphysematous engorgement enlarged enlargement expanded fibrosis flattened
    flattening fluid fracture fractured fractures generator graft granuloma granulomas hardware haze
    haziness hemothorax hernia hydropneumothorax hyperexpanded hyperinflated hyperinflation hyperlucent
    hypoinflated hypoinflation infection infiltrate infiltrates infiltration inflated intact kyphosis lead
    leads lesion lesions line lines lucency lymphadenopathy markings mass masses metastases metastasis
    midline nodularity nodule nodules normal opacification opacified opacities opacity osteopenia osteophyte
    osteophytes overload pacemaker pacer picc pneumonia pneumonias pneumonitis pneumothoraces pneumothorax
    port process processes prominence rounded scar scarring scoliosis sharp shift spondylosis spurring stent
    sternotomy sutures thickened thickening tip tortuosity tortuous tracheostomy tube tuberculosis tubes
    unfolded unremarkable valve volume volumes well wires""".split())
DEGREE = set("""
    active acute airspace asymmetric atherosclerotic bandlike big borderline bullous calcified cavitary
    chronic consolidative definite dense diffuse displaced faint focal gross grossly hazy increased
    increasing interstitial interval large larger layering linear loculated low marked massive mild mildly
    minimal minimally minor moderate moderately multifocal new nodular nondisplaced old patchy persistent
    probable prominent pronounced reduced residual scattered severe severely significant simple slight
    slightly small smaller solitary stable streaky subsegmental subtle tension tiny trace unchanged visible
    worsened worsening""".split())
ANATOMY = set("""
    abdomen acromioclavicular airway airways angle angles aorta aortic apex apices atrium base bases bone
    bones bony bronchial bronchovascular cardiac cardiomediastinal cardiophrenic cardiopulmonary
    cardiothoracic carina cava cavity chest clavicle contour contours costophrenic diaphragm diaphragms disc
    esophagus field fields fissure heart hemidiaphragm hemidiaphragmatic hemidiaphragms hemithorax hila
    hilar hilum humerus interstitium intrathoracic jugular lobe lobes lung lungs lymph mediastinal
    mediastinum osseous parenchyma pericardial pleura pleural pulmonary rib ribs scapula shoulder silhouette
    silhouettes size skeletal soft space spaces spine sternum structures subclavian svc thoracic thorax
    tissues trachea vascular vasculature vein vena venous ventricle vertebrae vertebral vessels zone zones""".split())
POSITION = set("""
    anterior anterolateral apical basal basilar biapical biapically bibasal bibasilar bilateral bilaterally
    both central dependent eighth fifth fourth inferior infrahilar lateral left lingula lingular lower
    medial mid middle ninth paratracheal perihilar peripheral posterior posterolateral retrocardiac
    retrosternal right second seventh sixth superior suprahilar tenth third upper""".split())
SUGGESTS = re.compile(
    r"\b(?:suggest\w*|consistent with|compatible with|represent\w*|reflect\w*|concerning for|suspicious for|due to)\b")
CUES = [  # (label, does the cue stand before what it governs?, pattern); of several the nearest to the entity wins
    ("definitely absent", True,
     r"no(?! (?:\w+ ){0,2}(?:change|changes|longer|increase)\b)|not(?! excluded)|without|free of|clear of|absence of"
     r"|absent|negative for|neither|nor|(?:exclude|rule)s? out|resolution of|resolved"),
    ("definitely absent", False,
     r"(?:is|are|was|were|has been|have been) (?:absent|excluded|ruled out|resolved"
     r"|not (?:\w+ )?(?:seen|identified|present|evident|visible|visualized|noted))"
     r"|(?:has|have) (?:resolved|cleared)|no longer (?:seen|present|visible)"),
    ("uncertain", True,
     r"possibl[ey]|probabl[ey]|likely|may|might|could|perhaps|suspected|suspicion of|question of|questionable|equivocal"
     r"|(?:can ?not|could not|not) (?:be )?(?:exclude|rule out)|suggest\w*|concerning for|suspicious for"
     r"|versus|vs|unlikely"),
    ("uncertain", False,
     r"(?:can ?not|could not) be (?:entirely )?(?:excluded|ruled out)|not excluded"
     r"|(?:is|are) (?:possible|suspected|likely|unlikely|questioned|not excluded)"),
]  # fmt: skip
CUES = [(label, before, re.compile(rf"\b(?:{pattern})\b")) for label, before, pattern in CUES]
CLAUSE_END = re.compile(
    r"[.!?;:]|\b(?:but|however|although|though|except|while|whereas|otherwise|yet)\b"
    r"|(?<!consistent )(?<!compatible )\bwith\b|\band(?= (?:the|there|a|an|heart|lungs)\b)"
    r"|,(?= (?:and )?(?:there|a|an|small|mild|moderate|large|severe|trace)\b)")
LINKS = re.compile(r"\b(?:is|are|was|were|appears?|remains?|seems?|has|have|demonstrates?|shows?|contains?)\b")
LISTED = re.compile(r",|\band\b")  # where the reach of "possible" ends
IN = set("in at of within along over on overlying involving throughout near across into".split())
GLUE = {"-", "/", "sided", "to", "the"}
LEXICON = {"observation": OBSERVATION, "degree": DEGREE, "anatomy": ANATOMY, "position": POSITION}
KINDS = {word: kind for kind, words in LEXICON.items() for word in words}


def _place(kinds: list[str], run: list[int]) -> int | None:
    """The anatomy (else the position word) of a run of token indices that is named last."""
    for wanted in ("anatomy", "position"):
        found = [i for i in run if kinds[i] == wanted]
        if found:
            return found[-1]
    return None


def _located_at(words: list[str], kinds: list[str], i: int) -> int | None:
    """Token index of the place of observation i: named just before it, after a preposition, or as its subject."""
    start = i
    while start and (kinds[start - 1] not in ("", "observation") or words[start - 1] in GLUE):
        start -= 1
    place = _place(kinds, list(range(start, i)))
    if place is not None:
        return place
    end = next((j for j in range(i + 1, len(words)) if kinds[j] == "observation"), len(words))
    for j in range(i + 1, end):
        if words[j] in IN:
            stop = j + 1
            while stop < end and (kinds[stop] or words[stop] in GLUE):
                stop += 1
            place = _place(kinds, list(range(j + 1, stop)))
            if place is not None:
                return place
    first = next((j + 1 for j in range(i - 1, -1, -1) if kinds[j] == "observation"), 0)
    place = _place(kinds, list(range(first, i)))
    linked = place is not None and LINKS.search(" ".join(words[place:i]))
    return place if linked else None


def _relations(words: list[str], kinds: list[str]) -> dict[int, list[tuple[str, int]]]:
    """RadGraph's relations inside one clause: token index -> [(relation, token index of its object)]."""
    found = defaultdict(list)
    observations = [i for i, kind in enumerate(kinds) if kind == "observation"]
    for i, kind in enumerate(kinds):
        target = None
        if kind == "degree" and observations:
            target = next((j for j in observations if j > i), observations[-1])
        elif kind == "position":
            stop = i + 1
            while stop < len(words) and (kinds[stop] in ("anatomy", "position") or words[stop] in GLUE):
                stop += 1
            run = list(range(i + 1, stop))
            target = next((j for j in run if kinds[j] == "anatomy"), _place(kinds, run))
        elif kind == "observation" and (place := _located_at(words, kinds, i)) is not None:
            found[i].append(("located_at", place))
        if target is not None:
            found[i].append(("modify", target))
    clause = " ".join(words)
    for cue in SUGGESTS.finditer(clause):
        at = len(clause[: cue.start()].split())
        before, after = [j for j in observations if j < at], [j for j in observations if j >= at]
        if before and after:
            found[before[-1]].append(("suggestive_of", after[0]))
    return found


def _certainty(clause: str, start: int, end: int) -> str:
    """Is what stands at clause[start:end] present, absent or uncertain? A cue behind it beats one before it."""
    nearest, label = -1, "definitely present"
    for name, before, pattern in CUES:
        for cue in pattern.finditer(clause):
            if before and nearest < cue.end() <= start:
                ended = name == "uncertain" and LISTED.search(clause[cue.end() : start])
                if ended or label == "definitely absent" and SUGGESTS.match(cue.group()):  # no opacity to suggest it
                    continue
                nearest, label = cue.end(), name
            elif not before and cue.start() >= end and not LINKS.search(clause[end : cue.start()]):
                nearest, label = len(clause), name
    return label


@lru_cache(maxsize=100_000)
def annotate(text: str) -> dict:
    """Entities and relations of a report in `radgraph`'s dict layout, one (lower-case) word an entity.

    Clauses are read one at a time; negation and uncertainty reach to the clause's end. Words outside the lexicon and
    headings are not read. Cached by text: do not change what it returns.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    joined, entities, offset = " ".join(words), {}, 0
    cuts = [0, *(cut.end() for cut in CLAUSE_END.finditer(joined)), len(joined)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        clause = joined[start:end]
        tokens = clause.split()
        heading = tokens[-1:] == [":"] and len(tokens) < 3
        kinds = ["" if heading else KINDS.get(token, "") for token in tokens]
        relations, read = _relations(tokens, kinds), [i for i, kind in enumerate(kinds) if kind]
        number = {i: str(len(entities) + n) for n, i in enumerate(read, 1)}  # token index -> entity id
        for i in read:
            label = "Anatomy::definitely present"
            if kinds[i] in ("observation", "degree"):
                begin = len(" ".join([*tokens[:i], ""])) + len(clause) - len(clause.lstrip())
                label = f"Observation::{_certainty(clause, begin, begin + len(tokens[i]))}"
            entities[number[i]] = {
                "tokens": tokens[i], "label": label, "start_ix": offset + i, "end_ix": offset + i,
                "relations": [[name, number[j]] for name, j in relations[i]]}  # fmt: skip
        offset += len(tokens)
    return {"text": joined, "entities": entities}


def _items(annotation: dict, level: str) -> set[tuple]:
    """What RadGraph F1 compares at `level`: entities, entities with whether they have a relation, or triples."""
    items, entities = set(), annotation["entities"]
    for entity in entities.values():
        key, relations = (entity["tokens"], entity["label"]), entity["relations"]
        if level == "complete" and relations:
            items |= {(key[0].lower(), key[1], name, entities[other]["tokens"].lower()) for name, other in relations}
        else:
            items.add((*key, True) if level == "partial" and relations else key)
    return items


def radgraph_f1(candidate: dict, reference: dict, level: str = "partial") -> float:
    """F1 of two annotations as `radgraph.rewards.compute_reward`, but two empty ones score 1 (the package: 0)."""
    ours, theirs = _items(candidate, level), _items(reference, level)
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0


class RuleRadGraph:
    """Eq. 4's s_rg behind the interface of `radgraph.F1RadGraph`, with `annotate` in the place of its model.

    scorer(hyps=[...], refs=[...]) -> (mean, scores, annotations of hyps, annotations of refs); all lists have one entry
    per pair (the package leaves empty reports out of the last two). Both empty = 1, one empty = 0.
    """

    def __init__(self, reward_level: str = "partial"):
        if reward_level not in ("simple", "partial", "complete"):
            raise ValueError(f"radgraph: reward level '{reward_level}' is none of simple, partial, complete")
        self.reward_level = reward_level

    def __call__(self, hyps: list[str], refs: list[str]) -> tuple[float, list[float], list[dict], list[dict]]:
        ours, theirs = [annotate(text) for text in hyps], [annotate(text) for text in refs]
        scores = [radgraph_f1(a, b, self.reward_level) for a, b in zip(ours, theirs, strict=True)]
        return float(np.mean(scores)) if scores else 0.0, scores, ours, theirs
