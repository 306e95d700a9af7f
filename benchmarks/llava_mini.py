"""The models and inputs of the benchmark: LLaVA of two sizes with random weights, made from nothing.

    mini   CLIP ViT 336/14 of 4 layers x 256, Llama of 6 layers x 384 with 6 heads, vocabulary 2,000; float32 on the CPU
    7b     LLaVA-Med v1.5's geometry: CLIP ViT-L/14-336 and Mistral-7B, vocabulary 32,000; bfloat16, for one large GPU
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from running.memory import Shape  # noqa: E402

PROMPT = "USER: describe the chest radiograph in a report with findings and impression ASSISTANT:"
CHAT = "<s>{% for m in messages %}{% for c in m['content'] %}"
CHAT += "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
LORA = r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"
VISION = {
    "mini": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
TEXT = {
    "mini": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1e6},
}  # fmt: skip
VOCABULARY = {"mini": 2000, "7b": 32000}


def shape_of(size: str) -> Shape:
    """The language model as running/memory.py describes it; the whole model's parameters are not counted."""
    text, vision = TEXT[size], VISION[size]["hidden_size"]
    h = text["hidden_size"]
    key = h // text["num_attention_heads"] * text.get("num_key_value_heads", text["num_attention_heads"])
    layers, inner = text["num_hidden_layers"], text["intermediate_size"]
    return Shape(0, layers, h, inner, h, key, VOCABULARY[size], 576, ((vision, h), (h, h)))


def tokenizer_of(size: int, known: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: it splits at white space and knows the words `known`, or of PROMPT and `size` in all."""
    exact, known = bool(known), known or PROMPT.replace(":", " :").split()
    words = list(dict.fromkeys(["<pad>", "<s>", "</s>", "<image>", "<unk>", *known]))
    words += [f"w{i}" for i in range(0 if exact else size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if exact else pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


def build(size: str, image_tokens: int, device: str, known: tuple[str, ...] = ()):
    """(LLaVA with random weights (seed 0), its processor); the image's side follows from its tokens (a square).
    known: the words that it can write, if not all of its vocabulary."""
    side = 14 * round(image_tokens**0.5)
    tokenizer = tokenizer_of(VOCABULARY[size], known)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY[size]}
    text_class = LlamaConfig if size == "mini" else MistralConfig
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION[size], image_size=side, patch_size=14),
        text_config=text_class(**TEXT[size], **ends, max_position_embeddings=4096),
        image_token_id=3, image_seq_length=image_tokens, vision_feature_layer=-2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        dtype, default = torch.float32 if size == "mini" else torch.bfloat16, torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = LlavaForConditionalGeneration(config).eval()
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip
    return model, processor


def lora_config() -> LoraConfig:
    """Rank 16 on the language model's q, k, v and o, the same for both sides."""
    return LoraConfig(r=16, lora_alpha=32, target_modules=LORA)


def with_lora(model):
    """The model behind an adapter whose update is not zero (a fresh one would be), only the adapter trainable."""
    model = get_peft_model(model, lora_config())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval()


def pictures(studies: int, views: int, side: int = 336) -> list[list[Image.Image]]:
    """Noise images, the same for both sides: [study][view]."""
    rng = np.random.default_rng(0)
    shape = (side, side, 3)
    return [[Image.fromarray(rng.integers(0, 255, shape, np.uint8)) for _ in range(views)] for _ in range(studies)]
