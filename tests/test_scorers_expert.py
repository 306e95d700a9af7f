"""The frozen expert on tiny random open_clip models in their real on-disk layouts."""

import dataclasses
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.push_to_hf_hub import save_for_hf
from PIL import Image
from safetensors.torch import save_file
from test_running_weights import flip_a_weight
from transformers import BertConfig, BertTokenizer

from scorers import expert
from tiny import models as tiny_models

torch.set_num_threads(1)
PREPROCESS = dataclasses.asdict(open_clip.transform.PreprocessCfg())
WORDS = ("the lungs are clear there is a small large left right pleural effusion no pneumothorax heart normal "
         "seen .").split()  # fmt: skip
SENTENCES = ["The lungs are clear.", "There is a small left pleural effusion.", "No pneumothorax is seen.",
             "The heart is normal."]  # fmt: skip


def save(model, config, tokenizer, folder):
    """open_clip's own way to write a folder."""
    open_clip.set_model_preprocess_cfg(model, PREPROCESS | config["preprocess_cfg"])
    save_for_hf(model, tokenizer, config["model_cfg"], folder, safe_serialization=True)


def write_tokenizer(folder):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_native(folder, context=16):
    """The phantom's layout: native CLIP over a BERT tokenizer. Returns the model that was saved."""
    tokenizer = write_tokenizer(folder)
    config = tiny_models.clip_config(len(tokenizer), tokenizer.sep_token_id, image_size=64)
    config["model_cfg"]["vision_cfg"] |= {"layers": 1, "width": 32, "head_width": 16}
    config["model_cfg"]["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2, "context_length": context}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config["model_cfg"]).eval()
    save(model, config, tokenizer, folder)
    return model


def build_biomedclip(folder, context=16):
    """BiomedCLIP's layout: timm ViT, Hugging Face BERT named as on the hub, its config.json in the folder."""
    tokenizer = write_tokenizer(folder)
    bert = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64)  # fmt: skip
    bert.save_pretrained(folder)
    text = {"hf_model_name": "microsoft/no-such-bert", "hf_tokenizer_name": "microsoft/no-such-bert", "hf_proj_type":
            "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": context}  # fmt: skip
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "",
              "timm_proj": "linear", "image_size": 160}  # fmt: skip
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 160}}
    torch.manual_seed(0)
    local = {**text, "hf_model_name": str(folder), "hf_model_pretrained": False}
    model = open_clip.model.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=local).eval()
    save(model, config, tokenizer, folder)
    return model


BUILD = {"native": build_native, "biomedclip": build_biomedclip}


@pytest.fixture(scope="module", params=list(BUILD))
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return BUILD[request.param](folder), folder


@pytest.fixture
def frozen(saved):
    return expert.load_expert(saved[1])


def pictures(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)) for _ in range(n)]


def test_round_trip_is_exact(saved, frozen):
    model = saved[0]
    assert all(torch.equal(value, frozen.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in frozen.model.parameters()) and not frozen.model.training
    tokens = frozen.tokenizer(SENTENCES)
    pixels = torch.stack([frozen.preprocess(p.convert("RGB")) for p in pictures(2)])
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), frozen.model.encode_text(tokens))
        assert torch.equal(model.encode_image(pixels), frozen.model.encode_image(pixels))
    wanted = model.visual.preprocess_cfg
    normalise = frozen.preprocess.transforms[-1]
    assert (list(normalise.mean), list(normalise.std)) == (list(wanted["mean"]), list(wanted["std"]))
    if "native" in str(saved[1]):
        plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{saved[1]}")
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_padding_does_not_change_an_embedding(frozen):
    """Skipped columns, all columns, and what stands in the padding: one and the same embedding."""
    tokens = frozen.tokenizer(SENTENCES)
    assert (tokens[:, -4:] == 0).all()
    with torch.no_grad():
        full = F.normalize(frozen.model.encode_text(tokens), dim=-1)
        torch.testing.assert_close(expert.encode_tokens(frozen.model, tokens), full, atol=1e-6, rtol=0)
        one = expert.encode_tokens(frozen.model, tokens[:1])
    torch.testing.assert_close(one, full[:1], atol=1e-6, rtol=0)
    assert (full[0] - full[1]).abs().max() > 1e-3


def test_phantom_config_pools_at_sep(tmp_path):
    """The embedding depends on every word and on nothing behind [SEP]."""
    model = build_native(tmp_path / "m")
    tokens = torch.tensor([[2, 5, 6, 7, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).repeat(3, 1)
    tokens[1, 6:] = 9  # behind the end
    tokens[2, 1] = 8  # the first word
    with torch.no_grad():
        base, behind, word = model.encode_text(tokens)
    torch.testing.assert_close(base, behind)
    assert (base - word).abs().max() > 1e-4


def test_large_layers_in_onednns_layout_change_nothing(saved, monkeypatch):
    plain = expert.load_expert(saved[1])
    monkeypatch.setattr("scorers.frozen.LARGE", 1)
    packed = expert.load_expert(saved[1])
    changed = [any("forward" in vars(layer) for layer in of.model.modules()) for of in (plain, packed)]
    assert changed == [False, True]
    image = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))]
    torch.testing.assert_close(packed.text_features(SENTENCES), plain.text_features(SENTENCES), atol=1e-5, rtol=0)
    both = [of.image_features(image, ["a"]) for of in (packed, plain)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)


def test_gradients_flow_through_the_cut(saved):
    frozen = expert.load_expert(saved[1])
    frozen.model.requires_grad_(True)
    expert.encode_tokens(frozen.model, frozen.tokenizer(SENTENCES))[:, 0].sum().backward()
    if "native" in str(saved[1]):
        grad = frozen.model.positional_embedding.grad
        assert grad[:4].abs().sum() > 0 and (grad[-3:] == 0).all()
    assert any(p.grad is not None for p in frozen.model.parameters())


def test_windows_hold_every_word_in_order():
    text = "One two three. Four five! Six seven eight nine ten eleven. Twelve?"
    windows = expert.split_windows(text, lambda part: len(part.split()) <= 4)
    assert windows == ["One two three.", "Four five! Six seven", "eight nine ten eleven.", "Twelve?"]
    assert expert.split_windows(text, lambda part: True) == [text]
    assert expert.split_windows(" \n ", lambda part: True) == []


def test_an_endless_word_is_split_between_its_characters():
    """A sampled candidate may be one: it neither ends a run nor loses its end."""
    assert expert.split_windows("abcdefg", lambda part: len(part) <= 3) == ["abc", "de", "fg"]
    windows = expert.split_windows("Clear lungs. " + "." * 300 + " No effusion.", lambda part: len(part) <= 16)
    assert windows[0] == "Clear lungs." and windows[-1].endswith("No effusion.") and max(map(len, windows)) <= 16
    assert "".join(windows).count(".") == 302
    assert expert.split_windows("ab", lambda part: False) == ["a", "b"]  # nothing fits: still every character


def test_every_text_gets_a_similarity(frozen):
    odd = ["." * 300, "lungs" * 200, SENTENCES[0] + " " + "!" * 100, SENTENCES[0]]
    s = frozen.similarity(pictures(1), ["a"], [odd])
    assert s.isfinite().all() and s[0, 0] == -1 and (s[0, 1:] > -1).all() and s[0, 2] != s[0, 3]
    windows = expert.split_windows(odd[0], lambda part: expert.count_tokens(frozen.tokenizer, part) <= 16)
    assert "".join(windows).replace(" ", "") == odd[0]
    tokens = frozen.tokenizer(windows)
    assert sum((row != 0).sum().item() - 2 for row in tokens) == 300  # nothing was cut


def test_long_text_is_the_mean_of_its_windows(frozen):
    long = " ".join(SENTENCES)
    assert expert.count_tokens(frozen.tokenizer, long) > frozen.tokenizer.context_length
    windows = expert.split_windows(long, lambda part: expert.count_tokens(frozen.tokenizer, part) <= 16)
    assert len(windows) > 1 and " ".join(windows) == long
    mean = F.normalize(torch.cat([frozen.text_features([w]) for w in windows]).mean(dim=0), dim=0)
    torch.testing.assert_close(frozen.text_features([long])[0], mean, atol=1e-6, rtol=0)
    changed = " ".join([*SENTENCES[:-1], "The heart is large."])
    s = frozen.similarity(pictures(1), ["a"], [[long, changed]])
    assert (s[0, 0] - s[0, 1]).abs() > 1e-5  # the last sentence counts


def test_similarity_is_the_cosine_and_needs_no_batch_mates(frozen):
    images, ids = pictures(3), ["a", "b", "c"]
    groups = [SENTENCES[:2], SENTENCES[2:], [SENTENCES[0], " ".join(SENTENCES)]]
    got = frozen.similarity(images, ids, groups)
    assert got.device.type == "cpu" and got.dtype == torch.float32
    for b in range(3):
        alone = expert.Expert(frozen.model, frozen.preprocess, frozen.tokenizer, frozen.device)
        for g in range(2):
            value = alone.similarity([images[b]], [ids[b]], [[groups[b][g]]])
            torch.testing.assert_close(got[b : b + 1, g : g + 1], value, atol=1e-6, rtol=0)
    with torch.no_grad():
        image = frozen.model.encode_image(frozen.preprocess(images[0].convert("RGB"))[None])
        text = frozen.model.encode_text(frozen.tokenizer([groups[0][1]]))
    assert got[0, 1].item() == pytest.approx(F.cosine_similarity(image, text).item(), abs=1e-6)


def test_empty_text_is_minus_one(frozen):
    s = frozen.similarity(pictures(1), ["a"], [["", " \n", SENTENCES[0]]])
    assert s[0, :2].tolist() == [-1, -1] and -1 < s[0, 2] < 1
    assert frozen.similarity(pictures(1), ["a"], [["", ""]]).tolist() == [[-1, -1]]
    assert frozen.text_features(["", ""]).shape == frozen.text_features([SENTENCES[0]] * 2).shape


def test_images_are_embedded_once_and_texts_once(frozen, monkeypatch):
    calls = {"encode_image": 0, "encode_tokens": 0}
    encode_image, encode_tokens = frozen.model.encode_image, expert.encode_tokens

    def count_image(pixels):
        calls["encode_image"] += len(pixels)
        return encode_image(pixels)

    def count_tokens(model, tokens):
        calls["encode_tokens"] += len(tokens)
        return encode_tokens(model, tokens)

    monkeypatch.setattr(frozen.model, "encode_image", count_image)
    monkeypatch.setattr(expert, "encode_tokens", count_tokens)
    first = frozen.similarity(pictures(2), ["a", "b"], [SENTENCES[:2]] * 2)
    assert calls == {"encode_image": 2, "encode_tokens": 2}
    again = frozen.similarity(pictures(2)[::-1], ["b", "a"], [SENTENCES[:2]] * 2)
    assert calls["encode_image"] == 2 and torch.equal(first.flip(0), again)
    monkeypatch.setattr("scorers.frozen.CACHED", 1)
    frozen.image_features(pictures(1), ["a"])
    assert list(frozen.cache) == ["a"]  # there were more than it may hold


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    folder = tmp_path / "m"
    build_native(folder)
    weights = (folder / "open_clip_model.safetensors").read_bytes()

    def refused(match, path=folder):
        with pytest.raises(ValueError, match=match) as caught:
            expert.load_expert(path)
        assert "\n" not in str(caught.value)

    refused("No such file", tmp_path / "absent")
    (folder / "open_clip_model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("cannot load")
    (folder / "open_clip_model.safetensors").unlink()
    refused("cannot load.*could not be loaded")
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 8
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused("size mismatch")
    (folder / "open_clip_config.json").write_text("{}")
    refused("open_clip_config.json of .* 'model_cfg'")
    (folder / "open_clip_config.json").write_text("{")
    refused("cannot load")


@pytest.mark.parametrize("key", ["trust_remote_code", "auto_map"])
def test_a_config_that_asks_for_remote_code_is_refused_by_name(tmp_path, hub, key):
    folder = tmp_path / "m"
    build_native(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"init": [{key: {"AutoTokenizer": "own.Code"}}]}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    hub("owner/clip", {path.name: path for path in folder.iterdir()})
    for path in (folder, "hf-hub:owner/clip"):
        with pytest.raises(ValueError, match=f"expert: .*open_clip_config.json.*'{key}': asks for code") as caught:
            expert.load_expert(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"bpe_path": "/x"}, {"cache_dir": "/x"}, {"clean": "lower", "config": {}}])
def test_only_known_settings_reach_the_tokenizer(tmp_path, settings):
    folder = tmp_path / "m"
    build_native(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())

    def load(tokenizer_kwargs):
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = tokenizer_kwargs
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        return expert.load_expert(folder)

    load({"clean": "canonicalize", "strip_sep_token": False})
    with pytest.raises(ValueError, match="expert: .*tokenizer_kwargs '(bpe_path|cache_dir|config)' is none of clean"):
        load(settings)


def test_weights_with_nan_and_a_tokenizer_of_another_model_are_refused(tmp_path):
    folder = tmp_path / "m"
    model = build_native(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["text_projection"][0, 0] = torch.nan
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="expert: .*text_projection holds NaN"):
        expert.load_expert(folder)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = json.loads((folder / "open_clip_config.json").read_text())
    name = config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name")  # now open_clip's own, of 49,408 tokens
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expert: cannot load .*IndexError"):
        expert.load_expert(folder)
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = name
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for path in (folder / "tokenizer.json", folder / "vocab.txt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="expert: .*tokenizer.json: empty"):
        expert.load_expert(folder)


@pytest.mark.parametrize("build", BUILD.values())
def test_what_would_show_in_mid_run_is_refused_at_load(tmp_path, build):
    """A mean of NaN, a tokenizer with more tokens than the text tower, changed bytes of weights."""
    folder = tmp_path / "m"
    model = build(folder)
    text = (folder / "open_clip_config.json").read_text()
    config = json.loads(text)

    def refused(match):
        with pytest.raises(ValueError, match=f"^expert: cannot load .*{match}") as caught:
            expert.load_expert(folder)
        assert "\n" not in str(caught.value)

    for key, value, message in (("mean", [float("nan")] * 3, "a grey image's similarity holds NaN"),
                                ("std", [0, 0, 0], "division by zero"), ("mean", "x", "str")):  # fmt: skip
        changed = config | {"preprocess_cfg": config["preprocess_cfg"] | {key: value}}
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        refused(message)
    (folder / "open_clip_config.json").write_text(text)
    assert not expert.load_expert(folder).cache
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    flip_a_weight(folder / "open_clip_pytorch_model.bin")
    expert.load_expert(folder)  # beside safetensors, which are read instead
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").unlink()
    refused("open_clip_pytorch_model.bin: broken or cut off")
    (folder / "open_clip_model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    with (folder / "vocab.txt").open("a") as file:
        file.write("".join(f"\nword{i}" for i in range(50)))
    refused("the tokenizer's ids reach .*, the model has 24 embeddings")


def test_byte_pair_native_clip_by_hub_name(hub, tmp_path):
    """OpenAI's own layout and tokenizer, whose id 0 is a "!" and not a padding; loaded from the hub's cache."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 32}}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config["model_cfg"]).eval()
    save_file(model.state_dict(), tmp_path / "w")
    (tmp_path / "c").write_text(json.dumps(config))
    hub("owner/clip", {"open_clip_config.json": tmp_path / "c", "open_clip_model.safetensors": tmp_path / "w"})
    frozen = expert.load_expert("hf-hub:owner/clip")
    texts = [*SENTENCES, "Effusion! Seen?", "Effusion !( seen"]
    tokens = frozen.tokenizer(texts)
    lengths = (tokens == 49407).int().argmax(dim=1) + 1
    assert (tokens[-1, : lengths[-1]] == 0).any()
    assert [expert.count_tokens(frozen.tokenizer, text) for text in texts] == lengths.tolist()
    with torch.no_grad():
        full = F.normalize(model.encode_text(tokens), dim=-1)
        for i in range(len(texts)):
            torch.testing.assert_close(expert.encode_tokens(frozen.model, tokens[i : i + 1]), full[i : i + 1])
    with pytest.raises(ValueError, match="cannot load .*hf-hub:owner/none") as caught:
        expert.load_expert("hf-hub:owner/none")
    assert "\n" not in str(caught.value)


def test_biomedclip_as_it_is_published(tmp_path):
    """Weights in a .bin with BERT's old position_ids; the inner BERT's config.json here, nowhere, in its own folder."""
    folder = tmp_path / "m"
    model = build_biomedclip(folder)
    (folder / "open_clip_model.safetensors").unlink()
    old = model.state_dict() | {"text.transformer.embeddings.position_ids": torch.arange(512)[None]}
    torch.save(old, folder / "open_clip_pytorch_model.bin")
    embedding = expert.load_expert(folder).text_features(SENTENCES)
    with torch.no_grad():
        expected = F.normalize(model.encode_text(expert.load_expert(folder).tokenizer(SENTENCES)), dim=-1)
    torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=0)

    (tmp_path / "bert").mkdir()
    (folder / "config.json").rename(tmp_path / "bert" / "config.json")
    with pytest.raises(ValueError, match=f"put the config.json of microsoft/no-such-bert into {folder}") as caught:
        expert.load_expert(folder)
    assert "\n" not in str(caught.value)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "bert")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert torch.equal(expert.load_expert(folder).text_features(SENTENCES), embedding)
    for broken in (b"not weights", b""):
        (folder / "open_clip_pytorch_model.bin").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot load") as caught:
            expert.load_expert(folder)
        assert "\n" not in str(caught.value)


def test_errors_are_each_texts_own_of_the_given_deviation_and_never_lift_the_unreadable():
    def similarity(images, ids, groups):
        return torch.tensor([[-1.0 if not text else 0.5 for text in group] for group in groups])

    groups = [[f"text {i}" for i in range(1000)], ["text 0", ""] * 500]
    erring = expert.with_errors(similarity, 0.1)
    found = erring([None] * 2, ["a", "b"], groups)
    assert abs(found[0].mean() - 0.5) < 0.01 and abs(found[0].std() - 0.1) < 0.01
    assert (found[1, 1::2] == -1).all() and found[1, 0] == found[1, 2]  # one text, one error
    assert found[1, 0] != found[0, 0]  # another study's
    torch.testing.assert_close(erring([None], ["b"], [["text 0"]])[0, 0], found[1, 0])  # whenever it is asked
    assert expert.with_errors(similarity, 0) is similarity
    assert erring([None], ["b"], [["\ud83d edema"]]).isfinite().all()  # half a character, as the scorers take it
