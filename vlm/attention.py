r"""Shared-prefix attention: the image and the prompt of a study stand once, beside the G reports that follow them.

In training all reports of a study lie in one row, without padding between them:

        keys      image + prompt      o_1      o_2      o_3
      queries  +----------------+-------+-------+-------+
        image  |  \             |       |       |       |
          +    |      causal    |       |       |       |
       prompt  |             \  |       |       |       |
               +----------------+-------+-------+-------+
         o_1   |  every key     |causal |       |       |      o_2 never sees o_1: each report is written
         o_2   |  every key     |       |causal |       |      as if it were the only one
         o_3   |  every key     |       |       |causal |
               +----------------+-------+-------+-------+

With numbers: a prefix of P = 2 tokens x y and G = 2 reports of 3 and 2 tokens, o_1 = a b $ and o_2 = c $ ($ ends one).
A report's last token predicts nothing, so a, b and c are the inputs and the row has P + S = 5 places (`Packing`):

        place in the row    0   1   2   3   4       order      0 1 2   a, b, c in the grid of inputs [a b | c -]
        token               x   y   a   b   c       positions  0 1 0   tokens of its own report before each
        sees                x   xy  xya xyab xyc    outputs    1 2 3   a comes from place 1 (y), b from 2, $ from 3
        predicts                ac  b   $   $                  1 4 -   c comes from place 1 too, its $ from 4

In sampling each report is a row of one new token, with its own keys and values in a buffer that is allocated once; the
prefix's stay one copy per study. One softmax runs over both: softmax([ q @ prefix_keys.T | q @ own_keys.T ] / sqrt(d)).
The prefix's cost does not grow with G, and the result is that of G separate forwards, up to float rounding.

How a plan reaches a layer: `run_layers` passes `plan=` (a `Packing`, `Recording` or `Decoding`) to the language model,
whose layers hand on keywords that they do not know to their attention function: `attend`, registered with transformers
under NAME, chosen by `model.prepare`. Without a plan (`generate`, a plain forward) it is transformers' `sdpa`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "shared_prefix"
STRIP = 64  # report tokens that attend in one call, at least; half the prefix where that is more
SHRINK = 0.8  # finished reports leave the batch when fewer than this share of it are still being written


def attend(module, query, key, value, attention_mask, *, plan=None, scaling=None, **options):
    """transformers' attention function: query (rows, H, t, d), key and value (rows, Hkv, t, d) -> (rows, t, H, d)."""
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return plan.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def run_layers(base, embeds: Tensor, positions: Tensor, plan) -> Tensor:
    """Hidden states (rows, t, D) of the language model for token embeddings (rows, t, D), attending as `plan` says.

    positions: (rows, t), or (3, rows, t) under mRoPE. The 4-D mask keeps transformers from making one of its own;
    ValueError for a model that would not ask the plan: every token would see every other.
    """
    if base.model.language_model.config._attn_implementation != NAME:
        raise ValueError(f"the language model does not attend as '{NAME}': call model.prepare on it first")
    given = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": embeds.new_zeros(1, 1, 1, 1)}
    return base.model.language_model(**given, use_cache=False, plan=plan).last_hidden_state


@dataclass
class Packing:
    """Where the tokens of a study's G reports lie in its row, after the prefix (P tokens)."""

    order: Tensor  # (B, S) index of each slot's token in the study's own (G, T - 1) grid of input tokens
    positions: Tensor  # (B, S) how many report tokens stand before it
    outputs: Tensor  # (B, G, T) index in the row of the token whose output predicts report token t
    prefix_mask: Tensor | None  # (B, 1, P, P) who sees whom in the prefix; None = plain causal
    # Slots [first, last) see the prefix and slots [start, last), with a mask (B, 1, last - first, P + last - start).
    # A report sees no other one, so most of (S, S) is empty: strips of a few reports leave out most of that.
    strips: list[tuple[int, int, int, Tensor]]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Packed rows (B, H, P + S, d) -> (B, H, P + S, d)."""
        groups, sizes = query.shape[1] // key.shape[1], [query.shape[2] - self.order.shape[1], self.order.shape[1]]
        pairs = (x.split(sizes, dim=2) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
        (query, queries), (key, keys), (value, values) = pairs  # the prefix's (B, H, P, d), the reports' (B, H, S, d)
        outputs = [self.mix(query, key, value, self.prefix_mask, scaling)]
        for first, last, start, mask in self.strips:
            both = (key, keys), (value, values)
            seen = (torch.cat([x, own[:, :, start:last]], dim=2) for x, own in both)  # (B, H, P + last - start, d) each
            outputs.append(self.mix(queries[:, :, first:last], *seen, mask, scaling))  # (B, H, last - first, d)
        return torch.cat(outputs, dim=2)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """softmax(q @ k.T) @ v: queries (B, H, q, d), keys (B, H, k, d), a mask or None = causal -> (B, H, q, d)."""
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


@dataclass
class Recording(Packing):
    """A packing whose layers attend by explicit weights, and which keeps those of the tokens that write the reports.

    weights: per layer (B, 1 + S, P), mean over the heads, on the CPU: what the prefix's last token and each report
    token look at in the prefix. Report token t of candidate g is written by row outputs[b, g, t] - (P - 1).
    """

    weights: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.kept: list[Tensor] = []  # (B, 1, P), then (B, last - first, P) of each strip
        output = super().attend(layer, query, key, value, scaling)
        self.weights.append(torch.cat(self.kept, dim=1).cpu())
        return output

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        if mask is None:
            mask = additive(torch.ones(query.shape[2], key.shape[2], device=key.device).tril() > 0, key.dtype)
        weights = (query @ key.transpose(2, 3) * scaling + mask).softmax(dim=3, dtype=torch.float32)  # (B, H, q, k)
        mean = weights.detach().mean(dim=1)  # (B, q, k)
        self.kept.append(mean[..., : self.kept[0].shape[2]] if self.kept else mean[:, -1:])  # the prefix comes first
        return weights.to(value.dtype) @ value


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """True = 0, False = -inf. Made once: from a mask of truth values each layer would make and keep its own."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def causal_mask(prompt_mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, P), 1 = real -> what the prefix's tokens see, (B, 1, P, P) to add; None where there is no padding."""
    if bool(prompt_mask.all()):
        return None
    seen = prompt_mask.bool()[:, None, :].expand(-1, prompt_mask.shape[1], -1).tril()  # (B, P, P)
    seen.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: its softmax would be NaN
    return additive(seen[:, None], dtype)


def pack(prompt_mask: Tensor, completion_mask: Tensor, dtype: torch.dtype = torch.float32, plan=Packing) -> Packing:
    """Plan for prompts (B, P), left-padded, and their reports (B * G, T), right-padded; 1 = real; the model's dtype.
    plan: Packing, or Recording."""
    written = completion_mask.bool().unflatten(0, (len(prompt_mask), -1))  # (B, G, T)
    is_input = written[:, :, 1:].flatten(1)  # (B, G * (T - 1))
    slots = int(is_input.sum(dim=1).max())  # S
    order = (~is_input).byte().argsort(dim=1, stable=True)[:, :slots]  # (B, S) real tokens first, in their order
    inputs_before = pad(is_input.cumsum(dim=1).view_as(written[:, :, 1:]), (1, 0))  # (B, G, T), in its study's row
    outputs = (prompt_mask.shape[1] - 1 + inputs_before) * written  # (B, G, T)
    length = max(written.shape[2] - 1, 1)  # of a report in the grid of inputs
    strips = list(strips_of(prompt_mask.bool(), order // length, is_input.gather(1, order), dtype))
    return plan(order, order % length, outputs, causal_mask(prompt_mask, dtype), strips)


def strips_of(prompt_mask: Tensor, owner: Tensor, real: Tensor, dtype: torch.dtype):
    """The strips of `Packing`. prompt_mask (B, P); owner (B, S): the report a slot belongs to; real (B, S)."""
    (b, prefix), slots = prompt_mask.shape, owner.shape[1]
    size, slot = max(STRIP, prefix // 2), torch.arange(slots, device=owner.device)
    for first in range(0, slots, size):
        last = min(first + size, slots)
        before = (owner < owner[:, first : first + 1]) & real  # (B, S); padding has owners too
        start = int(before.sum(dim=1).min())  # where the first slot's report begins
        mine = owner[:, first:last, None] == owner[:, None, start:last]  # (B, last - first, last - start)
        mine &= (slot[first:last, None] >= slot[start:last]) & real[:, None, start:last]
        seen = prompt_mask[:, None, :].expand(b, last - first, prefix)  # (B, last - first, P)
        yield first, last, start, additive(torch.cat([seen, mine], dim=2)[:, None], dtype)


class Decoding:
    """The KV cache of sampling, while N reports of B studies are written, one token a forward pass.

    Rows of one study stand together. `prefill` fills the prefix; then `start` says how many reports each study has.
    """

    def __init__(self, prompt_mask: Tensor, dtype: torch.dtype):
        self.prompt_mask, self.causal = prompt_mask, causal_mask(prompt_mask, dtype)  # (B, P), 1 = real
        self.t = 0  # own tokens that are in the buffers
        self.prefix: list[tuple[Tensor, Tensor]] = []  # per layer (B, Hkv, P, d) twice
        self.own: list[tuple[Tensor, Tensor]] = []  # per layer (N, Hkv, T, d) twice; none: the prefix is being read

    def start(self, reports: int, length: int) -> None:
        """G = `reports` rows for each study, of at most `length` tokens."""
        device = self.prompt_mask.device
        self.own = [tuple(x.new_empty(len(x) * reports, x.shape[1], length, x.shape[3]) for x in layer)
                    for layer in self.prefix]  # fmt: skip
        self.arrange(torch.arange(len(self.prompt_mask), device=device).repeat_interleave(reports))

    def arrange(self, study: Tensor) -> None:
        """Lay rows (N,), whose studies ascend, out as a grid of B studies x W rows, W = the most that a study has."""
        counts = torch.bincount(study, minlength=len(self.prompt_mask))  # (B,)
        self.study, self.width = study, int(counts.max())
        taken = (torch.arange(self.width, device=study.device) < counts[:, None]).flatten()  # (B * W,)
        self.full = len(study) == len(taken)  # then rows and grid are the same thing
        self.slot = taken.nonzero()[:, 0]  # (N,) a row's place in the grid
        self.grid = taken.cumsum(dim=0) - 1  # (B * W,) a place's row; one without a row repeats the row before
        padding = self.prompt_mask.logical_not()[:, None, None, :]  # (B, 1, 1, P)
        self.padding = padding if bool(padding.any()) else None

    def keep(self, writing: Tensor) -> Tensor:
        """Which rows (n',) of the n to go on with, where `writing` (n,) are not finished; the cache forgets the others.
        A copy of what is written so far: not at every token. None is left: (0,), and nothing is forgotten."""
        left = int(writing.sum())
        if left >= SHRINK * len(writing):
            return torch.arange(len(writing), device=writing.device)
        rows = writing.nonzero()[:, 0]  # (n',)
        if left:
            self.take(rows)
        return rows

    def take(self, rows: Tensor) -> None:
        """Forget all reports but `rows` (n',), ascending, and the studies that have none left."""
        studies, study = self.study[rows].unique_consecutive(return_inverse=True)  # (B',), (n',)
        for cache, left in ((self.own, rows), (self.prefix, studies)):
            for i, layer in enumerate(cache):  # one by one: never two copies of them all
                cache[i] = layer if len(left) == len(layer[0]) else tuple(x[left] for x in layer)
        self.prompt_mask = self.prompt_mask[studies]
        self.arrange(study)

    def step(self, base, embeds: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (N, 1, D) after one more token of each report: embeddings (N, 1, D), positions (N, 1)."""
        hidden = run_layers(base, embeds, positions, self)  # (N, 1, D)
        self.t += 1
        return hidden

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """The prefix itself: (B, H, P, d) -> (B, H, P, d). One new token per row: (N, H, 1, d) -> (N, H, 1, d)."""
        groups = query.shape[1] // key.shape[1]
        if not self.own:
            self.prefix.append((key.contiguous(), value.contiguous()))
            key, value, causal = repeat_kv(key, groups), repeat_kv(value, groups), self.causal is None
            return scaled_dot_product_attention(query, key, value, self.causal, is_causal=causal, scale=scaling)
        own_keys, own_values, unwritten = self.extend(layer, key, value)
        (prefix_keys, prefix_values), (n, heads) = self.prefix[layer], key.shape[:2]
        query = query.view(n, heads, groups, -1) * scaling  # (N, Hkv, groups, d): heads that share a key side by side
        scores = self.to_grid(query) @ prefix_keys.transpose(2, 3)  # (B, Hkv, W * groups, P)
        if self.padding is not None:
            scores = scores.masked_fill(self.padding, float("-inf"))  # (B, Hkv, W * groups, P)
        own_scores = self.to_grid(query @ own_keys.transpose(2, 3))  # (B, Hkv, W * groups, t + 1)
        if unwritten is not None:
            own_scores = own_scores.masked_fill(unwritten, float("-inf"))  # (B, Hkv, W * groups, T)
        weights = torch.cat([scores, own_scores], dim=3).softmax(dim=3, dtype=torch.float32).to(value.dtype)
        weights, own_weights = weights.split([scores.shape[3], own_scores.shape[3]], dim=3)
        output = self.to_rows(weights @ prefix_values) + self.to_rows(own_weights) @ own_values  # (N, Hkv, groups, d)
        return output.reshape(n, heads * groups, 1, -1)

    def extend(self, layer: int, key: Tensor, value: Tensor):
        """Write key and value (N, Hkv, 1, d) of the new token; (own keys, own values (N, Hkv, t + 1, d), None).

        Where the buffers have places beyond t (vlm/static_decoding.py), which of them, True, instead of None.
        """
        own_keys, own_values = self.own[layer]
        own_keys[:, :, self.t], own_values[:, :, self.t] = key[:, :, 0], value[:, :, 0]
        return own_keys[:, :, : self.t + 1], own_values[:, :, : self.t + 1], None

    def to_grid(self, x: Tensor) -> Tensor:
        """Rows (N, Hkv, groups, c) -> (B, Hkv, W * groups, c)."""
        x = x if self.full else x[self.grid]  # (B * W, Hkv, groups, c)
        return x.unflatten(0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """The way back: (B, Hkv, W * groups, c) -> (N, Hkv, groups, c)."""
        x = x.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)  # (B * W, Hkv, groups, c)
        return x if self.full else x[self.slot]
