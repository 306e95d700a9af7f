"""The phantom's own models: layouts, texts with their labels, and that the fast paths equal the saved processors."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from data import batch_ids, load_studies
from evidence import reader
from formats.images import read_image
from model import encode_prompts
from phantom import assets, cache
from phantom.config import AssetsConfig, PhantomConfig, Recipe
from phantom.findings import LABELS
from phantom.world import build
from scorers.chexbert import CHEXPERT_LABELS
from scorers.expert import load_expert
from tiny import fit
from tiny import models as tiny_models


def test_normalise_is_the_saved_image_processor(micro):
    folder = cache.asset_dir(micro)
    studies = load_studies(replace(micro.data, path=str(folder / "data")), "test")[:3]
    pictures = [read_image(s.image) for s in studies]
    processor = AutoProcessor.from_pretrained(folder / "base")
    saved = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(assets.as_data(studies, 0).pixels(range(3)), saved, atol=1e-5, rtol=0)


def test_image_tokens_match_the_vision_tower(micro):
    processor = AutoProcessor.from_pretrained(cache.asset_dir(micro) / "base")
    inputs = encode_prompts(processor, [read_image_of(micro)], micro.data.prompt, "cpu")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == 16 and inputs["pixel_values"].shape == (1, 3, 64, 64)


def read_image_of(cfg):
    data = replace(cfg.data, path=str(cache.asset_dir(cfg) / "data"))
    return read_image(load_studies(data, "test")[0].image)


def test_the_tokenizer_reads_any_text_and_knows_the_tags(micro):
    tokenizer = AutoProcessor.from_pretrained(cache.asset_dir(micro) / "base").tokenizer
    for text in ("<report> FINDINGS: Small effusion. </report>", "naïve ünïcode 12.5% — ok"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("<report>", add_special_tokens=False)["input_ids"]) == 1
    kept = tokenizer.decode(tokenizer("<report> a </report>")["input_ids"], skip_special_tokens=True)
    assert "<report>" in kept  # the tags are text to be judged, not special tokens to be skipped


def test_word_pieces_are_the_same_each_time_and_know_every_word(tmp_path):
    corpus = ["Small left pleural effusion.", "No pneumothorax; heart size normal."]
    (tmp_path / "again").mkdir()
    tokenizer = tiny_models.word_piece(corpus, tmp_path)
    again = tiny_models.word_piece(corpus[::-1], tmp_path / "again")
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.tokenize("Small EFFUSION.") == ["small", "effusion", "."]
    assert tokenizer.tokenize("odd1") == ["o", "##d", "##d", "##1"] and tokenizer("x")["input_ids"][0] == 2


def test_the_pooled_tower_answers_for_the_mean_of_its_patches_alone(monkeypatch):
    """A stand-in tower of two patches, logits +2 and -2 of a label that is there: their mean says 1/2, each by itself
    1 / (1 + e^-2) and 1 / (1 + e^2)."""
    losses = []
    monkeypatch.setattr(fit, "fit", lambda model, loss, *rest: losses.append(loss([0]).item()))
    monkeypatch.setattr(fit.nn, "Linear", lambda *_: torch.nn.Identity())
    hidden = torch.tensor([9.0, 2.0, -2.0]).view(1, 3, 1)  # the class token is not asked
    tower = torch.nn.Module()
    tower.config, tower.forward = SimpleNamespace(hidden_size=1), lambda pixel_values: SimpleNamespace(
        last_hidden_state=hidden)  # fmt: skip
    for by in ("patches", "mean", "both"):
        fit.fit_tower(tower, lambda rows: torch.zeros(1, 1), torch.ones(1, 1) > 0, [0], 1, 0, by)
    each = (np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 2
    assert losses == pytest.approx([each, np.log(2), each + np.log(2)])


def test_by_length_keeps_every_row():
    texts = ["a" * n for n in (5, 1, 9, 3, 7)]
    assert fit.by_length([0, 1, 2, 3, 4], texts) == [[1, 3], [0], [4], [2]]
    assert fit.by_length([2, 1], texts) == [[1], [2]]


def test_batches_run_through_whole_epochs():
    seen = [i for step in range(5) for i in batch_ids(10, 4, seed=0, step=step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20])


def test_the_noisy_experts_reports_state_what_the_images_do_not_show(micro):
    recipe, data = cache.recipe_of(micro), cache.asset_dir(micro) / "data"
    labels = assets.as_data(assets.read_studies(data, "expert"), 5).labels
    (studies, _, stated, *_), again = (assets.expert_data(recipe, data, 1.0) for _ in range(2))
    texts = [study.report for study in studies]
    assert texts == [study.report for study in again.studies]  # the same each time
    assert stated.shape == labels.shape
    for text, row in zip(texts, stated, strict=True):
        counts = reader.truth_counts(text, [name for name, on in zip(LABELS, row, strict=True) if on])
        assert counts["hallucinated"] == counts["omitted"] == 0  # the labels are the text's
    invented = ((stated == 1) & (labels == 0)).sum() / stated.sum()
    assert 0.1 < invented < 0.45  # the references' rate is about .26


def test_labelled_texts_have_every_class_and_consistent_no_finding():
    texts, classes = assets.labelled_texts(PhantomConfig(), 0, 1500)
    assert len(texts) == 1500 and classes.shape == (1500, 14)
    for name in ("Cardiomegaly", "Edema", "Pleural Effusion", "Pneumothorax", "Consolidation", "Atelectasis",
                 "Lung Lesion", "Fracture"):  # fmt: skip
        assert (np.bincount(classes[:, CHEXPERT_LABELS.index(name)], minlength=4) > 40).all(), name
    other = [i for i, name in enumerate(CHEXPERT_LABELS) if name not in ("No Finding", "Support Devices")]
    abnormal = np.isin(classes[:, other], (1, 3)).any(axis=1)
    assert (classes[:, CHEXPERT_LABELS.index("No Finding")] == ~abnormal).all()


@pytest.mark.parametrize("size", [32, 96])
def test_the_models_take_images_of_another_size(size, tmp_path):
    steps = AssetsConfig(vision_steps=1, base_steps=1, expert_steps=1, labeller_steps=1)
    recipe = Recipe(PhantomConfig(expert=16, base=16, sft=1, train=1, val=1, test=0, image_size=size), steps, seed=0)
    build(recipe, tmp_path / "data")
    assert "test" not in json.loads((tmp_path / "data" / "annotation.json").read_text())  # and no study on the sheet
    for name, builder in (("base", assets.build_base), ("expert", assets.build_expert)):
        (tmp_path / name).mkdir()
        builder(recipe, tmp_path / name)
    assert load_expert(tmp_path / "expert").model.visual.image_size == (size, size)


def test_an_excerpt_is_mostly_the_impression():
    rng, report = np.random.default_rng(0), "FINDINGS: Small left effusion. IMPRESSION: Left effusion."
    drawn = Counter(assets.excerpt(report, rng) for _ in range(500))
    assert drawn.keys() == {report, "FINDINGS: Small left effusion.", "IMPRESSION: Left effusion."}
    assert 250 < drawn["IMPRESSION: Left effusion."] < 350 and 60 < drawn[report] < 140


def test_an_expert_learns_from_reports_as_noisy_as_it_is_said(tmp_path):
    """0: true reports of its own studies; 1: the references' rates; None: the policy's pairs, but for the measuring."""
    recipe = Recipe(PhantomConfig(expert=80, base=2, sft=30, train=20, val=2, test=2), AssetsConfig(), 0)
    build(recipe, tmp_path / "data")
    given = {noise: assets.expert_data(recipe, tmp_path / "data", noise) for noise in (0.0, 0.5, 1.0, None)}
    shown = given[0.0].labels
    wrong = {noise: (given[noise].labels != shown).sum().item() for noise in (0.0, 0.5, 1.0)}
    assert 0 == wrong[0.0] < wrong[0.5] < wrong[1.0]
    studies, images, labels, train, held, *_ = given[None]
    assert len(studies) == len(images) == len(labels) == 10 + 30 + 20
    assert (held, train) == (range(10), range(10, 60))  # however large the policy's splits are
    assert [s.split for s in studies] == ["expert"] * 10 + ["sft"] * 30 + ["train"] * 20
    told = json.loads((tmp_path / "data" / "annotation.json").read_text())
    assert [s.report for s in studies[10:]] == [row["report"] for row in told["sft"] + told["train"]]
