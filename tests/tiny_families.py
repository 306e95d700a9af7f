"""Tiny random checkpoints in the real on-disk layouts of LLaVA-Med v1.5 and Qwen2.5-VL, written file by file."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
# config.json of microsoft/llava-med-v1.5-mistral-7b with small sizes (and the field names of its day)
LLAVA_MED = {
    "architectures": ["LlavaMistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False, "hidden_act": "silu", "hidden_size": 32, "image_aspect_ratio": "pad",
    "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 512, "mm_hidden_size": 32,
    "mm_projector_lr": None, "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "clip-tiny", "model_type": "llava_mistral", "num_attention_heads": 2, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "float32", "tune_mm_mlp_adapter": False, "use_cache": True,
    "use_mm_proj": True,
}  # fmt: skip
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
QWEN_CHAT = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def studies() -> list[list[Image.Image]]:
    """Four studies of 1, 2, 1 and 3 views, of several sizes: prompts of several lengths."""
    rng = np.random.default_rng(0)
    sizes = [(60, 60)], [(90, 56), (56, 120)], [(112, 84)], [(56, 56), (70, 90), (40, 50)]
    return [[Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in study] for study in sizes]


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_weights(folder: Path, weights: dict, layout: str = "safetensors") -> None:
    """Two shards and their index, as large checkpoints come."""
    names, index = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = {name: weights[name].clone().contiguous() for name in part}
        if layout == "safetensors":
            file = f"model-0000{i + 1}-of-00002.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
        else:
            file = f"pytorch_model-0000{i + 1}-of-00002.bin"
            torch.save(shard, folder / file)
        index |= dict.fromkeys(part, file)
    name = "model.safetensors.index.json" if layout == "safetensors" else "pytorch_model.bin.index.json"
    write_json(folder / name, {"metadata": {"total_size": 0}, "weight_map": index})


def llama_tokenizer() -> LlamaTokenizer:
    """<unk> <s> </s>, 256 bytes to fall back to, a few letters and merges: Mistral's tokenizer in small."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"[]/INSTabcdehilnorstuw."]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "["), ("I", "N"), ("S", "T"), ("IN", "ST")]
    pieces = dict.fromkeys([*pieces, *(a + b for a, b in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, pad_token="<unk>")


def write_llava_med(folder: Path, layout: str = "safetensors", **changes) -> LlavaForConditionalGeneration:
    """A `llava_mistral` folder; returns the same weights as transformers' LLaVA, configured here by hand."""
    tokenizer = llama_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "clip-tiny").mkdir()
    write_json(folder / "clip-tiny" / "config.json", {"model_type": "clip_vision_model", **VISION})
    write_json(folder / "config.json", LLAVA_MED | {"vocab_size": len(tokenizer)} | changes)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**VISION, initializer_factor=5.0), text_config=text,
                    image_token_index=0, vision_feature_layer=-2, image_seq_length=4)
    ).eval()  # fmt: skip
    write_weights(folder, {original_name(k): v for k, v in model.state_dict().items()}, layout)
    return model


def original_name(name: str) -> str:
    """transformers' LLaVA -> LLaVA-Med's own name of a weight."""
    if name.startswith("model.vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + name.removeprefix("model.vision_tower.")
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
    return name.replace("model.language_model.", "model.")


def write_qwen(folder: Path, tied: bool = False, padded_rows: int = 5) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL folder with the flat config.json and weight names of Qwen's release; returns the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={c: i for i, c in enumerate(alphabet)}, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=QWEN_SPECIAL,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIAL}
    write_json(folder / "config.json", {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "hidden_act": "silu",
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "hidden_size": 32,
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"], "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"], "initializer_range": 0.2, "intermediate_size": 64,
        "max_position_embeddings": 512, "max_window_layers": 2, "model_type": "qwen2_5_vl", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": tied, "torch_dtype": "float32", "use_cache": True,
        "use_sliding_window": False, "vocab_size": len(tokenizer) + padded_rows,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {"depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
                          "in_chans": 3, "out_hidden_size": 32, "patch_size": 14, "spatial_merge_size": 2,
                          "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
                          "tokens_per_second": 2, "temporal_patch_size": 2, "initializer_range": 0.2},
    })  # fmt: skip
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    write_json(folder / "generation_config.json", {"eos_token_id": eos, "pad_token_id": ids["<|endoftext|>"]})
    write_json(folder / "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    })  # fmt: skip
    write_json(folder / "chat_template.json", {"chat_template": QWEN_CHAT})
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder)).eval()
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name.startswith("lm_head"))
    }
    write_weights(folder, weights)
    return model
