"""What the frozen models share: batches and their memory."""

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
