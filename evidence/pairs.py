"""Preference pairs out of a policy's own reports, for `train.py --stage dpo` (formats/preferences.py).

    python -m evidence.pairs --run R --out pairs.jsonl                 # text pairs, judged as in Stage 1
    python -m evidence.pairs --run R --out pairs.jsonl --by visual     # judged as in Stage 2
    python -m evidence.pairs --run R --out pairs.jsonl --visual        # visual pairs too; --mask expert on real data

Text pairs. The policy writes rollout.group_size candidates for each study of the RL split; the reward that GRPO gets
judges them against the reference's *text*, the clinical part always with it. The worst readable candidate is rejected,
the reference (which is judged, too; --chosen best: the best candidate) is preferred; the weight is the difference of
their rewards. MMedPO (arXiv 2412.06141) asks GPT-4o which sample contradicts the reference most, and several medical
LLMs for the weight.

Visual pairs. The reference stands on both sides; for the rejected one some pixels are replaced by noise. --mask truth:
the findings', by the phantom's exact masks, an *oracle* tool that real data do not have; weight 1. --mask expert: those
without which the frozen expert finds the reference less like the image; weight, how much less under the noise. MMedPO
takes a grounding model's heat map and its probability of disease.

Without --config, the settings are those the run was trained with; flags win.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from config import Config
from data import Study, describe_skips, load_studies
from evidence.generate import batches, generate_split
from evidence.inputs import begin, one_policy
from formats.images import read_image
from model import load_policy
from phantom.assets import resolve
from phantom.image import read_masks
from phantom.oracle import stand_in
from rewards import Scorers, compute_rewards, unwrap, wrap
from running import parallel
from running.folder import write_bytes, write_text
from scorers.load import load_scorers, may_judge

GRID = 8  # x 8 cells of the expert's heat map


@dataclass
class PairsConfig(Config):
    policy: str = "sft"  # whose candidates: base, a folder inside the run, or an adapter folder [ours]
    out: str = "pairs.jsonl"  # file of the pairs; the noised images of visual pairs stand in a folder beside it [ours]
    by: Literal["text", "visual"] = "text"  # judge by R_text (Eq. 5) or, with the frozen expert, R_vis (Eq. 8) [ours]
    chosen: Literal["reference", "best"] = "reference"  # preferred: it, or the best candidate [MMedPO: reference]
    visual: bool = False  # visual pairs too [MMedPO]
    # where their noise is: in a phantom's exact masks (an oracle), or where the frozen expert looks [ours]
    mask: Literal["truth", "expert"] = "truth"


def text_pair(candidates: list[str], reference: str, rewards: list[float], chosen: str) -> tuple[dict, str]:
    """({"chosen", "rejected", "weight"}, "") out of G raw candidates, or ({}, why there is none).

    rewards: those of the candidates, then the reference's where it is the one chosen. Of equal ones the first counts.
    """
    texts = [unwrap(output) for output in candidates]
    readable = [(reward, text) for reward, text in zip(rewards[: len(texts)], texts, strict=True) if text is not None]
    if not readable:
        return {}, "no readable candidate"
    best = (rewards[-1], reference) if chosen == "reference" else max(readable, key=lambda pair: pair[0])
    worst = min(readable, key=lambda pair: pair[0])
    if best[1] == worst[1]:
        return {}, "nothing worse than the chosen one"
    return {"chosen": best[1], "rejected": worst[1], "weight": round(max(0.0, best[0] - worst[0]), 6)}, ""


def text_pairs(outputs: list[list[str]], studies: list[Study], scorers: Scorers, cfg: PairsConfig) -> list[dict]:
    """The rows of text pairs of `studies` with their raw outputs [study][G]; prints how many have none, and why."""
    rows, skips, size = [], {}, cfg.eval.batch_size
    for some, groups in zip(batches(studies, size), batches(outputs, size), strict=True):
        last = [[wrap(study.report)] * (cfg.chosen == "reference") for study in some]
        judged = [[*group, *reference] for group, reference in zip(groups, last, strict=True)]
        images, ids = [read_image(study.image) for study in some], [study.id for study in some]
        given = judged, [study.report for study in some], images, ids, scorers, cfg.rewards
        # k = 0, a multiple of k_clin: the clinical part is in, unless k_clin = 0 turns it off
        rewards = compute_rewards(*given, k=0, stage=2 if cfg.by == "visual" else 1)[0]  # (B, G or G + 1)
        for study, group, values in zip(some, groups, rewards.tolist(), strict=True):
            row, why = text_pair(group, study.report, values, cfg.chosen)
            if why:
                skips.setdefault(why, []).append(study.id)
            else:
                rows.append({"id": study.id} | row)
    unreadable = sum(unwrap(output) is None for group in outputs for output in group)
    print(f"text pairs: {len(rows)} of {len(studies)} studies; {unreadable} of {sum(map(len, outputs))} candidates are "
          "not readable and were not taken" + (f"; none of {describe_skips(skips)}" if skips else ""))  # fmt: skip
    return rows


def noised(image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An "RGB" image whose pixels in `mask` (H, W) are replaced by grey noise of mean 0 and deviation 10, cut at 0: all
    but black [MMedPO's code]."""
    pixels, noise = np.array(image), rng.normal(0, 10, mask.shape).clip(0, 255)  # (H, W, 3), (H, W)
    pixels[mask] = noise[mask][:, None].astype(np.uint8)
    return Image.fromarray(pixels)


def expert_mask(image: Image.Image, study: Study, similarity: Callable) -> np.ndarray:
    """(H, W) bool: the cells of a grid whose cover, in the image's mean grey, takes from Eq. 6's similarity to the
    reference more than their mean and a standard deviation."""
    pixels = np.array(image)  # (H, W, 3)
    rows, columns = (np.arange(side) * GRID // side for side in pixels.shape[:2])  # (H,), (W,)
    cells, grey = rows[:, None] * GRID + columns, pixels.mean(axis=(0, 1)).astype(np.uint8)  # (H, W), (3,)
    covered = [Image.fromarray(np.where((cells == cell)[..., None], grey, pixels)) for cell in range(GRID**2)]
    ids = [study.id, *(f"{study.id}/{cell}" for cell in range(GRID**2))]
    found = similarity([image, *covered], ids, [[study.report]] * len(ids))[:, 0]  # (1 + cells,)
    fall = (found[0] - found[1:]).numpy()  # (cells,)
    return (fall > fall.mean() + fall.std())[cells]


def visual_pairs(studies: list[Study], cfg: PairsConfig, folder: Path, similarity: Callable | None) -> list[dict]:
    """The rows of visual pairs of `studies`, whose noised images are written into `folder`, beside the pairs' file.

    similarity: the expert's, Eq. 6, which makes masks and weights; None: exact masks, weights of 1.
    """
    rows, ids = [], [study.id for study in studies]
    masks = read_masks(Path(cfg.data.path), ids, "give --mask expert") if similarity is None else {}
    for number, study in enumerate(studies):
        image, weight = read_image(study.image), 1.0
        mask = expert_mask(image, study, similarity) if similarity else np.any([*masks[study.id].values()], axis=0)
        if mask.any():
            out, name = noised(image, mask, np.random.default_rng([cfg.seed, number])), f"{study.id}.png"
            if similarity is not None:
                s = similarity([image, out], [study.id, name], [[study.report]] * 2)[:, 0].tolist()
                weight = round(max(0.0, s[0] - s[1]), 6)
            out.save(file := io.BytesIO(), "PNG")
            write_bytes(folder / name, file.getvalue())
            rows.append({"id": study.id, "chosen": study.report, "rejected": study.report, "weight": weight,
                         "rejected_image": f"{folder.name}/{name}"})  # fmt: skip
    by = "the exact truth, an oracle" if similarity is None else "the frozen expert"
    print(f"visual pairs: {len(rows)} of {len(studies)} studies, the others have nothing to mask; masks by {by}")
    return rows


def make_pairs(cfg: PairsConfig) -> None:
    """Write the file of pairs; every process of a torchrun job writes reports, the first one judges and saves."""
    out, looks = Path(cfg.out), cfg.visual and cfg.mask == "expert"
    oracle, expert = cfg.scorers.expert == "oracle", cfg.by == "visual" or looks
    if looks and oracle:
        raise ValueError("--mask expert: the oracle looks at no image; name another by --scorers.expert")
    if flags := may_judge(cfg, with_expert=expert):
        raise ValueError(f"the phantom's scorers know nothing of {cfg.data.path}: name others by {', '.join(flags)}")
    if cfg.policy == "sft" and not (Path(cfg.run) / "sft" / "adapter").exists():
        raise ValueError(f"no {cfg.run}/sft/adapter: train the SFT policy first, by train.py --stage 0")
    adapter = one_policy(Path(cfg.run), cfg.policy)[1]
    cfg = parallel.broadcast(lambda: resolve(cfg, ("data", "base", "labeller", *["expert"] * expert)))
    studies, judge = load_studies(cfg.data, cfg.data.rl_split), stand_in(cfg, None) if expert and oracle else None
    model, processor = load_policy(cfg, adapter)
    outputs = generate_split(model, processor, studies, cfg, cfg.rollout.group_size, "candidates")
    if parallel.rank() == 0:
        scorers = load_scorers(cfg, model.device, with_expert=expert and not oracle)
        scorers.similarity = judge or scorers.similarity
        rows, folder = text_pairs(outputs, studies, scorers, cfg), out.with_name(f"{out.stem}_images")
        rows += visual_pairs(studies, cfg, folder, scorers.similarity if looks else None) if cfg.visual else []
        write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} pairs: {out}")
    parallel.barrier()


@parallel.script("pairs", "nothing was written")
def main() -> None:
    make_pairs(begin(PairsConfig(), __doc__))


if __name__ == "__main__":
    main()
