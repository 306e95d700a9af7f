"""Reports that no reinforcement learning was needed for, judged like a policy's: what VALOR must beat to be of use.

    python -m evidence.baselines --run R       # after evaluate.py --run R --policy base,sft

Each writes one report a study of the test split, which stands for its samples too. `base_grammar` and `majority` read
with the evaluation's own reader, and know the phantom's grammar: yardsticks, not methods. On any data with gold labels,
COPIES are reports of the training split for `evaluate.py --policy nearest,retrieved`.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config
from data import Study, load_studies
from evidence.inputs import begin
from evidence.judge import Judge, Wanted
from evidence.metrics import stated_labels
from formats.files import read_jsonl
from formats.images import read_image
from phantom.assets import resolve
from phantom.findings import finding_of
from phantom.world import write_report
from rewards import wrap
from running import parallel
from scorers.expert import CrossFitted, Expert, fold_of, load_expert

SIDE = 32  # pixels at which films are compared
BASELINES = {
    "base_grammar": "what the base's greedy caption states, put through the report grammar",
    "retrieved": "the reference of sft + train that the expert finds most like the image",
    "retrieved_clean": "the same among the expert's own, true reports",
    "best_of": "the SFT sample that the expert finds most like the image",
    "majority": "what more than half of the SFT samples state, put through the report grammar",
}


def nearest(cfg: Config, studies: list[Study]) -> list[str]:
    """For each study the report of the training film whose pixels are the nearest."""
    known = load_studies(cfg.data, cfg.data.rl_split)
    ours, theirs = (torch.from_numpy(np.stack([small(s.image) for s in of])) for of in (studies, known))
    return [known[i].report for i in torch.cdist(ours, theirs).argmin(dim=1).tolist()]


def small(path: Path) -> np.ndarray:
    """A film in SIDE x SIDE grey values of mean 0 and deviation 1, flat, so that exposure does not count."""
    grey = np.array(read_image(path).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32).ravel()
    return (grey - grey.mean()) / max(grey.std(), 1.0)


def retrieve(expert: Expert | CrossFitted, studies: list[Study], reports: list[str]) -> list[str]:
    """For each study's image the report with the highest similarity (Eq. 6), by the expert that never saw the study."""
    texts, found = list(dict.fromkeys(reports)), {}
    experts = expert.experts if isinstance(expert, CrossFitted) else [expert]
    for fold, one in enumerate(experts):
        known = one.text_features(texts)  # (R, D)
        for study in (study for study in studies if fold_of(study.id, len(experts)) == fold):
            image = one.image_features([read_image(study.image)], [study.id])[0]  # (D,)
            found[study.id] = texts[int((known @ image).argmax())]
    return [found[study.id] for study in studies]


def retrieved(cfg: Config, studies: list[Study]) -> list[str]:
    """For each study the training report that the frozen expert finds the most similar to the image."""
    reports = [study.report for study in load_studies(cfg.data, cfg.data.rl_split)]
    return retrieve(load_expert(cfg.scorers.expert), studies, reports)


COPIES = {"nearest": nearest, "retrieved": retrieved}


def majority(samples: list[str], rng: np.random.Generator) -> list[str]:
    """The labels that more than half of a study's samples state."""
    votes = [label for sample in samples for label in stated_labels(sample, rng=rng)]
    return sorted(label for label in set(votes) if 2 * votes.count(label) > len(samples))


def write_out(labels: Collection[str], cfg: Config, rng: np.random.Generator) -> str:
    """A report by the phantom's grammar that states exactly `labels`."""
    return write_report([finding_of(label, rng) for label in sorted(labels)], rng, cfg.phantom, noisy=False)[0]


def write_baselines(cfg: Config, studies: list[Study], folder: Path) -> dict[str, list[str]]:
    """{name: one report a study} of all BASELINES. ValueError where base or sft has not been evaluated in `folder`."""
    written, rng = {}, np.random.default_rng(cfg.seed)
    for name in ("base", "sft"):
        path = folder / name / "reports.jsonl"
        if not path.exists():
            raise ValueError(f"no {path}: first evaluate.py --run {cfg.run} --policy base,sft")
        rows = {row["id"]: row for row in read_jsonl(path)}
        if lost := [s.id for s in studies if not rows.get(s.id, {}).get("samples")]:
            raise ValueError(f"{path}: no samples of study {lost[0]}: evaluate it with --eval.samples above 0")
        written[name] = [rows[s.id] for s in studies]
    expert, samples = load_expert(cfg.scorers.expert), [row["samples"] for row in written["sft"]]
    references = [s.report for split in (cfg.data.sft_split, cfg.data.rl_split) for s in load_studies(cfg.data, split)]
    scores = expert.similarity([read_image(s.image) for s in studies], [s.id for s in studies], samples)  # (n, K)
    return {
        "base_grammar": [write_out(stated_labels(row["report"], rng=rng), cfg, rng) for row in written["base"]],
        "retrieved": retrieve(expert, studies, references),
        "retrieved_clean": retrieve(expert, studies, [s.report for s in load_studies(cfg.data, "expert")]),
        "best_of": [group[i] for group, i in zip(samples, scores.argmax(dim=1).tolist(), strict=True)],
        "majority": [write_out(majority(group, rng), cfg, rng) for group in samples],
    }


@parallel.script("baselines")
def main() -> None:
    cfg = begin(Config(), __doc__)
    split, cfg = cfg.data.test_split, resolve(cfg, ("data", "labeller", "expert"))
    studies, folder = load_studies(cfg.data, split), Path(cfg.run) / "eval" / split
    if studies[0].labels is None:
        raise ValueError(f"{cfg.data.path} has no exact labels: these baselines are the phantom's")
    judge = Judge(cfg, Wanted.of(split, studies))
    for name, reports in write_baselines(cfg, studies, folder).items():
        greedy = [[wrap(report)] for report in reports]
        sampled = [group * cfg.eval.samples for group in greedy]
        judge.save(folder / name, {}, greedy, sampled, judge.rows(greedy, sampled))
        print(f"{name}: {BASELINES[name]}")


if __name__ == "__main__":
    main()
