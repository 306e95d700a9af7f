"""Does a policy see a finding, even where its greedy report says little? It must choose between two sentences.

For each finding the policy's log-probability of a sentence that states it, less that of one without it, both as the
first sentence of the report (findings.toml), ranks the studies; the number is the area under the ROC curve of that
ranking against the truth: 0.5 for a policy that does not look, whatever it prefers to write.
"""

import numpy as np
import torch

from config import Config
from data import Study, read_views
from evidence.findings import SENTENCES
from evidence.generate import batches
from formats.gold import plain
from model import encode_prompts, get_base
from rewards import OPEN
from sft import text_logps
from vlm.families import encode_images
from vlm.fast_linear import fast_linears

LEAST = 5  # studies with a finding, below which its AUC is noise


@torch.no_grad()
def margins(model, processor, studies: list[Study], cfg: Config) -> dict[str, np.ndarray]:
    """{finding: (n,)}: log p(the sentence that states it) - log p(the one without it), given each study's image."""
    sentences, found = [*dict.fromkeys(text for pair in SENTENCES.values() for text in pair)], []
    texts = [f"{OPEN} {sentence}" for sentence in sentences]
    for some in batches(studies, cfg.eval.batch_size, "forced choice", delay=5, leave=False):
        inputs = encode_prompts(processor, [read_views(study) for study in some], cfg.data.prompt, model.device)
        with fast_linears(get_base(model)):
            inputs = encode_images(get_base(model), inputs)
            logps, mask, _ = text_logps(model, processor, inputs, texts * len(some), cfg)  # (B * S, T)
        ends = mask.sum(dim=1, keepdim=True) - 1  # of the EOS, which is no part of a first sentence
        found.append(logps.scatter(1, ends, 0.0).sum(dim=1).view(len(some), -1).cpu())  # (B, S)
    scores = torch.cat(found).double().numpy()  # (n, S)
    columns = {name: [sentences.index(text) for text in pair] for name, pair in SENTENCES.items()}
    return {name: scores[:, with_it] - scores[:, without] for name, (with_it, without) in columns.items()}


def placements(margin: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, 2) of margins (n,) and truth (n,) bool, the ratio of whose sums is the AUC: for a study with the finding the
    share of those without it that it outranks, else of those with it that outrank it, and its weight [DeLong 1988]."""
    above = (np.sign(margin[truth][:, None] - margin[~truth][None]) + 1) / 2  # (with it, without)
    parts = np.ones((len(margin), 2))
    parts[truth, 0], parts[~truth, 0] = above.mean(axis=1), above.mean(axis=0)
    return parts / (2 * np.where(truth, truth.sum(), (~truth).sum()))[:, None]


def forced_choice(model, processor, studies: list[Study], cfg: Config) -> tuple[dict, dict]:
    """({finding: AUC}, {"forced": (n, 2) statistics of their mean, as metrics.collect's}) of the findings that at least
    LEAST studies show and LEAST do not."""
    found, known = {}, [plain(study.labels) for study in studies]
    for name, margin in margins(model, processor, studies, cfg).items():
        truth = np.array([name in labels for labels in known])
        if LEAST <= truth.sum() <= len(truth) - LEAST:
            found[name] = placements(margin, truth)
    aucs = {name: float(part[:, 0].sum() / part[:, 1].sum()) for name, part in found.items()}
    return aucs, {"forced": sum(found.values()) / len(found)} if found else {}
