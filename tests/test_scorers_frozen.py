"""What the frozen models share: batches, their memory, and large layers in oneDNN's layout."""

import torch

from scorers import frozen


def test_batches_stay_within_a_cpus_cache():
    lengths = [100, 300, 50, 200, 900]
    batches = list(frozen.of_like_length(lengths, lambda n: n, "cpu"))  # 512 // the longest of the rest
    assert batches == [[900], [300], [100, 200], [50]]
    assert list(frozen.of_like_length(lengths, lambda n: n, "cuda")) == [sorted(lengths)]
    assert list(frozen.of_like_length([0, 0], lambda n: n, "cpu")) == [[0, 0]] and lengths[0] == 100


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(frozen, "CACHED", 3)
    cache, seen = {}, []
    for text in ("a", "b", "a", "c", "d", "a", "b"):
        frozen.cached(cache, [text], lambda new: [seen.append(t) or t.upper() for t in new])
    assert list(cache) == ["a", "b"] and seen == ["a", "b", "c", "d", "a", "b"]  # full with "d", so emptied
    assert frozen.cached(cache, ["x", "y", "z", "w", "x"], lambda new: [t.upper() for t in new]) == list("XYZWX")


def test_what_every_tokenizer_takes():
    texts = ["No effusion.", " T5 \n", "\ud800 edema", "\x00a", "", " \n", "...", "\U0001f600", "\ud83d", "\x00", "___"]
    assert [frozen.plain(text) for text in texts] == ["No effusion.", " T5 \n", "? edema", "\x00a", *[""] * 7]


@torch.no_grad()
def test_a_frozen_models_large_layers_are_packed_and_compute_the_same():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512, bias=False),
                                torch.nn.Linear(512, 14)).requires_grad_(False)  # fmt: skip
    inputs = [torch.randn(*shape, 512) for shape in ((3,), (2, 5), (0,))]
    plain = [model(x) for x in inputs]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert frozen.pack_linears(model) is model
    assert ["forward" in vars(layer) for layer in model] == [True, False, True, False]
    for x, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_onednn_cannot_pack_stays_as_it_is():
    half, attention = torch.nn.Linear(512, 512).bfloat16(), torch.nn.MultiheadAttention(512, 2)
    meta = torch.nn.Linear(512, 512, device="meta")  # as a GPU's
    for model in (half, attention, meta):
        assert not any("forward" in vars(layer) for layer in frozen.pack_linears(model).modules())
