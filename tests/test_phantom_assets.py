"""The phantom's own models: layouts, caching, and that the fast paths equal the saved processors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from config import Config
from data import batch_ids, load_studies, read_image
from evidence import reader
from phantom import assets
from phantom import models as tiny_models
from phantom import world as phantom
from running.folder import atomic_folder


def test_normalise_is_the_saved_image_processor(micro):
    folder = assets.asset_dir(micro)
    studies = load_studies(replace(micro.data, path=str(folder / "data")), "test")[:3]
    pictures = [read_image(s.image) for s in studies]
    grey = torch.from_numpy(np.stack([np.asarray(p.convert("L")) for p in pictures]))
    processor = AutoProcessor.from_pretrained(folder / "base")
    saved = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(assets.normalise(grey), saved, atol=1e-5, rtol=0)


def test_image_tokens_match_the_vision_tower(micro):
    processor = AutoProcessor.from_pretrained(assets.asset_dir(micro) / "base")
    from model import encode_prompts

    inputs = encode_prompts(processor, [read_image_of(micro)], micro.data.prompt, "cpu")
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs["input_ids"] == image_id).sum() == 16 and inputs["pixel_values"].shape == (1, 3, 64, 64)


def read_image_of(cfg):
    data = replace(cfg.data, path=str(assets.asset_dir(cfg) / "data"))
    return read_image(load_studies(data, "test")[0].image)


def test_the_tokenizer_reads_any_text_and_knows_the_tags(micro):
    tokenizer = AutoProcessor.from_pretrained(assets.asset_dir(micro) / "base").tokenizer
    for text in ("<report> FINDINGS: Small effusion. </report>", "naïve ünïcode 12.5% — ok"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer("<report>", add_special_tokens=False)["input_ids"]) == 1
    kept = tokenizer.decode(tokenizer("<report> a </report>")["input_ids"], skip_special_tokens=True)
    assert "<report>" in kept  # the tags are text to be judged, not special tokens to be skipped


def test_settings_have_folders_of_their_own(micro):
    assert assets.asset_dir(micro) == assets.asset_dir(replace(micro, seed=5, run="elsewhere"))
    assert assets.asset_dir(micro) != assets.asset_dir(replace(micro, assets_seed=5))
    assert assets.asset_dir(micro) != assets.asset_dir(replace(micro, phantom=replace(micro.phantom, hedge=0.5)))


def test_resolve_leaves_other_paths_alone():
    cfg = Config()
    cfg.data.path, cfg.model.path = "/data/iu", "org/model"
    resolved = assets.resolve(cfg, needs=())
    assert (resolved.data.path, resolved.model.path) == ("/data/iu", "org/model")
    assert resolved.scorers.chexbert.endswith("labeller/chexbert.pth") and cfg.scorers.chexbert.startswith("phantom:")


def test_a_failed_build_leaves_nothing_that_looks_complete(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "asset") as tmp:
        (tmp / "half").write_text("x")
        raise KeyboardInterrupt
    assert not (tmp_path / "asset").exists()
    with atomic_folder(tmp_path / "asset") as tmp:
        assert list(tmp.iterdir()) == []


def test_word_pieces_are_the_same_each_time_and_know_every_word(tmp_path):
    corpus = ["Small left pleural effusion.", "No pneumothorax; heart size normal."]
    (tmp_path / "again").mkdir()
    tokenizer = tiny_models.word_piece(corpus, tmp_path)
    again = tiny_models.word_piece(corpus[::-1], tmp_path / "again")
    assert tokenizer.get_vocab() == again.get_vocab()
    assert tokenizer.tokenize("Small EFFUSION.") == ["small", "effusion", "."]
    assert tokenizer.tokenize("odd1") == ["o", "##d", "##d", "##1"] and tokenizer("x")["input_ids"][0] == 2


def test_by_length_keeps_every_row():
    texts = ["a" * n for n in (5, 1, 9, 3, 7)]
    parts = assets.by_length([0, 1, 2, 3, 4], texts, 2)
    assert sorted(sum(parts, [])) == [0, 1, 2, 3, 4] and parts[0] == [1, 3, 0]


def test_batches_run_through_whole_epochs():
    seen = [i for step in range(5) for i in batch_ids(10, 4, seed=0, step=step)]
    assert sorted(seen[:10]) == list(range(10)) == sorted(seen[10:20])


def test_the_noisy_experts_reports_state_what_the_images_do_not_show(micro):
    studies, _, labels = assets.read_assets_data(micro, "expert")
    texts, stated = assets.noisy_reports(micro, studies)
    assert texts == assets.noisy_reports(micro, studies)[0]  # the same each time
    assert stated.shape == labels.shape
    for text, row in zip(texts, stated, strict=True):
        counts = reader.truth_counts(text, [name for name, on in zip(phantom.LABELS, row, strict=True) if on])
        assert counts["hallucinated"] == counts["omitted"] == 0  # the labels are the text's
    invented = ((stated == 1) & (labels == 0)).sum() / stated.sum()
    assert 0.1 < invented < 0.45  # the references' rate is about .26
