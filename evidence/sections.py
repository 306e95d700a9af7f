"""What the two sections of a report, and its sentences, say of each other.

The reader takes a report as a whole, so a finding that the IMPRESSION adds, or takes back, hides behind the other
section. Here it reads each section alone.
"""

import re
from collections import Counter

from evidence.reader import Reading, read_report, split_sentences

SECTION_KEYS = ("reports", "disagreeing", "stated", "contradicted", "impression_only")
HEADER = re.compile(r"\b(findings|impression)\s*:", re.IGNORECASE)


def split_sections(text: str) -> dict[str, str]:
    """{header in lower case, "" before the first: what stands under it}; two sections of one name are one."""
    name, *rest = HEADER.split(text)
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
