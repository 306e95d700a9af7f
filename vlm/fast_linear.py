"""Linear layers for passes without a gradient (sampling, reference policy): the same numbers in fewer operations.

In a decoding step each layer sees a few dozen rows, so what surrounds the arithmetic costs as much as it does:

    PEFT's LoRA              y = W x;  y + B(dropout(A(cast(x)))) * s      ten operations, some of them in Python
    here                     y = W x;  addmm(y, x A^T, s B^T)              three
    on the CPU in float32    y = (W + s B A) x                             one: W is copied anyway, once per block,
                                                                           to lie as oneDNN's kernels want it
No dropout. What `fast_linears` replaces it puts back.
"""

import contextlib
from functools import partial

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from torch.nn import Linear, Parameter


def packed(weight: Tensor, bias: Tensor | None):
    """x (..., in) -> (..., out) with a copy of weight (out, in) in oneDNN's own layout."""
    own = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, own, bias, "none", [], "")


def lora_linear(base, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """x (..., in) -> base(x) + x a b, for a = A^T (in, r) and b = s B^T (r, out); LoRA's part in LoRA's precision."""
    y = base(x)
    sum_ = torch.addmm(y.flatten(0, -2).to(a.dtype), x.flatten(0, -2).to(a.dtype) @ a, b)
    return sum_.to(y.dtype).view_as(y)


def can_be_packed(layer: Linear) -> bool:
    """Whether oneDNN may lay this weight out anew: float32 on the CPU, and whole (FSDP2's shards are another type)."""
    whole = type(layer.weight) is Parameter and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
    return whole and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextlib.contextmanager
@torch.no_grad()
def fast_linears(base, wanted: bool = True):
    """Within this block `base`'s decoder layers and output layer run as said above, LoRA with its active adapter.

    Not `wanted`: nothing changes; torch.compile looks for fewer operations itself.
    """
    small = set()
    with contextlib.ExitStack() as after:
        for layer in [*base.model.language_model.layers.modules(), base.lm_head] if wanted else ():
            if isinstance(layer, LoraLinear) and layer.active_adapters[0] in layer.lora_A:  # else none of this adapter
                [name], frozen = layer.active_adapters, layer.base_layer
                small |= {id(part) for part in layer.modules()}  # they come after it
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]
                whole, lora = can_be_packed(frozen), partial(lora_linear, frozen, a.T, b.T)
                layer.forward = packed(torch.addmm(frozen.weight, b, a), frozen.bias) if whole else lora
            elif isinstance(layer, Linear) and id(layer) not in small and can_be_packed(layer):
                layer.forward = packed(layer.weight, layer.bias)
            else:
                continue
            after.callback(delattr, layer, "forward")
        yield
