"""Where a policy looks: shares by hand, tokens under phrases, the recorded weights, the command and its pictures."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import write_qwen

import evaluate
from evidence import attention
from evidence.attention import Look, look, measure, share, summarise
from model import load_policy


def test_share_by_hand():
    """Four patches over 4 x 4 pixels: the mask lies half in a patch of weight .4, half in one of .1; all have .25."""
    weights, mask = np.array([[0.4, 0.1], [0.3, 0.2]]), np.zeros((4, 4), dtype=bool)
    mask[0, 1:3] = True
    assert share(weights, mask) == pytest.approx(1.0)
    mask[0, 2] = False
    assert share(weights, mask) == pytest.approx(1.6) and share(7 * weights, mask[:, ::-1]) == pytest.approx(0.4)
    assert share(np.full((2, 2), 0.1), mask) == pytest.approx(1.0)
    assert share(np.array([[3.0, 0.0, 0.0]]), np.arange(3)[None] == 0) == pytest.approx(3.0)


def half(side: str) -> np.ndarray:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:, slice(2, 4) if side == "left" else slice(0, 2)] = True  # the patient's left is on the image's right
    return mask


def looking(text: str, words: list[list[float]]) -> Look:
    """A report of one token a word, of which word t looks at the image's two halves by words[t], in two layers."""
    places = np.cumsum([0, *(len(word) for word in text.split(" "))]) + np.arange(len(text.split(" ")) + 1)
    return Look(text, places.tolist(), np.array([words, words])[:, :, None, :], np.zeros((4, 4)))


def test_what_is_measured_by_hand():
    """s1 states a left effusion that is there, looking at it with 3 of 4 parts, and an edema that is not."""
    masks = {"s1": {"effusion_left": half("left"), "fracture_right": half("right")},
             "s2": {"effusion_left": ~half("left")}, "s3": {"edema": np.ones((4, 4), dtype=bool)}}  # fmt: skip
    looks = {"s1": looking("Left effusion. Edema. Clear.", [[0.1, 0.3], [0.1, 0.3], [1, 0], [1, 0]]),
             "s2": looking("Normal.", [[1, 1]]), "s3": looking("Normal. Edema.", [[0, 1], [0.2, 0.2]])}  # fmt: skip
    first, second = measure(looks, masks)
    assert (first["id"], first["label"], first["tokens"]) == ("s1", "effusion_left", [0, 1])
    assert (first["own"], first["mirrored"], first["others"]) == pytest.approx((1.5, 0.5, 0.5))
    assert first["layers"] == pytest.approx([1.5, 1.5])
    assert (second["label"], second["own"], second["mirrored"], second["others"]) == ("edema", 1.0, None, None)
    found = summarise([first, second], seed=0)
    assert (found["findings"], found["studies"], found["share"]["value"]) == (2, 2, pytest.approx(1.25))
    assert found["own / mirrored"]["value"] == found["own / others'"]["value"] == pytest.approx(3.0)
    assert 1.0 <= found["share"]["lo"] < found["share"]["hi"] <= 1.5
    assert "| 2 (2) | 1.25 [1.00, 1.50] | 3.00" in " ".join(attention.markdown({"sft": found}, "").split())
    assert summarise([], seed=0) == {"findings": 0, "studies": 0}
    assert "n/a" in attention.markdown({"sft": summarise([], 0), "a": summarise([second], 0)}, "")


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def family(request, cfg, images, tmp_path):
    """(config, a picture, the grid of its patches) of each family."""
    if request.param == "llava":
        return cfg, images[0], (2, 2)
    write_qwen(tmp_path)
    model = dataclasses.replace(cfg.model, path=str(tmp_path))
    return dataclasses.replace(cfg, model=model), images[0].resize((140, 84)), (3, 5)  # patches of 2 x 14 pixels


def test_a_look_is_the_report_with_a_map_for_each_token(family):
    cfg, image, grid = family
    model, processor = load_policy(cfg)
    first, second = look(model, processor, [[image], [image.rotate(90)]], cfg, ["a", "b"])
    assert [[first.text], [second.text]] == evaluate.generate_reports(model, processor, [[image], [image.rotate(90)]],
                                                                      cfg, ids=["a", "b"])  # fmt: skip
    assert first.maps.shape == (2, len(first.places) - 1, *grid) and first.places[-1] == len(first.text)
    assert (first.maps > 0).all() and (first.maps.sum(axis=(2, 3)) < 1).all()
    assert first.during(0, len(first.text)) == list(range(len(first.places) - 1))
    assert first.picture.shape == ((32, 32) if grid == (2, 2) else (84, 140))
    with pytest.raises(ValueError, match="set data.views = 1"):
        look(model, processor, [[image, image]], cfg, ["a"])
    out, _, inputs = attention.rollout(model, processor, [[image]], ["a"], cfg, attention.EVALUATION, samples=0)
    extra = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    ids, prompt = torch.cat([inputs["input_ids"], out.completions], dim=1), inputs["input_ids"].shape[1]
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        extra["mm_token_type_ids"] = torch.cat([types, types.new_zeros(out.completions.shape)], dim=1)
    model.model.language_model.set_attn_implementation("eager")  # transformers' own weights of one plain forward
    plain = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True, **extra).attentions
    patches = inputs["input_ids"][0] == model.config.image_token_id
    for layer, weights in enumerate(plain):
        for t, seen in enumerate(first.maps[layer]):
            expected = weights[0].mean(dim=0)[prompt - 1 + t, :prompt][patches].view(grid)
            np.testing.assert_allclose(seen, expected.detach(), atol=1e-5)


def test_evaluate_draws_a_panel_a_sentence(family, tmp_path, capsys):
    cfg, image, _ = family
    image.save(tmp_path / "x.png")
    run = evaluate.EvalRun(**vars(dataclasses.replace(cfg, run=str(tmp_path / "run"))), policy="base",
                           image=str(tmp_path / "x.png"), attention=str(tmp_path / "new" / "out.png"))  # fmt: skip
    evaluate.report_image(run)
    with Image.open(run.attention) as drawn:
        assert drawn.width > 200 and len(drawn.convert("L").getcolors()) > 50
    assert "Not for clinical use" in capsys.readouterr().out
    monkey = SimpleNamespace(text="...", maps=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "look", lambda *_: [monkey])
        with pytest.raises(ValueError, match="--attention: the report of .*x.png has no sentence"):
            attention.draw_image(None, None, image, run, tmp_path / "y.png")


def test_the_command_measures_and_draws_a_run(micro, tmp_path, monkeypatch, capsys):
    """The tiny base babbles: put the truth's own words into its mouth, and let one token write them all."""
    truth, real = {}, attention.look

    def speaking(model, processor, images, cfg, ids):
        texts = [" ".join(f"{label.replace('_', ' ')}." for label in truth[name]) or "Clear." for name in ids]
        return [seen._replace(text=text, places=[0, *[len(text)] * (len(seen.places) - 1)])
                for seen, text in zip(real(model, processor, images, cfg, ids), texts, strict=True)]  # fmt: skip

    cfg = attention.AttentionRun(**vars(dataclasses.replace(micro, run=str(tmp_path))), policy="base",
                                 also="phantom:base_pooled")  # fmt: skip
    data = attention.resolve(cfg).data
    truth |= {study.id: study.labels for study in attention.load_studies(data, "test")}
    monkeypatch.setattr(attention, "look", speaking)
    attention.measure_run(cfg)
    found = json.loads((tmp_path / "attention/attention.json").read_text())
    assert found["policies"]["base"]["findings"] == sum(map(len, truth.values())) == len(found["findings"]["base"]) > 3
    assert found["policies"]["base_pooled"].keys() == found["policies"]["base"].keys()
    assert len({json.dumps(found["findings"][name]) for name in found["findings"]}) == 2  # another base, other maps
    assert "own / mirrored" in (tmp_path / "attention/attention.md").read_text() and "0.9" in capsys.readouterr().out
    assert (tmp_path / "attention/attention.png").stat().st_size > 10_000
    for also, said in (("elsewhere/base", "base is the name of a policy already"), ("nowhere", "nowhere")):
        with pytest.raises(ValueError, match=said):
            attention.measure_run(dataclasses.replace(cfg, also=also))
    studies = attention.load_studies(data, "test")
    monkeypatch.setattr(attention, "load_studies", lambda *_: studies)
    with pytest.raises(ValueError, match="no masks of study .*: only the phantom knows its findings' masks"):
        attention.measure_run(dataclasses.replace(cfg, data=dataclasses.replace(data, path=str(tmp_path))))
