r"""A decoding step of one shape, so that torch.compile can take it: `rollout.compile`, on a GPU a CUDA graph.

`attention.Decoding` grows by a token each step and lets each report leave as it ends: every step has a shape of its
own, and eager layers, which launch some hundred kernels one by one, leave a GPU idle between them. Here nothing changes
shape while reports are written, and no number is looked at by Python:

    own keys   step 3   a a a - - - - -     a whole buffer of T places; those not yet written (-) are masked out
               step 4   a a a a - - - -     `t` is a number on the device

    rows       W = 4    abcd efgh ijkl      every study keeps W rows; as reports end, W is halved, and so is the number
               W = 2    bd   ef   il        of studies: a few sizes, each compiled once. A finished report (f) may keep
               W = 1    b    e    l         its row for that: what it goes on writing is dropped

    looks      token 8, 16, ...         which reports have ended is asked then only: whoever asks waits for the GPU,
                                        which otherwise has its next steps before it needs them

The numbers are those of the plain path up to float rounding, the tokens the same.
"""

import functools
from itertools import chain

import torch
from torch import Tensor

from vlm.attention import Decoding, run_layers

LOOK = 8  # tokens between two looks at what has ended
SHAPES = 64  # sizes of batches that may be compiled; torch's own limit is 8, beyond which a step fails


class StaticDecoding(Decoding):
    """`attention.Decoding` with buffers, masks and positions of one shape, and a compiled step."""

    def start(self, reports: int, length: int) -> None:
        self.unseen = 0  # tokens since the last look
        self.t = torch.zeros((), dtype=torch.long, device=self.prompt_mask.device)
        super().start(reports, length)
        for x in chain(*self.own):
            x.zero_()  # 0 x garbage may be NaN

    def arrange(self, study: Tensor) -> None:
        """As in the plain path; and these tensors stay where they are: a CUDA graph reads and writes them in place."""
        super().arrange(study)
        for x in chain(*self.prefix, *self.own, [self.t], [] if self.padding is None else [self.padding]):
            torch._dynamo.mark_static_address(x)

    def keep(self, writing: Tensor) -> Tensor:
        """As in the plain path, but the rows (n',) that stay are W' of each of B' studies, which are W and B halved now
        and then; of a study's rows those that are being written come first."""
        self.unseen = (self.unseen + 1) % LOOK
        if self.unseen:
            return torch.arange(len(writing), device=writing.device)
        grid = writing.view(-1, self.width)  # (B, W)
        counts = grid.sum(dim=1)  # (B,)
        if not int(counts.max()):
            return writing.nonzero()[:, 0]  # (0,)
        width, studies = halved(self.width, int(counts.max())), halved(len(grid), int(counts.count_nonzero()))
        if (studies, width) == grid.shape:
            return torch.arange(len(writing), device=writing.device)
        chosen = first(counts > 0, studies)  # (B',)
        rows = (chosen[:, None] * self.width + first(grid[chosen], width)).flatten()  # (B' * W',)
        self.take(rows)
        return rows

    def step(self, base, embeds: Tensor, positions: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            hidden = compiled_layers()(base, embeds, positions, self)  # (N, 1, D)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ValueError(f"rollout.compile: {' '.join(str(error).split())[:300]}; leave it off") from error
        self.t += 1
        return hidden

    def extend(self, layer: int, key: Tensor, value: Tensor):
        own_keys, own_values = self.own[layer]  # (N, Hkv, T, d) each
        own_keys.index_copy_(2, self.t[None], key)
        own_values.index_copy_(2, self.t[None], value)
        return own_keys, own_values, torch.arange(own_keys.shape[2], device=key.device) > self.t  # (T,)


def first(wanted: Tensor, n: int) -> Tensor:
    """Indices (..., n), ascending, of n entries of (..., N), those that are wanted before the others."""
    return wanted.byte().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(dim=-1).values


def halved(n: int, least: int) -> int:
    """n halved (rounded up) as often as it stays at or above `least` and 1."""
    while (n + 1) // 2 >= max(least, 1) and n > 1:
        n = (n + 1) // 2
    return n


@functools.cache
def compiled_layers():
    """`attention.run_layers`, compiled for each shape that it meets; here, as that imports four seconds of torch."""
    torch._dynamo.config.recompile_limit = SHAPES
    return torch.compile(run_layers, mode="reduce-overhead", fullgraph=True, dynamic=False)
