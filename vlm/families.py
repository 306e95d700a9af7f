"""What differs between model families: how a checkpoint is loaded, what its parts are called, which tokens stand for an
image and which positions the prompt's tokens have. model.py is the same for all of them.

    llava           Hugging Face layout (llava-hf/*); chat template and image preprocessing as the folder says
    llava_mistral   LLaVA-Med v1.5 (arXiv 2306.00890) in its original layout, which transformers does not know
    qwen2_5_vl      Qwen2.5-VL (arXiv 2502.13923): as many image tokens as the image is large, 3-D positions (mRoPE)

LLaVA-Med becomes transformers' LLaVA by renaming its weights. Its tokenizer has no image token, and a new one would
need new rows in two matrices. The placeholder is therefore `<unk>`: with byte fallback no text ever becomes it.
"""

import re
import tomllib
import warnings
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from running import weights

# What the two parts of a stage are called inside each family's module tree. Regexes, not lists of suffixes:
# "q_proj" alone would also match the vision tower, which stays frozen.
LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LLAVA = {"language": LANGUAGE, "projector": r".*multi_modal_projector\.linear_[12]"}
QWEN = {"language": LANGUAGE, "projector": r".*visual\.merger\.mlp\.[02]"}
PARTS = {"llava": LLAVA, "llava_mistral": LLAVA, "qwen2_5_vl": QWEN}

LLAVA_MED = tomllib.loads((Path(__file__).parent / "llava_med.toml").read_text(encoding="utf-8"))

# PEFT asks for the first at every load, the second has a new name from 5.2x on: nothing a user could mend
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)


def load_family(path: str, dtype: torch.dtype, max_pixels: int = 0, device_map: str | None = None):
    """(base model, processor) of a checkpoint folder or hub name; max_pixels: see `model.max_pixels` in config.py.
    With device_map "meta" the weights' names and shapes are looked at, in seconds, and the weights stay on the disk.

    ValueError naming the first fault: an unknown family, a broken file, code, quantised weights, a made-up tokenizer, a
    weight that is NaN, left over, of another shape or missing (transformers would leave it random and merely warn).
    """
    config = read_config(path)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in PARTS:
        raise ValueError(f"{path}: model family '{family}' is not supported; known: {', '.join(PARTS)}")
    if max_pixels and family != "qwen2_5_vl":
        raise ValueError(f"model.max_pixels is for qwen2_5_vl; {path} is a {family}, which has one image size")
    for key in weights.REFUSED.keys() & {key for key, value in config.items() if value}:
        raise ValueError(f"{path}/config.json: '{key}': {weights.REFUSED[key]}")
    if Path(path).is_dir():  # else a hub name, whose files the hub has checked
        weights.check_model(Path(path))
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False,
               "device_map": device_map}  # fmt: skip
    with weights.loading(f"{path}: cannot be loaded"):  # a shard is not there, sizes contradict each other
        if family == "llava_mistral":
            model, info, processor = load_llava_med(path, config, **options)
        else:
            model, info = transformers.AutoModelForImageTextToText.from_pretrained(path, **options)
            processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
    shapes = [f"{name} {list(got)} (by config.json {list(want)})" for name, got, want in info["mismatched_keys"]]
    weights.require_placed(info["missing_keys"], [*shapes, *info["unexpected_keys"]], path)
    if device_map != "meta":
        weights.require_finite_tensors(model, path)
    weights.check_tokenizer(processor.tokenizer, path)
    processor.tokenizer.padding_side = "left"  # prompts end flush with the report's first token
    if family in ("llava", "llava_mistral") and processor.patch_size is None:  # LLaVA-Med, or a folder of 2024
        processor.patch_size = model.config.vision_config.patch_size
        processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
        # CLIP's class token, which the strategy "default" drops
        processor.num_additional_image_tokens = int(model.config.vision_config.model_type == "clip_vision_model")
    if max_pixels:
        processor.image_processor.size["longest_edge"] = max_pixels  # Qwen's name for a number of pixels
    return model, processor


def read_config(path: str) -> dict:
    """The folder's or hub model's config.json; ValueError when there is none or it is no JSON object."""
    place, up = Path(path), Path(path).parent
    if place.is_dir() or place.is_absolute() or (str(up) != "." and up.is_dir()):
        weights.require(place, "config.json")  # asking the hub for it would take half a minute
    with weights.loading(f"{path}: no readable config.json"):
        return dict(transformers.PretrainedConfig.get_config_dict(path)[0])


def load_llava_med(path: str, raw: dict, **options):
    """(model, loading info, processor) of a `llava_mistral` folder with config.json `raw`, its weights renamed."""
    tokenizer = llava_med_tokenizer(path)
    config = llava_med_config(path, raw, tokenizer)
    side = config.vision_config.image_size
    images = transformers.LlavaImageProcessorPil(  # resizes with PIL, as in training; torchvision's differs a little
        do_pad=raw.get("image_aspect_ratio") == "pad",  # to a square, with CLIP's mean colour
        size={"shortest_edge": side}, crop_size={"height": side, "width": side})  # fmt: skip
    image, chat = tokenizer.unk_token, LLAVA_MED["chat_template"]
    processor = transformers.LlavaProcessor(images, tokenizer, image_token=image, chat_template=chat)
    llava = transformers.LlavaForConditionalGeneration
    return *llava.from_pretrained(path, config=config, key_mapping=LLAVA_MED["rename"], **options), processor


def llava_med_config(path: str, raw: dict, tokenizer) -> transformers.LlavaConfig:
    """transformers' LLaVA configuration of a `llava_mistral` folder; ValueError for a setting that is not known.

    The tower's sizes: in folder `mm_vision_tower` (inside the checkpoint, or anywhere), else CLIP ViT-L/14-336's.
    """
    for key in {"mm_vision_tower", "mm_vision_select_layer"} - raw.keys():
        raise ValueError(f"{path}/config.json: no '{key}' there; is this the original LLaVA-Med v1.5?")
    for key, known in LLAVA_MED["known"].items():
        if raw.get(key) is not None and raw[key] not in known:
            raise ValueError(f"{path}/config.json: {key} is {raw[key]!r}; known: {', '.join(map(repr, known))}")
    tower, with_class = raw["mm_vision_tower"], raw.get("mm_vision_select_feature") == "cls_patch"
    sizes = [folder for folder in (Path(path) / tower, Path(tower)) if (folder / "config.json").is_file()]
    if not sizes and not tower.rstrip("/").endswith("clip-vit-large-patch14-336"):
        raise ValueError(f"{path}: vision tower '{tower}' is unknown; put its config.json into {Path(path) / tower}")
    clip = transformers.CLIPVisionConfig
    vision = clip.from_pretrained(sizes[0]) if sizes else clip(**LLAVA_MED["clip_l_336"])
    return transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.MistralConfig.from_dict(raw | {"model_type": "mistral"}),
        image_token_index=tokenizer.unk_token_id, image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu", vision_feature_layer=raw["mm_vision_select_layer"],
        vision_feature_select_strategy="full" if with_class else "default")  # fmt: skip


def llava_med_tokenizer(path: str):
    """The Llama tokenizer of a `llava_mistral` folder: <unk> stands for an image, </s> pads."""
    # legacy: each piece of text between images starts with a space, as in LLaVA's own `tokenizer_image_token`
    tokenizer = transformers.LlamaTokenizer.from_pretrained(path, legacy=True, add_bos_token=True)
    tokenizer.pad_token = tokenizer.eos_token  # the folder's is <unk>, here the image; where it pads, the mask is 0
    return tokenizer


def placeholder_ids(config, tokenizer) -> set[int]:
    """Ids of the tokens that stand for (the border of) an image or a video, and of rows that pad the vocabulary."""
    named = {getattr(config, f"{name}_token_id", None) for name in ("image", "video", "vision_start", "vision_end")}
    spelt = {i for i, token in tokenizer.added_tokens_decoder.items() if re.search("image|video|vision", token.content)}
    return named - {None} | spelt | set(range(len(tokenizer), config.get_text_config().vocab_size))


@torch.no_grad()
def encode_images(base, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` and `vision`, what the frozen tower makes of the images; sampling, reference policy and loss share it.

    LLaVA: (images, tokens, Dv); Qwen: (patches, Dv), in the order of its attention windows.
    """
    if "vision" in inputs:
        return inputs
    pixels = inputs["pixel_values"].to(base.dtype)
    if base.config.model_type == "qwen2_5_vl":
        vision = base.model.visual(pixels, grid_thw=inputs["image_grid_thw"]).last_hidden_state
    else:
        layers = base.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        skip = base.config.vision_feature_select_strategy == "default"  # the class token, CLIP's first
        vision = layers[base.config.vision_feature_layer][:, int(skip) :]
    return inputs | {"vision": vision}


def select_studies(inputs: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Inputs of studies first .. last - 1. Images lie one after the other, Qwen's as patches, not one row per study."""

    def parts_of(counts: Tensor, of: slice) -> slice:
        return slice(int(counts[: of.start].sum()), int(counts[: of.stop].sum()))

    studies = slice(first, last)
    images = parts_of(inputs["image_counts"], studies)
    patches = parts_of(inputs["image_grid_thw"].prod(dim=-1), images) if "image_grid_thw" in inputs else images
    rows = dict.fromkeys(inputs, studies) | {"image_grid_thw": images, "pixel_values": patches, "vision": patches}
    return {name: x[rows[name]] for name, x in inputs.items()}


def embed_prompt(base, inputs: dict[str, Tensor]) -> Tensor:
    """Embeddings (B, P, D) of the prompts' tokens, the projected image features in the image tokens' places."""
    vision, ids = encode_images(base, inputs)["vision"], inputs["input_ids"]
    if base.config.model_type == "qwen2_5_vl":
        visual, grids = base.model.visual, inputs["image_grid_thw"]
        sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
        window, _ = get_vision_window_index(grids, *sizes)  # the place of each token in its attention window's order
        features = visual.merger(vision)[window.argsort()]  # (image tokens, D)
    else:
        features = base.model.multi_modal_projector(vision).flatten(0, 1)  # (image tokens, D)
    embeds, places = base.get_input_embeddings()(ids), ids == base.config.image_token_id
    if int(places.sum()) != len(features):
        said = f"{int(places.sum())} image tokens in the prompts, but {len(features)} image features"
        raise ValueError(f"{said}: make the processor's patch_size agree with config.json")
    return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))


def prompt_positions(base, inputs: dict[str, Tensor]) -> Tensor:
    """Position ids of left-padded prompts: (B, P); under Qwen's mRoPE (3, B, P) for time, height and width.

    There an image takes max(height, width) positions, not one per token, and the text goes on after them.
    """
    mask = inputs["attention_mask"]  # (B, P)
    if base.config.model_type != "qwen2_5_vl":
        return (mask.cumsum(-1) - 1).clamp(min=0)
    grids = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw")}
    return base.model.get_rope_index(inputs["input_ids"], attention_mask=mask, **grids)[0]
