"""LoRA (Hu et al. 2022) out of a folder in PEFT's format, checked whole.

Only what vlm/fast_linear.py computes is taken: LoRA, also rsLoRA (arXiv 2312.03732: its scaling is alpha / sqrt(r)), on
linear layers of the language model and the vision projection. All else is refused by name, and no pattern out of a
folder is run: a regex can be made to take hours.
"""

import re
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from formats.files import read_json
from running import parallel
from running.weights import loading, require, require_finite_tensors, require_placed, tensor_shapes
from vlm.families import PARTS

# fields of adapter_config.json that are used, and those that change nothing; any other must have PEFT's default
USED = {"r", "lora_alpha", "lora_dropout", "use_rslora"}
PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # the weights' names tell them
IDLE = PLACES | {"base_model_name_or_path", "task_type", "auto_mapping", "revision", "inference_mode", "peft_version"}


def targets(base) -> str:
    """The regex of the linear layers that an adapter may stand on."""
    return "|".join(PARTS[base.config.model_type].values())


def check_kind(raw: dict, shapes: dict[str, list[int]], own: str) -> None:
    """ValueError unless adapter_config.json `raw` and the weights' names and shapes are LoRA's on the layers `own`."""
    plain, fresh = LoraConfig().to_dict(), [{}, *({"init_lora_weights": how} for how in ("gaussian", "orthogonal"))]
    odd = {key: x for key, x in raw.items() if x and key not in USED | IDLE and x != plain.get(key)}
    if odd not in fresh:  # how it began is no matter, where it left the base as it was
        raise ValueError(f"this kind is not known here: {str(odd)[:200]}")
    ranks = {shape[0] for tensor, shape in shapes.items() if "lora_A" in tensor}
    r, alpha = raw.get("r"), raw.get("lora_alpha")
    known = type(r) is int and type(alpha) in (int, float) and type(raw.get("use_rslora", False)) is bool
    if not known or ranks != {r} or not 0 < alpha / r < 1e6:  # before memory is taken
        raise ValueError(f"r = {r} and lora_alpha = {alpha} with weights of rank {sorted(ranks)}")
    place = re.compile(rf"base_model\.model\.({own})\.lora_[AB]\.weight")
    require_placed([], [tensor for tensor in shapes if not place.fullmatch(tensor)], "its weights")


def places_of(shapes: dict[str, list[int]], raw: dict, base) -> list[str]:
    """The layers' full names, read off the weights' names, so that no pattern of the folder `raw` is ever run.

    ValueError for half an adapter: a name of a list `target_modules` without weights, or a layer that lacks a kind that
    others have (unless `layers_to_transform` or a list of full names leave some out).
    """
    names = {tensor.removeprefix("base_model.model.").rpartition(".lora_")[0] for tensor in shapes}
    listed = raw["target_modules"] if isinstance(raw.get("target_modules"), list) else []
    absent = [name for name in listed if not any(f".{place}".endswith(f".{name}") for place in names)]
    if not raw.get("layers_to_transform") and {*listed} != names:
        kinds = {re.sub(r"\.layers\.\d+\.", ".layers.{}.", name) for name in names}
        numbers = range(base.config.get_text_config().num_hidden_layers)
        absent += {kind.format(i) for kind in kinds for i in numbers} - names
    require_placed(absent, [], "its weights")
    return sorted(names)


def load_adapter(model, folder: Path, name: str = "default"):
    """`model`, the bare base or one with an adapter, with the folder's adapter too, as `name`.

    ValueError, one line, for a kind that is not known here and for weights that are cut off, not finite, of another
    shape or not all in their place. An adapter that says it was made on another base gets a note.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        require(folder, file)
    base = model if name == "default" else model.get_base_model()
    raw, shapes = read_json(folder / "adapter_config.json"), tensor_shapes(folder / "adapter_model.safetensors")
    with loading(f"{folder} cannot be used as an adapter"):
        own = targets(base)
        check_kind(raw, shapes, own)
        places = own if raw.get("target_modules") == own else places_of(shapes, raw, base)
        config = LoraConfig(target_modules=places, **{key: raw[key] for key in USED & raw.keys()})
        if name == "default":
            model = get_peft_model(base, config)
        else:
            model.add_adapter(name, config)
        held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        wanted = {f"{tensor} {list(value.shape)}" for tensor, value in held.items()}
        found = {f"{tensor} {shape}" for tensor, shape in shapes.items()}
        require_placed(wanted - found, found - wanted, "its weights")
        weights = load_file(folder / "adapter_model.safetensors")
        require_finite_tensors(weights, "its weights")
        if not all(x.is_floating_point() for x in weights.values()):
            raise ValueError("its weights are no floating-point numbers")
    if base.device.type != "meta":  # there is nothing to fill
        set_peft_model_state_dict(model, weights, adapter_name=name)
    made_on = str(raw.get("base_model_name_or_path") or base.name_or_path)
    if Path(made_on).parts[-2:] != Path(base.name_or_path).parts[-2:] and parallel.rank() == 0:
        print(f"note: {folder} was made on {made_on}, here it stands on {base.name_or_path}", file=sys.stderr)
    return model
