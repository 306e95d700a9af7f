"""Prior spill, and what a finding does for its own statement: the same film with and without it, on the phantom.

    python -m evidence.spill --run runs/phantom                                  # base and every stage of the run
    python -m evidence.spill --run R --policy sft,stage2 --pairs 160

A study with both findings of a language prior, its cause and its guess, is filmed as it is, without the guess, and
without both (world.counterfactuals). Of each film a policy writes eval.samples reports, with the same random numbers.
P is the share of reports that state a finding; all priors weigh alike where --pairs is a multiple of their number, 16.

    prior_spill       P(guess | cause alone) - P(guess | neither)    who looks: 0; who writes by prior: the prior's rate
    own_effect_prior  P(guess | both) - P(guess | cause alone)       who looks: 1; who writes by prior: 0
    own_effect        P(cause | cause alone) - P(cause | neither)    where nothing in the film suggests the cause

Counts by study in `<run>/eval/spill/<policy>/`, from where --compare and the sweep take them: metrics.SPILL_KEYS. The
films are the same for all seeds and arms of one world. Without --config, the settings are those of the run's training.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from config import AtLeastOne, Config, to_dict
from data import Study
from evidence.generate import batches, generate_split
from evidence.inputs import begin, find_policies
from evidence.metrics import stated_labels, summarise
from evidence.statistics import spread
from evidence.tables import columns, save
from model import load_policy
from phantom.assets import resolve
from phantom.cache import asset_dir
from phantom.world import PRIORS, counterfactuals
from rewards import strip_tags
from running import parallel

Studies = list[tuple[str, str, list[str], list[np.ndarray]]]  # counterfactuals': cause, guess, labels, three images


@dataclass
class SpillRun(Config):
    policy: str = ""  # as evaluate.py's; empty = base and all of the run [ours]
    pairs: AtLeastOne = 160  # studies, each filmed three times [ours]


def tally(studies: Studies, outputs: list[list[list[str]]]) -> np.ndarray:
    """(n, 7) metrics.SPILL_KEYS of each study: how many of its K reports a film state the guess, and the cause; the
    latter only in studies without another finding whose guess, by prior, is the cause."""
    rows = []
    for (cause, guess, labels, _), films in zip(studies, outputs, strict=True):
        said = [[stated_labels(strip_tags(text), labels) for text in texts] for texts in films]
        guesses, causes = ([sum(label in stated for stated in film) for film in said] for label in (guess, cause))
        others, k = {*labels} - {guess}, len(films[0])
        free = not any(other in others and suggested == cause for _, other, suggested in PRIORS)
        rows.append([k, *guesses[::-1], *(free * count for count in (k, causes[2], causes[1]))])
    return np.array(rows, float)


@parallel.script("spill")
def main() -> None:
    cfg = begin(SpillRun(), __doc__)
    policies, cfg = find_policies(Path(cfg.run), cfg.policy), resolve(cfg, ("base",))
    studies = [counterfactuals(cfg.phantom, cfg.assets_seed, index) for index in range(cfg.pairs)]
    films = [Study(f"spill{i}", [Image.fromarray(image).convert("RGB")], "", "spill")  # one id: the same random numbers
             for i, study in enumerate(studies) for image in study[3]]  # fmt: skip
    shared = {"split": "spill", "n": len(studies), "seed": cfg.seed, "assets": asset_dir(cfg).name,
              "rollout": to_dict(cfg.rollout), "eval": {"samples": cfg.eval.samples}}  # fmt: skip
    for name, adapter in policies.items():
        model, processor = load_policy(cfg, adapter)
        outputs = generate_split(model, processor, films, cfg, cfg.eval.samples, f"{name}: with and without",
                                 lambda film: film.images)  # fmt: skip
        outputs = [*batches(outputs, 3)]  # [study][film][K]
        stats = {"sampled": {"spill": tally(studies, outputs)}}
        found = summarise(stats, (), cfg.eval.bootstrap, cfg.seed)
        rows = [{"cause": cause, "guess": guess, "labels": labels, "films": films}
                for (cause, guess, labels, _), films in zip(studies, outputs, strict=True)]  # fmt: skip
        result = {"policy": name, "adapter": str(adapter or ""), "settings": shared} | found
        save(Path(cfg.run) / "eval" / "spill" / name, result, rows, stats)
        numbers = [(c, c.entry(found)) for c in columns("pairs") if c.entry(found)]
        print(f"{name}: " + ", ".join(f"{c.flat} {spread(e | {'mean': e['value']}, c.factor)}" for c, e in numbers))


if __name__ == "__main__":
    main()
