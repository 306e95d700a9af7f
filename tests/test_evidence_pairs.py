"""Pairs out of candidates by hand, and the whole command on the smallest phantom."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import DataConfig, DPOConfig, ModelConfig
from data import Study, load_studies
from evidence import pairs
from evidence.pairs import PairsConfig, expert_mask, make_pairs, noised, text_pair
from formats.preferences import read_pairs
from phantom.assets import resolve
from phantom.image import decode_mask, encode_mask
from rewards import wrap

REFERENCE = "No acute disease."


def test_the_worst_readable_candidate_is_rejected_by_hand():
    candidates = [wrap("Edema."), "<report> cut off", wrap("Clear."), wrap("Lesion."), wrap("Nodule.")]
    rewards = [0.5, 0.0, 1.5, 0.25, 0.25, 2.0]  # the last is the reference's
    assert text_pair(candidates, REFERENCE, rewards, "reference") == (
        {"chosen": REFERENCE, "rejected": "Lesion.", "weight": 1.75}, "")  # fmt: skip
    assert text_pair(candidates, REFERENCE, rewards, "best")[0] == {
        "chosen": "Clear.", "rejected": "Lesion.", "weight": 1.25}  # fmt: skip


def test_a_study_without_a_worse_report_gives_no_pair():
    assert text_pair(["babble", "<report>"], REFERENCE, [0.0, 0.0, 2.0], "reference") == ({}, "no readable candidate")
    right = [wrap(REFERENCE), wrap(REFERENCE)]
    assert text_pair(right, REFERENCE, [2.0, 2.0, 2.0], "reference") == ({}, "nothing worse than the chosen one")
    assert text_pair([wrap("Edema.")] * 2, REFERENCE, [0.5] * 3, "best")[1] == "nothing worse than the chosen one"


def test_a_reference_that_scores_below_its_candidates_stays_chosen_with_weight_0():
    row, _ = text_pair([wrap("Edema."), wrap("Clear.")], REFERENCE, [0.5, 0.75, 0.25], "reference")
    assert row == {"chosen": REFERENCE, "rejected": "Edema.", "weight": 0.0}


def test_noise_stays_inside_the_mask():
    image, mask = Image.new("RGB", (12, 10), (200, 100, 50)), np.zeros((10, 12), bool)
    mask[2:8, 3:9] = True
    out = np.array(noised(image, mask, np.random.default_rng(0)))
    assert (out[~mask] == (200, 100, 50)).all() and (out[mask] < 60).all() and out[mask].any()
    assert (out[mask][:, 0] == out[mask][:, 1]).all()  # grey
    assert np.array_equal(out, np.array(noised(image, mask, np.random.default_rng(0))))
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    assert not decode_mask(encode_mask(np.zeros((3, 4), bool))).any()


def test_the_experts_mask_is_where_it_looks():
    """An expert that looks at one cell alone, 4 x 5 pixels of an image of 32 x 40."""
    image = Image.fromarray(np.random.default_rng(0).integers(100, 200, (32, 40), dtype=np.uint8)).convert("RGB")
    corner = np.s_[4:8, 10:15]
    seen = np.array(image)[corner]

    def similarity(images, ids, groups):
        assert len(set(ids)) == len(images) == len(groups) == 65 and groups[0] == [REFERENCE]
        return torch.tensor([[float((np.array(shown)[corner] == seen).mean())] for shown in images])

    mask = expert_mask(image, Study("a", [], REFERENCE, "train"), similarity)
    assert mask.shape == (32, 40) and mask[corner].all() and mask.sum() == 20
    assert not expert_mask(image, Study("a", [], REFERENCE, "train"), lambda images, *_: torch.ones(65, 1)).any()


@pytest.fixture(scope="module")
def trained(micro, tmp_path_factory):
    """A run with an SFT policy."""
    cfg = replace(micro, run=str(tmp_path_factory.mktemp("pairs") / "run"), stage="0")
    train.train(resolve(cfg))
    return cfg


@pytest.fixture
def cfg(trained, tmp_path, monkeypatch):
    """Settings of the command, whose policy's babble is tagged as reports; [study][G] of what was written."""
    generate = pairs.generate_split

    def tagged(*args):
        return [[wrap(text.replace("<report>", "").replace("</report>", "") or "x") for text in group]
                for group in generate(*args)]  # fmt: skip

    monkeypatch.setattr(pairs, "generate_split", tagged)
    return PairsConfig(**vars(trained), out=str(tmp_path / "p" / "x.jsonl"))


@pytest.mark.parametrize("by, chosen", [("text", "reference"), ("visual", "best")])
def test_the_command_makes_pairs_that_dpo_reads(cfg, by, chosen, tmp_path, capsys):
    make_pairs(replace(cfg, by=by, chosen=chosen, visual=True))
    data = resolve(cfg).data
    studies = {study.id: study for study in load_studies(data, "train")}
    made = read_pairs(cfg.out)
    text, visual = ([p for p in made if bool(p.rejected_image) == sees] for sees in (False, True))
    assert len(text) + len(visual) == len(made) and text
    assert all(pair.weight >= 0 and pair.chosen != pair.rejected for pair in text)
    assert {pair.chosen == studies[pair.id].report for pair in text} == {chosen == "reference"}
    assert [pair.id for pair in visual] == [name for name, study in studies.items() if study.labels]
    truth = [json.loads(line) for line in (Path(data.path) / "truth.jsonl").read_text().splitlines()]
    found = {row["id"]: row["findings"] for row in truth}
    for pair in visual:
        assert pair.chosen == pair.rejected == studies[pair.id].report and pair.weight == 1
        assert pair.rejected_image == tmp_path / "p" / "x_images" / f"{pair.id}.png"
        changed = np.array(Image.open(pair.rejected_image).convert("L")) != np.array(Image.open(studies[pair.id].image))
        mask = np.any([decode_mask(finding["mask"]) for finding in found[pair.id]], axis=0)
        assert changed.any() and not changed[~mask].any()
    assert "masks by the exact truth, an oracle" in capsys.readouterr().out
    first = Path(cfg.out).read_text()
    make_pairs(replace(cfg, by=by, chosen=chosen, visual=True))
    assert Path(cfg.out).read_text() == first  # the same seed, the same pairs
    steps = DPOConfig(pairs=cfg.out, steps=1, batch_size=4, micro_batch=4, weighted=True)
    train.train(resolve(replace(cfg, stage="dpo", name=f"dpo_{by}", dpo=steps)))
    assert (Path(cfg.run) / f"dpo_{by}" / "adapter").exists()


def test_the_judge_is_the_reward_of_grpo_with_its_clinical_part(cfg, monkeypatch):
    asked, real = [], pairs.compute_rewards

    def compute(outputs, references, images, ids, scorers, rewards, k, stage):
        total, parts = real(outputs, references, images, ids, scorers, rewards, k=k, stage=stage)
        asked.append((len(outputs[0]), outputs[0][-1] == wrap(references[0]), "chexbert" in parts, "visual" in parts))
        return total, parts

    monkeypatch.setattr(pairs, "compute_rewards", compute)
    make_pairs(cfg)
    assert set(asked) == {(cfg.rollout.group_size + 1, True, True, False)}
    asked.clear()
    make_pairs(replace(cfg, by="visual"))
    assert set(asked) == {(cfg.rollout.group_size + 1, True, True, True)}
    asked.clear()
    make_pairs(replace(cfg, chosen="best", policy="base"))  # as many reward calls as GRPO's groups
    assert set(asked) == {(cfg.rollout.group_size, False, True, False)}


def test_the_oracle_takes_the_experts_place(cfg):
    oracle = replace(cfg, by="visual", scorers=replace(cfg.scorers, expert="oracle"))
    make_pairs(oracle)
    assert read_pairs(cfg.out)
    with pytest.raises(ValueError, match="--mask expert: the oracle looks at no image"):
        make_pairs(replace(oracle, visual=True, mask="expert"))


def test_the_expert_masks_where_there_is_no_truth(cfg, capsys):
    make_pairs(replace(cfg, visual=True, mask="expert"))
    visual = [pair for pair in read_pairs(cfg.out) if pair.rejected_image]
    assert visual and all(pair.weight >= 0 and pair.chosen == pair.rejected for pair in visual)
    assert "masks by the frozen expert" in capsys.readouterr().out


def test_what_is_lacking_is_one_line(cfg, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no .*nowhere/sft/adapter: train the SFT policy first"):
        make_pairs(replace(cfg, run=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="policy 'stage9': neither in .*run .* nor an adapter folder"):
        make_pairs(replace(cfg, policy="stage9"))
    with pytest.raises(ValueError, match="--policy base,sft: name one policy"):
        make_pairs(replace(cfg, policy="base,sft"))
    with pytest.raises(ValueError, match="the phantom's scorers know nothing of .*: name others by --scorers.chexbert"):
        make_pairs(replace(cfg, data=DataConfig(path=str(tmp_path)), model=ModelConfig(path=str(tmp_path))))
    monkeypatch.setattr(sys, "argv", ["pairs.py", "--run", str(tmp_path / "nowhere"), "--assets-dir", cfg.assets_dir])
    with pytest.raises(SystemExit, match="^pairs: no .*nowhere"):
        pairs.main()
