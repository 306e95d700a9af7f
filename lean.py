"""Linear layers for the sampler: the same numbers in fewer, cheaper operations while one token a row is computed.

In a decoding step each layer sees a few dozen rows, so what surrounds the arithmetic costs as much as it does:

    PEFT's LoRA      y = W x;  y + B(dropout(A(cast(x)))) * s         ten operations, some of them in Python
    here             y = W x;  addmm(y, x A^T, s B^T)                 three
    on the CPU       W is laid out once per rollout as oneDNN's kernels want it, not again in every call

No gradients and no dropout: `lean_layers` is for sampling alone. What it replaces it puts back.
"""

import contextlib
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import Linear, Parameter


def packed_linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) with a weight in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def lora_linear(base, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """x (..., in) -> base(x) + x a b, for a = A^T (in, r) and b = s B^T (r, out); LoRA's part in LoRA's precision."""
    y = base(x)
    sum_ = torch.addmm(y.flatten(0, -2).to(a.dtype), x.flatten(0, -2).to(a.dtype) @ a, b)
    return sum_.to(y.dtype).view_as(y)


def can_be_packed(layer: Linear) -> bool:
    """Whether oneDNN may lay this weight out anew: float32 on the CPU, and whole (FSDP2's shards are another type)."""
    weight = layer.weight
    whole = type(weight) is Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return whole and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
@torch.no_grad()
def lean_layers(*modules: torch.nn.Module):
    """Within this block the linear layers inside `modules` run as said above, LoRA with its active adapter."""
    inside = [layer for module in modules for layer in module.modules()]
    lora = [layer for layer in inside if isinstance(layer, LoraLinear)]
    small = {id(part) for layer in lora for part in layer.modules() if part is not layer.base_layer}
    changed = []
    for layer in inside:
        if isinstance(layer, Linear) and id(layer) not in small and can_be_packed(layer):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
            layer.forward = partial(packed_linear, packed, layer.bias)
            changed.append(layer)
    for layer in lora:
        [name] = layer.active_adapters
        a, b = layer.lora_A[name].weight.T, layer.lora_B[name].weight.T * layer.scaling[name]
        layer.forward = partial(lora_linear, layer.base_layer, a, b)
        changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward
