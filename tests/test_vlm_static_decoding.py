"""The decoding step of one shape gives the plain step's tokens and log-probs, and torch.compile takes all of it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from test_vlm_attention import T, family, load  # noqa: F401

from model import load_policy
from rollout import sample
from vlm import static_decoding
from vlm.attention import run_layers
from vlm.static_decoding import first, halved


def both(family, monkeypatch, layers, length=40, group=5, look=1, last=60):  # noqa: F811
    """The Rollouts of the plain and of the static path, whose reports end at different tokens, those from 20 to `last`;
    sizes of its batches."""
    monkeypatch.setattr(static_decoding, "LOOK", look)
    cfg, images = family
    model, inputs, *_, rules = load(cfg, images, "language")
    rules = replace(rules, eos_ids=list(range(20, last)))  # some reports end early
    u, sizes = torch.rand(2 * group, length, generator=torch.Generator().manual_seed(5)), []

    def counted(base, embeds, positions, plan):
        sizes.append(len(embeds))
        return layers(base, embeds, positions, plan)

    monkeypatch.setattr(static_decoding, "compiled_layers", lambda: counted)
    given = model, inputs, rules, u, length, group
    return sample(*given), sample(*given, compiled=True), sizes


def assert_same(plain, static):
    assert torch.equal(plain.completions, static.completions)
    assert torch.equal(plain.completion_mask, static.completion_mask) and torch.equal(plain.finished, static.finished)
    torch.testing.assert_close(static.logps, plain.logps, atol=1e-5, rtol=0)


def test_one_shape_changes_nothing(family, monkeypatch):  # noqa: F811
    plain, static, sizes = both(family, monkeypatch, run_layers)
    lengths = plain.completion_mask.sum(dim=1)
    assert lengths.min() < 5 and lengths.max() > 10  # ragged
    assert_same(plain, static)
    assert sizes[0] == 10 and len(set(sizes)) <= 5 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 5


def test_between_two_looks_nothing_is_asked(family, monkeypatch):  # noqa: F811
    plain, static, sizes = both(family, monkeypatch, run_layers, look=8)
    assert_same(plain, static)
    changes = [i for i, (a, b) in enumerate(pairwise(sizes), 1) if a != b]
    assert changes and all((i + 1) % 8 == 0 for i in changes)  # before step i, tokens 0 to i were looked at


def test_when_all_have_ended_the_next_look_ends_it(family, monkeypatch):  # noqa: F811
    plain, static, sizes = both(family, monkeypatch, run_layers, look=8, last=240)  # most tokens end a report
    assert_same(plain, static)
    longest = int(plain.completion_mask.sum(dim=1).max())
    assert plain.finished.all() and longest < 30
    assert len(sizes) + 1 == -(-longest // 8) * 8


def test_greedy_and_several_studies_of_one_report(family, monkeypatch):  # noqa: F811
    assert_same(*both(family, monkeypatch, run_layers, length=T, group=1)[:2])


def test_no_tensor_value_is_looked_at_inside_a_step(family, monkeypatch):  # noqa: F811
    """torch.compile takes the step as one graph, for each size of the batch anew, at whatever token."""
    graphs = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(run_layers, backend=count, fullgraph=True, dynamic=False)
    plain, static, sizes = both(family, monkeypatch, compiled)
    assert_same(plain, static)
    assert len(graphs) == len(set(sizes)) < len(sizes)


@pytest.mark.slow
def test_the_real_compiler_gives_the_same(family, monkeypatch):  # noqa: F811
    torch._dynamo.reset()
    plain, static, _ = both(family, monkeypatch, static_decoding.compiled_layers(), group=2)
    assert_same(plain, static)


def test_sizes_are_halved_by_hand():
    assert [halved(8, least) for least in (8, 5, 4, 3, 1, 0)] == [8, 8, 4, 4, 1, 1]
    assert [halved(6, least) for least in (4, 3, 2, 1)] == [6, 3, 2, 1]
    assert first(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]]) > 0, 2).tolist() == [[1, 3], [0, 3]]


def test_a_base_that_is_spread_is_refused(cfg):
    cfg = replace(cfg, fsdp=True, rollout=replace(cfg.rollout, compile=True))
    with pytest.raises(ValueError, match="rollout.compile: not with fsdp"):
        load_policy(cfg, new_lora=True)
