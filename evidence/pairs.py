"""Preference pairs out of the SFT policy's own reports, for `train.py --stage dpo` (formats/preferences.py).

    python -m evidence.pairs --run R --out pairs.jsonl                 # text pairs, judged as in Stage 1
    python -m evidence.pairs --run R --out pairs.jsonl --by visual     # judged as in Stage 2
    python -m evidence.pairs --run R --out pairs.jsonl --visual        # visual pairs too, on the phantom

Text pairs. The SFT policy writes rollout.group_size candidates for each study of the RL split; the reward that GRPO
gets judges them and the reference, against the reference's *text*, the clinical part always with it. The worst readable
candidate is rejected, the reference (--chosen best: the best candidate) is preferred; the weight is the difference of
their rewards. MMedPO (arXiv 2412.06141) asks GPT-4o which sample contradicts the reference most, and several medical
LLMs for the weight.

Visual pairs. The reference stands on both sides; for the rejected one the findings' pixels are replaced by noise. The
masks are the phantom's exact ones: an *oracle* tool, which real data do not have. MMedPO takes the heat map of a
grounding model, and as the weight its probability of disease, here 1. Studies without findings get none.

Without --config, the settings are those the run was trained with; flags win.
"""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from config import Config
from data import Study, describe_skips, load_studies
from evidence.generate import generate_split
from evidence.inputs import settings
from formats.files import read_jsonl
from formats.images import read_image
from model import load_policy
from phantom.assets import resolve
from phantom.image import decode_mask
from phantom.oracle import exact_labels, oracle_similarity
from rewards import Scorers, compute_rewards, unwrap, wrap
from running import parallel
from running.folder import write_bytes, write_text
from scorers.load import load_scorers, may_judge


@dataclass
class PairsConfig(Config):
    out: str = "pairs.jsonl"
    """file of the pairs; the noised images of visual pairs stand in a folder beside it [ours]"""
    by: Literal["text", "visual"] = "text"
    """judge by R_text (Eq. 5), or by R_vis (Eq. 8), with the frozen expert [ours]"""
    chosen: Literal["reference", "best"] = "reference"
    """what is preferred: the reference, or the best candidate [MMedPO: reference]"""
    visual: bool = False
    """visual pairs too, through the exact masks of a phantom's truth.jsonl [MMedPO: a grounding model's heat map]"""


def text_pair(candidates: list[str], reference: str, rewards: list[float], chosen: str) -> tuple[dict, str]:
    """({"chosen", "rejected", "weight"}, "") out of G raw candidates, or ({}, why there is none).

    rewards: those of the candidates, then the reference's. Of equal rewards the first counts.
    """
    texts = [unwrap(output) for output in candidates]
    readable = [(reward, text) for reward, text in zip(rewards[:-1], texts, strict=True) if text is not None]
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
    for start in range(0, len(studies), size):
        some, groups = studies[start : start + size], outputs[start : start + size]
        judged = [[*group, wrap(study.report)] for group, study in zip(groups, some, strict=True)]
        images, ids = [read_image(study.image) for study in some], [study.id for study in some]
        given = judged, [study.report for study in some], images, ids, scorers, cfg.rewards
        # k = 0, a multiple of k_clin: the clinical part is in, unless k_clin = 0 turns it off
        rewards = compute_rewards(*given, k=0, stage=2 if cfg.by == "visual" else 1)[0]  # (B, G + 1)
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


def visual_pairs(studies: list[Study], cfg: PairsConfig, folder: Path) -> list[dict]:
    """The rows of visual pairs of `studies`, whose noised images are written into `folder`, beside the pairs' file.

    ValueError for a data set without exact masks.
    """
    truth, rows = Path(cfg.data.path) / "truth.jsonl", []
    found = {row.get("id"): row.get("findings") for row in (read_jsonl(truth) if truth.exists() else ())}
    for number, study in enumerate(studies):
        if not isinstance(found.get(study.id), list):
            raise ValueError(f"--visual: {truth} has no masks of study {study.id}; only a phantom's has any")
        masks = [decode_mask(finding["mask"]) for finding in found[study.id]]
        if masks:
            image = noised(read_image(study.image), np.any(masks, axis=0), np.random.default_rng([cfg.seed, number]))
            image.save(file := io.BytesIO(), "PNG")
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / f"{study.id}.png", file.getvalue())
            name = f"{folder.name}/{study.id}.png"
            rows.append({"id": study.id, "chosen": study.report, "rejected": study.report, "weight": 1.0,
                         "rejected_image": name})  # fmt: skip
    print(f"visual pairs: {len(rows)} of {len(studies)} studies, the others show no finding; masks by the exact truth")
    return rows


def make_pairs(cfg: PairsConfig) -> None:
    """Write the file of pairs; every process of a torchrun job writes reports, the first one judges and saves."""
    out, adapter, visual = Path(cfg.out), Path(cfg.run) / "sft" / "adapter", cfg.by == "visual"
    if flags := may_judge(cfg, with_expert=visual):
        raise ValueError(f"the phantom's scorers know nothing of {cfg.data.path}: name others by {', '.join(flags)}")
    if not adapter.exists():
        raise ValueError(f"no {adapter}: train the SFT policy first, by train.py --stage 0")
    oracle = visual and cfg.scorers.expert == "oracle"
    cfg = parallel.broadcast(lambda: resolve(cfg, ("data", "base", "labeller", *["expert", "expert_noisy"] * visual)))
    studies, exact = load_studies(cfg.data, cfg.data.rl_split), exact_labels(cfg) if oracle else {}
    model, processor = load_policy(cfg, adapter)
    outputs = generate_split(model, processor, studies, cfg, cfg.rollout.group_size, "candidates")
    if parallel.rank() == 0:
        scorers = load_scorers(cfg, model.device, with_expert=visual and not oracle)
        if oracle:
            scorers.similarity = oracle_similarity(exact)
        rows = text_pairs(outputs, studies, scorers, cfg)
        rows += visual_pairs(studies, cfg, out.with_name(f"{out.stem}_images")) if cfg.visual else []
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{len(rows)} pairs: {out}")
    parallel.barrier()


def main() -> None:
    cfg = settings(PairsConfig(), sys.argv[1:], __doc__)
    try:
        parallel.start(cfg.device, cfg.threads)
        make_pairs(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"pairs: {error!s:.1500}")
    except KeyboardInterrupt:
        sys.exit("pairs: interrupted; nothing was written")
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
