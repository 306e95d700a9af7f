"""The tokens on which BLEU, ROUGE-L and METEOR are counted (`eval.protocol`): a report's tokens, joined by blanks.

raw          Lower-case. A text in tokens already ("no effusion ."), as systems of the R2Gen family write it, is split
             at its blanks as pycocoevalcap splits it: each single blank for ROUGE-L, all white space for BLEU. Where a
             mark of either text touches the word before it ("No effusion."), both are prose: their tokens are the words
             (`\\w+`) and single punctuation marks. COCO's own tokenizer, a Java program, drops punctuation: not used.
r2gen        R2Gen's cleaning and cut for IU X-Ray [Chen et al. 2020, modules/tokenizers.py: clean_report_iu_xray,
             max_seq_length 60], on both sides. Its vocabulary (rare words are <unk>) belongs to a training set.
r2gen-mimic  the same for MIMIC-CXR: clean_report_mimic_cxr, max_seq_length 100.
"""

import re

NOTES = {
    "raw": "on whole texts (--eval.protocol raw)",
    "r2gen": "on texts cleaned and cut to 60 tokens as by R2Gen for IU X-Ray (--eval.protocol r2gen)",
    "r2gen-mimic": "on texts cleaned and cut to 100 tokens as by R2Gen for MIMIC-CXR (--eval.protocol r2gen-mimic)",
}
NUMBERING = [("1. ", ""), *((f". {k}. ", ". ") for k in "2345"), *((f" {k}. ", ". ") for k in "2345")]


def tokens(candidate: str, reference: str, protocol: str = "raw") -> tuple[str, str]:
    """The tokens of a pair of texts under a protocol, each joined by blanks."""
    if protocol != "raw":
        mimic = protocol == "r2gen-mimic"
        length = 100 if mimic else 60  # of a reference, R2Gen's start token is one of them
        return clean(candidate, mimic, length), clean(reference, mimic, length - 1)
    pair = candidate.lower(), reference.lower()
    if any(re.search(r"\w[.,:;?!](?=\s|$)", text) for text in pair):
        return tuple(" ".join(re.findall(r"\w+|[^\w\s]", text)) for text in pair)
    return pair


def clean(report: str, mimic: bool, length: int) -> str:
    """R2Gen's clean_report, the list's numbers dropped and " . " between sentences, cut to `length` tokens."""
    text = re.sub(" {2,}", " ", report.replace("\n", " ")) if mimic else report
    text = re.sub(r"\.{2,}", ".", text)
    for number, without in NUMBERING:
        text = text.replace(number, without)
    sentences = [re.sub(r"[\"/\\']", "", sentence).strip() for sentence in text.strip().lower().split(". ")]
    # theirs, with its range from colon to bracket, in which are < = > ? @; a hyphen stays
    sentences = [re.sub(r"[.,?;*!%^&_+():-\[\]{}]", "", sentence) for sentence in sentences]
    return " ".join((" . ".join(sentences) + " .").split()[:length])
