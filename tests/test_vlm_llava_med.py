"""LLaVA-Med v1.5 in its original layout, and checkpoints that must be refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_families import LLAVA_MED, studies, write_json, write_llava_med, write_weights
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration

from config import Config, ModelConfig
from data import Study
from model import encode_prompts, load_policy
from sft import describe_references, sft_update
from vlm.families import llava_med_config, llava_med_tokenizer, load_family


@pytest.fixture(scope="session")
def llava_med(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_med")
    write_llava_med(folder)
    return folder


@pytest.fixture
def views():
    return studies()


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_llava_med_gives_the_logits_of_the_same_llava(layout, tmp_path, views):
    oracle = write_llava_med(tmp_path, layout)
    model, processor = load_family(str(tmp_path), torch.float32)
    inputs = encode_prompts(processor, views, "the chest", "cpu")
    inputs.pop("image_counts")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.equal(logits, oracle(**inputs).logits)
        inputs["pixel_values"] = inputs["pixel_values"].flip(0)
        assert not torch.allclose(logits, oracle(**inputs).logits)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in oracle.state_dict().items()}


def test_llava_med_prompt_is_tokenised_as_in_the_original(llava_med, views):
    tokenizer = llava_med_tokenizer(str(llava_med))
    _, processor = load_family(str(llava_med), torch.float32)
    inputs = encode_prompts(processor, views[1:2], "the chest", "cpu")
    chunks = "[INST] <image>\n<image>\nthe chest [/INST]".split("<image>")  # LLaVA-Med, mm_utils.tokenizer_image_token
    ids = [1]
    for i, chunk in enumerate(chunks):
        ids += [0] * 4 * (i > 0) + tokenizer(chunk, add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"].tolist() == [ids]
    assert tokenizer.convert_ids_to_tokens(ids[:8]) == ["<s>", "▁[", "INST", "]", "▁", "<unk>", "<unk>", "<unk>"]
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    assert encode_prompts(processor, views[1:2], "the chest", "cpu")["input_ids"].tolist() == [ids]  # one <s> still
    assert 0 not in tokenizer("Grüße, 心 ☃ <image>")["input_ids"]  # no text is the placeholder


def test_llava_med_pads_to_a_square_with_clips_mean_colour(llava_med, tmp_path):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    square = Image.new("RGB", (90, 90), (122, 116, 104))  # int(255 * CLIP's mean)
    square.paste(image, (0, 25))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    _, processor = load_family(str(llava_med), torch.float32)
    got = encode_prompts(processor, [image], "the chest", "cpu")["pixel_values"]
    torch.testing.assert_close(got, clip(square, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)
    write_llava_med(tmp_path, image_aspect_ratio="square")
    _, processor = load_family(str(tmp_path), torch.float32)
    got = encode_prompts(processor, [image], "the chest", "cpu")["pixel_values"]
    torch.testing.assert_close(got, clip(image, return_tensors="pt")["pixel_values"], atol=1e-6, rtol=0)


def test_llava_med_at_full_size_has_the_released_number_of_weights(tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
             "num_hidden_layers": 32, "vocab_size": 32000, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
             "mm_hidden_size": 1024, "max_position_embeddings": 32768}  # fmt: skip
    write_llava_med(tmp_path)
    write_json(tmp_path / "config.json", LLAVA_MED | sizes)
    config = llava_med_config(str(tmp_path), LLAVA_MED | sizes, llava_med_tokenizer(str(tmp_path)))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    # Mistral-7B 7,241,732,096 + CLIP ViT-L/14-336 303,507,456 + two layers 1024 -> 4096 -> 4096
    assert sum(p.numel() for p in model.parameters()) == 7_241_732_096 + 303_507_456 + 1025 * 4096 + 4097 * 4096
    assert config.image_seq_length == 576


def test_llava_med_tokenizer_model_is_read(tmp_path):
    write_llava_med(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    (tmp_path / "text.txt").write_text("the lungs are clear\nno pleural effusion [INST] write [/INST]\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = llava_med_tokenizer(str(tmp_path))
    for text in ("the lungs are clear", "\nWrite: naïve ☃ [/INST]", "[INST] "):
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]


FAULTS = [  # (what is said about them, weights to set under their original names; None = take out)
    ("1 weights are not in it, e.g. model.multi_modal_projector.linear_2.bias", {"model.mm_projector.2.bias": None}),
    ("have no place in the model, e.g. model.language_model.layers.9", {"model.layers.9": torch.ones(1)}),
    (r"have no place .*lm_head.weight \[7, 32\] \(by config.json \[\d+, 32\]\)", {"lm_head.weight": torch.ones(7, 32)}),
]


@pytest.mark.parametrize(("message", "changes"), FAULTS)
def test_a_checkpoint_with_other_weights_is_refused(message, changes, tmp_path):
    write_llava_med(tmp_path)
    weights = {}
    for file in tmp_path.glob("*.safetensors"):
        weights |= load_file(file)
    write_weights(tmp_path, {name: x for name, x in (weights | changes).items() if x is not None})
    with pytest.raises(ValueError, match=message):
        load_family(str(tmp_path), torch.float32)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_cut_off_file_is_named(layout, tmp_path):
    write_llava_med(tmp_path, layout)
    file = sorted(tmp_path.glob("*-00002-of-00002.*"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name}: broken or cut off"):
        load_family(str(tmp_path), torch.float32)
    file.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{file.name}"):
        load_family(str(tmp_path), torch.float32)


def test_unknown_families_and_settings_are_named(cfg, tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_policy(replace(cfg, model=replace(cfg.model, path=str(tmp_path))))
    write_json(tmp_path / "config.json", {"model_type": "qwen2_5_vl"})
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model"):
        load_policy(replace(cfg, model=replace(cfg.model, path=str(tmp_path))))
    write_json(tmp_path / "config.json", {"model_type": "gpt9"})
    with pytest.raises(ValueError, match="'gpt9' is not supported; known: llava, llava_mistral, qwen2_5_vl"):
        load_policy(replace(cfg, model=replace(cfg.model, path=str(tmp_path))))
    for i, (key, value) in enumerate({"mm_projector_type": "linear", "mm_vision_tower": "siglip"}.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        write_llava_med(folder, **{key: value})
        with pytest.raises(ValueError, match=value):
            load_family(str(folder), torch.float32)


@pytest.mark.parametrize("file, change, match", [
    ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'quantization_config'.*quantised"),
    ("config.json", {"auto_map": {"AutoConfig": "evil.Config"}}, "'auto_map'.*code"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "'auto_map'.*code"),
    ("config.json", {"num_attention_heads": 0}, "zero"),
    ("config.json", {"hidden_size": "wide"}, "hidden_size"),
])  # fmt: skip
def test_a_folder_that_asks_for_more_than_weights_is_refused(file, change, match, tmp_path):
    write_llava_med(tmp_path)
    write_json(tmp_path / file, json.loads((tmp_path / file).read_text()) | change)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{match}") as error:
        load_family(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.bias", "lm_head.weight"])
def test_a_base_that_is_not_finite_is_named(name, tmp_path):
    write_llava_med(tmp_path)
    weights = {}
    for file in tmp_path.glob("*.safetensors"):
        weights |= load_file(file)
    weights[name].view(-1)[-1] = float("nan")
    write_weights(tmp_path, weights)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{name.split('.')[-1]} holds NaN"):
        load_family(str(tmp_path), torch.float32)


@pytest.mark.parametrize("file, text, match", [
    ("config.json", "[" * 5000, "no readable config.json"),
    ("config.json", "[1]", "config.json"),
    ("config.json", "{", "config.json"),
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("tokenizer.json", "", "empty"),
    ("tokenizer.json", "{}", ""),
])  # fmt: skip
def test_a_damaged_file_is_one_line(file, text, match, tmp_path):
    write_llava_med(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{match}") as error:
        load_family(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spelt", ["<unk> seen", "the end</s>", "<s>clear"])
def test_a_reference_that_spells_a_special_token_trains_without_it(spelt, llava_med, tmp_path):
    """<unk> is LLaVA-Med's image: its log-prob in a report is -inf."""
    cfg = Config(model=ModelConfig(path=str(llava_med)), device="cpu")
    model, processor = load_policy(cfg, new_lora=True, trainable="language")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    two = [Study(name, [tmp_path / "a.png"], text, "sft") for name, text in (("a", "the lungs"), ("b", spelt))]
    [line] = describe_references(model, processor, two, cfg)
    assert line.startswith("1 of 2 references spell out special tokens") and line.endswith("study b)")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    assert np.isfinite(sft_update(model, processor, optimizer, two, cfg, 0, 1)["loss"])
