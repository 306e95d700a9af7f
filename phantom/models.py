"""Architectures and tokenizers of the phantom's small models, before any training (which is assets.py).

Each is a small version of a real component in that component's own classes: a LLaVA (CLIP vision tower, two-layer
projection, Llama) with its processor and a byte-level BPE, a CLIP and a BERT over a WordPiece vocabulary.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rewards import CLOSE, OPEN

MEAN, STD = 0.5, 0.25  # of the phantom's grey values, about; the image processor normalises with them
CHAT = (
    "{{ bos_token }}{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
)


def policy_tokenizer(corpus: list[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the phantom's texts (it reads any text); <report> tags are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(OPEN, normalized=False), AddedToken(CLOSE, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


def new_llava(tokenizer, image_size: int) -> LlavaForConditionalGeneration:
    """A LLaVA of 1.5 M parameters: CLIP ViT (width 128, 3 layers, patch 16) + Llama (width 128, 4 layers)."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id, vision_feature_layer=-1,
                    image_seq_length=(image_size // 16) ** 2)
    )  # fmt: skip


def new_processor(tokenizer, image_size: int) -> LlavaProcessor:
    """The LLaVA processor (resize, crop, normalise; chat template) that belongs to `new_llava`."""
    size = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip


def word_piece(corpus: list[str], folder: Path) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer in BERT's layout: every word of `corpus` whole, other words letter by letter.

    Written out, not trained: the trainer breaks ties at random, and a build that is repeated must end the same.
    """
    words = {word for text in corpus for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text.lower())}
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocab += sorted(words - set(letters))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)


def clip_config(vocab_size: int, sep_id: int, context_length: int = 96) -> dict:
    """The whole `open_clip_config.json` of a small native CLIP over a BERT tokenizer ([CLS] ... [SEP] [PAD]=0 ...).

    open_clip's default pooling takes the largest token id, which is CLIP's end token but a common word here: "eos"
    pools at the first [SEP]. The causal mask keeps the padding, which is all to its right, out of the embedding.
    """
    vision = {"image_size": 64, "layers": 3, "width": 128, "head_width": 32, "patch_size": 16}
    text = {"context_length": context_length, "vocab_size": vocab_size, "width": 128, "heads": 4, "layers": 3,
            "hf_tokenizer_name": "bert", "pool_type": "eos", "eos_id": sep_id, "pad_id": 0}
    preprocess = {"size": 64, "mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}


def new_bert(vocab_size: int) -> BertModel:
    """A BERT of width 128 and 3 layers."""
    return BertModel(BertConfig(
        vocab_size=vocab_size, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip
