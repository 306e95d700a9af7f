"""The lean linear layers compute what PEFT's do, and leave no trace."""

import pytest
import torch
from conftest import randomise

from model import add_reference, get_base, load_policy, use_reference
from vlm.fast_linear import fast_linears


@pytest.fixture
def two_adapters(cfg, tmp_path):
    """A policy whose adapter `default` and reference `ref` differ."""
    model, _ = load_policy(cfg, new_lora=True)
    randomise(model, seed=2)
    model.save_pretrained(tmp_path)
    model, _ = load_policy(cfg, new_lora=True)
    randomise(model, seed=3)
    add_reference(model, tmp_path)
    return model


def outputs(model):
    base = get_base(model)
    ids = torch.arange(10, 30).view(4, 5)
    return base.lm_head(base.model.language_model(input_ids=ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_the_active_adapter_counts(two_adapters, packed, monkeypatch):
    if not packed:  # as on a GPU
        monkeypatch.setattr("vlm.fast_linear.can_be_packed", lambda layer: False)
    model, base = two_adapters, get_base(two_adapters)
    plain = outputs(model)
    with fast_linears(base):
        lean = outputs(model)
    torch.testing.assert_close(lean, plain, atol=1e-5, rtol=1e-5)
    with use_reference(model):
        reference = outputs(model)
        with fast_linears(base):
            torch.testing.assert_close(outputs(model), reference, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, reference, atol=1e-3)


def test_nothing_is_left_behind(two_adapters):
    model, base = two_adapters, get_base(two_adapters)
    before = outputs(model)
    with pytest.raises(KeyError), fast_linears(base):
        changed = [layer for layer in model.modules() if "forward" in vars(layer)]
        assert len(changed) == 2 * 7 + 1  # seven with LoRA in each layer, and the output layer
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(outputs(model), before)


@torch.no_grad()
def test_bfloat16_keeps_lora_in_float32(cfg):
    from dataclasses import replace

    model, _ = load_policy(replace(cfg, model=replace(cfg.model, dtype="bfloat16")), new_lora=True)
    randomise(model)
    base = get_base(model)
    plain = outputs(model)
    with fast_linears(base):
        lean = outputs(model)
    assert lean.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(lean, plain, atol=0.05, rtol=0.02)
