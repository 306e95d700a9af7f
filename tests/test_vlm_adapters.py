"""An adapter folder is the policy that its numbers say, or it is refused in one line."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_images, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from model import completion_logps, load_policy, sampling_rules, use_reference
from rollout import rollout
from vlm.adapters import load_adapter, places_of, targets
from vlm.families import load_family

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def base(base_dir):
    return load_family(str(base_dir), torch.float32)[0]


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory):
    """An adapter that does something, as `save_adapter` leaves it."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets(base)))
    randomise(model)
    model.save_pretrained(folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def set_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(base, folder, match):
    """In one line that names the folder."""
    with pytest.raises(ValueError, match=match) as error:
        load_adapter(copy.deepcopy(base), folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def first(ending, change):
    """Changes the first weight of this ending; None = takes it out."""
    def changed(weights):
        name = next(name for name in sorted(weights) if name.endswith(ending))
        new = change(weights[name])
        return {n: x for n, x in (weights | {name: new}).items() if x is not None}

    return changed


@pytest.mark.parametrize("match, change", [
    # the names of transformers before 4.52, then those of a model that was not PEFT's
    ("28 weights have no place.*model.layers", lambda w: {n.replace("language_model.", ""): x for n, x in w.items()}),
    ("32 weights have no place", lambda w: {n.removeprefix("base_model."): x for n, x in w.items()}),
    ("14 weights are not in it.*layers.1", lambda w: {n: x for n, x in w.items() if "layers.1." not in n}),
    ("1 weights are not in it.*up_proj.lora_B", first("1.mlp.up_proj.lora_B.weight", lambda x: None)),
    (r"rank \[\]", lambda w: {}),
    (r"rank \[2, 4\]", first("linear_1.lora_A.weight", lambda x: x[:2])),
    (r"1 weights are not in it.*lora_B.weight \[32, 4\]", first("o_proj.lora_B.weight", lambda x: x[:31])),
    ("q_proj.lora_A.weight holds NaN", first("q_proj.lora_A.weight", lambda x: x * float("nan"))),
    ("linear_2.lora_B.weight holds NaN or inf", first("linear_2.lora_B.weight", lambda x: x + float("inf"))),
    ("1 weights have no place.*magnitude", lambda w: w | {"q_proj.lora_magnitude_vector": torch.ones(32)}),
    ("1 weights have no place.*tower", lambda w: w | {"base_model.model.model.tower.lora_B.weight": torch.ones(32, 4)}),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(match, change, base, folder):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    refused(base, folder, match)


@pytest.mark.parametrize("changes, match", [
    ({"use_dora": True}, "not known here: .*use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"(a+)+$": 8}}, "alpha_pattern"),
    ({"init_lora_weights": "pissa"}, "pissa"),  # it changes the base, too
    ({"peft_type": "IA3"}, "peft_type.*IA3"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "PROMPT_TUNING"),
    ({"something_new": 1}, "something_new"),
    ({"use_rslora": "false"}, "r = 4"),
    ({"lora_alpha": True}, "lora_alpha = True"),
    ({"target_modules": [3]}, "cannot be used"),
    ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
    ({"r": 10**12}, "weights of rank"),
    ({"r": "4"}, "weights of rank"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    ({"lora_alpha": "16"}, "lora_alpha = 16"),
    ({"lora_dropout": 7}, "dropout probability"),
])  # fmt: skip
def test_kinds_that_the_fast_layers_do_not_know_are_refused_by_name(changes, match, base, folder):
    set_config(folder, **changes)
    refused(base, folder, match)


@pytest.mark.parametrize("damage, match", [
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "broken or cut off"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), "empty"),
    (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git-lfs pointer"),
    (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), f"no {WEIGHTS}"),  # a pickle is not read
    (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "r = None"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
])  # fmt: skip
def test_half_a_folder_is_refused(damage, match, base, folder):
    damage(folder)
    refused(base, folder, match)


@torch.no_grad()
def logps(cfg, model, processor, others=()):
    """Log-probs of the same reports by the sampler, by the loss, and by `others`, all with the active adapter."""
    out, _, inputs = rollout(model, processor, make_images(2), ["a", "b"], cfg, step=1)
    rules = sampling_rules(model, processor, cfg)
    given = inputs, out.completions, out.completion_mask, rules
    return [out.logps, *(completion_logps(one, *given) for one in (model, *others))]


def alike(values):
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"lora_alpha": 3, "init_lora_weights": "gaussian"},
                                      {"target_modules": ["linear_1", "linear_2"]}])  # fmt: skip
def test_other_adapters_are_what_peft_makes_of_them(settings, cfg, base, tmp_path):
    settings = {"r": 2, "lora_alpha": 8, "target_modules": targets(base)} | settings
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model, processor = load_policy(cfg, tmp_path, reference=tmp_path)
    peft = PeftModel.from_pretrained(load_policy(cfg)[0], tmp_path).eval()
    alike(logps(cfg, model, processor, [peft]))
    with use_reference(model):
        alike(logps(cfg, model, processor, [peft]))


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*vision_tower.*"},  # CLIP has the same names
    {"target_modules": ["q_proj"], "exclude_modules": ".*vision_tower.*", "layers_to_transform": [1]},
    {"target_modules": r".*language_model.*\.(k_proj|down_proj)", "init_lora_weights": "orthogonal"},
])  # fmt: skip
def test_where_an_adapter_stands_is_told_by_its_weights_and_no_pattern_is_run(settings, cfg, base, tmp_path):
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, lora_alpha=8, **settings))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(load_policy(cfg)[0], tmp_path).eval()
    set_config(tmp_path, target_modules="(.*a)*b")  # would take hours on a long name
    alike(logps(cfg, *load_policy(cfg, tmp_path), [peft]))
    weights = load_file(tmp_path / WEIGHTS)
    kept = {name: x for name, x in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / WEIGHTS)
    if kept and "layers_to_transform" not in settings:
        refused(base, tmp_path, "weights are not in it.*layers.1")


def test_each_layer_that_lacks_a_weight_is_counted_once():
    three = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3)))
    shapes = dict.fromkeys(f"base_model.model.language_model.layers.{i}.q_proj.lora_A.weight" for i in (0, 2))
    with pytest.raises(ValueError, match="its weights: 1 weights are not in it, e.g. language_model.layers.1.q_proj"):
        places_of(shapes, {"target_modules": ["q_proj"]}, three)


def test_a_reference_that_does_not_fit_is_refused(cfg, folder):
    set_config(folder, use_dora=True)
    with pytest.raises(ValueError, match=f"{folder} cannot .*use_dora"):
        load_policy(cfg, new_lora=True, reference=folder)


def test_policy_and_reference_may_have_lora_on_other_layers(cfg, base, folder, tmp_path):
    only = LoraConfig(r=2, target_modules=["model.language_model.layers.0.self_attn.q_proj"])
    some = get_peft_model(copy.deepcopy(base), only)
    some.save_pretrained(tmp_path / "some")  # its update is 0: it is the base
    for adapter, reference in ((folder, tmp_path / "some"), (tmp_path / "some", folder)):
        model, processor = load_policy(cfg, adapter, reference=reference)
        alike(logps(cfg, model, processor))
        with use_reference(model):
            alike(logps(cfg, model, processor))


def test_an_adapter_of_another_base_gets_a_note(cfg, folder, capsys):
    load_policy(cfg, folder)
    assert "note:" not in capsys.readouterr().err
    set_config(folder, base_model_name_or_path="Qwen/Qwen2.5-VL-3B-Instruct")
    load_policy(cfg, folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(said) == 1 and "was made on Qwen/Qwen2.5-VL-3B-Instruct" in said[0] and cfg.model.path in said[0]
