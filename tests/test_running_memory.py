"""The memory estimate: by hand, against the real architectures, and against what autograd keeps."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
)

from config import Config, DataConfig, DPOConfig, GRPOConfig, ModelConfig, RolloutConfig, SFTConfig, StageConfig
from model import completion_logps, encode_prompts, get_base, load_policy, sampling_rules, set_trainable
from running import memory
from running.memory import GIB, KNOWN, Shape, checkpoint_bytes, estimate, kept_activations, lora_parameters
from vlm.families import llava_med_config

TINY = Shape(1000, layers=2, hidden=8, inner=16, query=8, key=4, vocabulary=10, image_tokens=6,
             projector=[[4, 8], [8, 8]])  # fmt: skip


def tiny_config() -> Config:
    return Config(
        data=DataConfig(path="unused"),
        model=ModelConfig(dtype="bfloat16", lora_r=2),
        rollout=RolloutConfig(group_size=3, min_new_tokens=1, max_new_tokens=5),
        sft=SFTConfig(batch_size=4, trainable="language+projector"),
        grpo=GRPOConfig(batch_size=2, micro_batch=1),
        stage1=StageConfig(trainable="language"),
        stage2=StageConfig(trainable="projector"),
    )


def test_lora_weights_by_hand():
    layer = (8 + 8) + (8 + 4) + (8 + 4) + (8 + 8) + (8 + 16) + (8 + 16) + (16 + 8)  # q k v o gate up down
    assert lora_parameters(TINY, 2, "language") == 2 * 2 * layer
    assert lora_parameters(TINY, 2, "projector") == 2 * (12 + 16)
    assert lora_parameters(TINY, 2) == 2 * 2 * layer + 2 * 28


def test_dpo_holds_two_reports_a_study_and_neither_samples_nor_scores():
    cfg = tiny_config()
    cfg.stage, cfg.dpo = "dpo", DPOConfig(batch_size=4, micro_batch=2, trainable="projector")
    parts = estimate(TINY, cfg, "dpo", scorers=77)
    assert (parts["scorers"], parts["sampling"]) == (0, 0)
    assert parts["lora"] == 4 * 2 * (512 + 56) + 12 * 56  # policy, reference; gradient, two moments
    assert parts["loss"] == memory.loss_bytes(TINY, 6 + 64, 5, 2, 2, "projector", cfg)
    whole = 4 * (512 + 56)
    assert checkpoint_bytes(TINY, cfg) == whole + 3 * (3 * whole) + whole + 3 * (whole + 8 * 56)  # sft, dpo


def test_every_part_of_stage_2_by_hand():
    parts = estimate(TINY, tiny_config(), stage=2, scorers=77)
    prefix, length, group, sampled = 6 + 64, 5, 3, 6
    assert parts["weights"] == 2 * 1000
    assert parts["lora"] == 4 * 2 * (512 + 56) + 12 * 56  # policy, reference; gradient, two moments
    assert parts["scorers"] == 77
    caches = (2 * prefix + sampled * length) * 2 * 2 * 4 * 2  # tokens, layers, keys + values, k, bf16
    assert parts["sampling"] == caches + 2 * prefix * (3 * 16 + 4 * 8) * 2  # more than the 6 * 4 * 10 * 6 of the logits
    tokens = prefix + group * length  # of the one study in the micro-batch
    kept = 2 * tokens * (8 * 8 + 2 * (2 * 8 + 3 * 16))  # two layers; the language model's LoRA does not train
    seen = tokens + (prefix + length // 2) + group * length  # the row, and the one strip's prefix and reports
    keys = 2 * seen * 2 * 2 * 8  # layers, keys + values, bf16, as wide as the queries
    mask = group * length * (prefix + group * length + length // 2) * 2
    assert parts["loss"] == kept + keys + mask + 12 * 10 * group * length
    rest = parts["weights"] + parts["lora"] + 77 + 2 * GIB
    assert parts["total"] == rest + max(parts["sampling"], parts["loss"])


def test_what_changes_with_the_stage_and_with_checkpointing():
    cfg = tiny_config()
    sft, first, second = (estimate(TINY, cfg, stage, scorers=77) for stage in range(3))
    assert sft["sampling"] == sft["scorers"] == 0 and sft["lora"] == 4 * 568 + 12 * 568  # no reference yet
    assert first["lora"] == 8 * 568 + 12 * 512 and first["loss"] > second["loss"]
    assert first["loss"] - second["loss"] == 2 * (70 + 15) * 4 * (5 * 8 + 8 + 16)  # LoRA's float32 inputs
    checkpointed = replace(cfg, model=replace(cfg.model, gradient_checkpointing=True))
    assert estimate(TINY, checkpointed, 1, 0)["loss"] < first["loss"]
    one = estimate(TINY, replace(cfg, grpo=replace(cfg.grpo, micro_group=1)), 1, 0)["loss"]
    assert one < first["loss"] == estimate(TINY, replace(cfg, grpo=replace(cfg.grpo, micro_group=3)), 1, 0)["loss"]
    twice = replace(cfg, grpo=replace(cfg.grpo, micro_batch=2))
    assert estimate(TINY, twice, 1, 0)["loss"] == 2 * first["loss"]
    half = replace(cfg, sft=replace(cfg.sft, micro_batch=2))
    assert estimate(TINY, half, 0, 0)["loss"] == sft["loss"] / 2
    assert estimate(TINY, replace(cfg, model=replace(cfg.model, dtype="float32")), 1, 0)["weights"] == 4000


def test_checkpoints_by_hand():
    adapter, both, language, projector = 4 * 568, 8 * 568, 8 * 512, 8 * 56
    assert checkpoint_bytes(TINY, tiny_config()) == 12 * adapter + 3 * (both + language + projector)


def meta_shape(config) -> tuple[int, list[list[int]]]:
    """Weights of an architecture, and [in, out] of its projection's linear layers, without allocating any."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    linears = [[module.in_features, module.out_features] for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and ("projector" in name or "merger" in name)]  # fmt: skip
    return sum(p.numel() for p in model.parameters()), linears


def test_the_published_shapes_are_those_of_the_architectures():
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                              image_size=336, patch_size=14)  # fmt: skip
    llava = meta_shape(LlavaConfig(vision_config=vision, text_config=MistralConfig(num_key_value_heads=8)))
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
    qwen = meta_shape(Qwen2_5_VLConfig(text_config=text, vision_config={"hidden_size": 1280}))
    for name, (weights, linears) in zip(KNOWN, (llava, qwen), strict=True):
        assert (KNOWN[name].parameters, KNOWN[name].projector) == (weights, linears), name
    mistral = KNOWN["llava-med-v1.5-mistral-7b"]
    with torch.device("meta"):
        body = MistralForCausalLM(MistralConfig(num_key_value_heads=8)).model
    assert (len(body.layers), body.embed_tokens.embedding_dim) == (mistral.layers, mistral.hidden)
    assert body.layers[0].mlp.up_proj.out_features == mistral.inner


PUBLISHED = {  # the hub's config.json of the two models, what matters here
    "llava-med-v1.5-mistral-7b": {
        "architectures": ["LlavaMistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "image_aspect_ratio": "pad", "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava_mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "use_mm_proj": True, "vocab_size": 32000},
    "Qwen2.5-VL-7B-Instruct": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "image_token_id": 151655,
        "intermediate_size": 18944, "max_position_embeddings": 128000, "max_window_layers": 28,
        "model_type": "qwen2_5_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14,
                          "tokens_per_second": 2}, "vocab_size": 152064},
}  # fmt: skip


def published(name: str, folder):
    """transformers' configuration of a published model."""
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]))
    if "llava" in name:
        return llava_med_config(str(folder), PUBLISHED[name], SimpleNamespace(unk_token_id=0))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_published_shapes(name, tmp_path):
    shape = memory.read_shape(published(name, tmp_path), KNOWN[name].parameters, 12_845_056)
    assert shape == KNOWN[name]


def test_qwens_image_tokens_follow_its_max_pixels(tmp_path):
    config, kind = published("Qwen2.5-VL-7B-Instruct", tmp_path), {"image_processor_type": "Qwen2VLImageProcessor"}
    for settings in ({"max_pixels": 401408}, {"size": {"longest_edge": 401408, "shortest_edge": 3136}}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | kind))
        size = AutoImageProcessor.from_pretrained(tmp_path).size
        assert memory.read_shape(config, 0, size["longest_edge"]).image_tokens == 512  # 28 x 28 pixels each


def test_the_shape_of_a_policy_and_its_lora(cfg, policy):
    model, _ = policy
    shape = memory.read_shape(get_base(model).config, 123)
    assert (shape.parameters, shape.layers, shape.hidden, shape.inner) == (123, 2, 32, 64)
    for part in ("language", "projector", "language+projector"):
        names = set_trainable(model, part)
        count = sum(p.numel() for name, p in model.named_parameters() if name in names)
        assert count == lora_parameters(shape, cfg.model.lora_r, part)
    placeholders = model.config.image_seq_length
    assert shape.image_tokens == placeholders


@pytest.mark.parametrize("trains", [True, False])
def test_activations_are_what_autograd_keeps(trains):
    """One more layer of a bfloat16 Mistral with LoRA keeps as many bytes more as the formula says."""
    from peft import LoraConfig, get_peft_model

    def kept(layers: int) -> int:
        torch.manual_seed(0)
        config = MistralConfig(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=layers,
                               num_attention_heads=4, num_key_value_heads=2, sliding_window=None)  # fmt: skip
        model = MistralForCausalLM(config).to(torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*_proj"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains and "lora" in name)
        weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = torch.randn(3, 70, 64, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            get_base(model).model(inputs_embeds=inputs).last_hidden_state.float().sum()
        return sum(size for place, size in storages.items() if place not in weights)

    measured = kept(3) - kept(2)
    shape = Shape(0, 1, hidden=64, inner=160, query=64, key=32, vocabulary=50, image_tokens=0, projector=[])
    keys_and_values = 210 * 2 * 32 * 2
    assert measured == pytest.approx(kept_activations(shape, 210, 2, trains) + keys_and_values, rel=0.05)


def test_the_lora_wraps_the_layers_that_the_formula_counts(cfg, policy):
    model, _ = policy
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and "language" in name]
    assert len(wrapped) == 7 * 2 and model.peft_config["default"].r == cfg.model.lora_r


@pytest.mark.parametrize("trainable", ["language", "projector"])
def test_the_loss_part_is_what_a_micro_batch_keeps(cfg, images, trainable, monkeypatch):
    """All that autograd keeps of one micro-batch on the real code path, in bfloat16."""
    cfg = replace(cfg, model=replace(cfg.model, dtype="bfloat16"), stage1=StageConfig(trainable=trainable),
                  rollout=replace(cfg.rollout, max_new_tokens=60), grpo=GRPOConfig(micro_batch=1))  # fmt: skip
    model, processor = load_policy(cfg, new_lora=True)
    set_trainable(model, trainable)
    inputs = encode_prompts(processor, images[:1], cfg.data.prompt, "cpu")
    completions = torch.arange(240).view(4, 60) + 5  # G = 4 reports of full length
    weights, storages = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rules = sampling_rules(model, processor, cfg)
        completion_logps(model, inputs, completions, torch.ones_like(completions), rules).sum()
    measured = sum(size for place, size in storages.items() if place not in weights)
    shape = memory.read_shape(get_base(model).config, 0)
    monkeypatch.setattr(memory, "PROMPT_TOKENS", inputs["input_ids"].shape[1] - shape.image_tokens)
    logits = 240 * shape.vocabulary  # float32 with a mask are kept; two more copies live only inside the backward pass
    assert measured == pytest.approx(estimate(shape, cfg, 1, 0)["loss"] - 12 * logits + 4 * logits, rel=0.12)
