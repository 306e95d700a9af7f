"""Reports that no reinforcement learning was needed for, judged like a policy's: what VALOR must beat to be of use.

    python -m evidence.baselines --run R       # after evaluate.py --run R --policy base,sft

Each writes one report a study of the test split, which stands for its samples too. `base_grammar` and `majority` read
with the evaluation's own reader, and know the phantom's grammar: yardsticks, not methods.
"""

import sys
from pathlib import Path

import numpy as np

from config import Config
from data import Study, load_studies
from evidence.inputs import settings
from evidence.judge import Judge, Wanted, describe
from evidence.reader import UNSIDED, read_report
from evidence.tables import save
from formats.files import read_jsonl
from formats.images import read_image
from phantom.assets import resolve
from phantom.findings import finding_of
from phantom.world import write_report
from rewards import wrap
from scorers.expert import Expert, load_expert

BASELINES = {
    "base_grammar": "what the base's greedy caption states, put through the report grammar",
    "retrieved": "the reference of sft + train that the expert finds most like the image",
    "retrieved_clean": "the same among the expert's own, true reports",
    "best_of": "the SFT sample that the expert finds most like the image",
    "majority": "what more than half of the SFT samples state, put through the report grammar",
}


def stated_labels(text: str, rng: np.random.Generator) -> list[str]:
    """The labels that a text states; a side that it leaves open is drawn."""
    sides = {(name, side or (None if name in UNSIDED else str(rng.choice(["left", "right"]))))
             for name, side in sorted(read_report(text).stated, key=str)}  # fmt: skip
    return sorted(f"{name}_{side}" if side else name for name, side in sides)


def majority(samples: list[str], rng: np.random.Generator) -> list[str]:
    """The labels that more than half of a study's samples state."""
    votes = [label for sample in samples for label in stated_labels(sample, rng)]
    return sorted(label for label in set(votes) if 2 * votes.count(label) > len(samples))


def write_out(labels: list[str], cfg: Config, rng: np.random.Generator) -> str:
    """A report by the phantom's grammar that states exactly `labels`."""
    return write_report([finding_of(label, rng) for label in labels], rng, cfg.phantom, noisy=False)[0]


def retrieve(expert: Expert, studies: list[Study], reports: list[str]) -> list[str]:
    """For each study's image the report with the highest similarity (Eq. 6)."""
    texts = list(dict.fromkeys(reports))
    images = expert.image_features([read_image(s.image) for s in studies], [s.id for s in studies])  # (n, D)
    return [texts[i] for i in (images @ expert.text_features(texts).T).argmax(dim=1).tolist()]


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
        "base_grammar": [write_out(stated_labels(r["report"], rng), cfg, rng) for r in written["base"]],
        "retrieved": retrieve(expert, studies, references),
        "retrieved_clean": retrieve(expert, studies, [s.report for s in load_studies(cfg.data, "expert")]),
        "best_of": [group[i] for group, i in zip(samples, scores.argmax(dim=1).tolist(), strict=True)],
        "majority": [write_out(majority(group, rng), cfg, rng) for group in samples],
    }


def main() -> None:
    cfg = settings(Config(), sys.argv[1:], __doc__)
    try:
        split, cfg = cfg.data.test_split, resolve(cfg, ("data", "labeller", "expert"))
        studies, folder = load_studies(cfg.data, split), Path(cfg.run) / "eval" / split
        if studies[0].labels is None:
            raise ValueError(f"{cfg.data.path} has no exact labels: these baselines are the phantom's")
        wanted = Wanted(split, [s.id for s in studies], [s.report for s in studies], [s.labels for s in studies])
        judge = Judge(cfg, wanted)
        for name, reports in write_baselines(cfg, studies, folder).items():
            greedy = [[wrap(report)] for report in reports]
            sampled = [group * cfg.eval.samples for group in greedy]
            stats = {"greedy": judge.score(greedy, "greedy"), "sampled": judge.score(sampled, "sampled")}
            result = {"policy": name, "adapter": "", "settings": describe(cfg, wanted), "notes": judge.notes()}
            save(folder / name, result | judge.summarise(stats), judge.report_rows(greedy, sampled), stats)
            print(f"{name}: {BASELINES[name]}")
    except (ValueError, OSError) as error:
        sys.exit(f"baselines: {error!s:.1500}")


if __name__ == "__main__":
    main()
