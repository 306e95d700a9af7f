"""Shared-prefix attention gives the numbers of G plain forwards: log-probs, loss and gradients, in float32."""

from dataclasses import replace

import pytest
import torch
from conftest import randomise
from test_model import grads_of
from tiny_families import write_qwen

import model as policy_code
from grpo import grpo_loss
from model import (
    completion_logps,
    encode_prompts,
    get_base,
    load_policy,
    policy_logits,
    sampling_rules,
    set_trainable,
)
from rollout import sample
from vlm import attention
from vlm.attention import Decoding, Recording, causal_mask, pack
from vlm.families import encode_images, select_studies

G, T = 3, 9
LENGTHS = [9, 1, 4, 2, 9, 6]  # of the G reports of two studies: ragged, one of them EOS alone


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def family(request, cfg, images, tmp_path):
    """(config, images of two studies) of each family; under Qwen their prompts differ in length, so one is padded."""
    if request.param == "llava":
        return cfg, images[:2]
    write_qwen(tmp_path)
    sizes = ((60, 60), (250, 190))  # the second takes several attention windows
    pictures = [image.resize(size) for image, size in zip(images, sizes, strict=False)]
    return replace(cfg, model=replace(cfg.model, path=str(tmp_path))), pictures


def load(cfg, images, parts: str, checkpointing: bool = False):
    """(model in training shape, inputs, completions, mask, rules)."""
    cfg = replace(cfg, model=replace(cfg.model, gradient_checkpointing=checkpointing))
    model, processor = load_policy(cfg, new_lora=True)
    randomise(model)
    set_trainable(model, parts)
    model.train(checkpointing)
    inputs = encode_prompts(processor, images, "Write the report.", "cpu")
    rules = replace(sampling_rules(model, processor, cfg), min_new_tokens=1, temperature=0.8)
    generator = torch.Generator().manual_seed(0)
    completions = torch.randint(10, 60, (2 * G, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    return model, inputs, completions, mask, rules


def plain(model, inputs, completions, mask, rules):
    """Log-probs (N, T): one plain forward per report, without cache, padding or our attention."""
    base, rows = get_base(model), []
    base.model.language_model.set_attn_implementation("sdpa")
    base.model.language_model.gradient_checkpointing = False
    for i in range(len(completions)):
        some, n = select_studies(inputs, i // G, i // G + 1), int(mask[i].sum())
        real = some["attention_mask"][0].bool()
        ids = torch.cat([some["input_ids"][:, real], completions[i : i + 1, :n]], dim=1)
        extra = {name: some[name] for name in ("pixel_values", "image_grid_thw") if name in some}
        if "mm_token_type_ids" in some:
            types = some["mm_token_type_ids"][:, real]
            extra["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, n)], dim=1)
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, -n - 1 : -1]
        logps = policy_logits(logits, torch.arange(n), rules).log_softmax(-1).gather(1, completions[i, :n, None])[:, 0]
        rows.append(torch.cat([logps, logps.new_zeros(T - n)]))
    base.model.language_model.set_attn_implementation(attention.NAME)
    return torch.stack(rows)


def loss_of(logps, mask):
    advantages = torch.tensor([1.0, -0.5, 0.3, 0.9, -1.0, 0.2])
    return grpo_loss(
        logps, logps.detach(), logps.detach() - 0.2, advantages, mask, eps_low=0.2, eps_high=0.2, beta=0.04
    )[0]


@pytest.mark.parametrize("strip", [2, 5])
def test_strips_change_nothing(family, strip, monkeypatch):
    model, *given = load(*family, "language")
    whole = completion_logps(model, *given)
    whole.sum().backward()
    expected = grads_of(model)
    model.zero_grad()
    monkeypatch.setattr(attention, "STRIP", strip)
    narrow = completion_logps(model, *given)
    narrow.sum().backward()
    torch.testing.assert_close(narrow, whole, atol=1e-5, rtol=0)
    assert_same_gradients(grads_of(model), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", ["language", "projector", "language+projector"])
def test_loss_pass_equals_plain_forwards(family, parts, checkpointing):
    model, *given = load(*family, parts, checkpointing)
    mask = given[2]
    ours = completion_logps(model, *given)
    loss = loss_of(ours, mask)
    loss.backward()
    gradients = grads_of(model)
    model.zero_grad()
    theirs = plain(model, *given)
    torch.testing.assert_close(ours.detach(), theirs.detach(), atol=1e-5, rtol=0)
    expected = loss_of(theirs, mask)
    assert abs(float(loss.detach()) - float(expected.detach())) < 1e-6
    expected.backward()
    plain_gradients = grads_of(model)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 3
    assert_same_gradients(gradients, plain_gradients)


def assert_same_gradients(got, expected):
    """Each tensor within 1e-5 of the other's norm."""
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_checkpointing_really_recomputes(family, monkeypatch):
    calls = []
    real = attention.Packing.attend
    monkeypatch.setattr(attention.Packing, "attend", lambda self, *a: calls.append(1) or real(self, *a))
    for checkpointing, times in ((False, 1), (True, 2)):
        calls.clear()
        model, *given = load(*family, "language", checkpointing)
        completion_logps(model, *given).sum().backward()
        assert len(calls) == times * len(get_base(model).model.language_model.layers)


def test_sampler_equals_plain_forwards(family):
    cfg, images = family
    model, inputs, *_, rules = load(cfg, images, "language")
    rules = replace(rules, eos_ids=list(range(20, 60)))  # some reports end early
    u = torch.rand(2 * G, T, generator=torch.Generator().manual_seed(3))
    out = sample(model, inputs, rules, u, T, G)
    lengths = out.completion_mask.sum(1)
    assert lengths.min() < lengths.max()
    padded = torch.nn.functional.pad(out.completions, (0, T - out.completions.shape[1]))
    mask = torch.nn.functional.pad(out.completion_mask, (0, T - out.completions.shape[1]))
    expected = plain(model, inputs, padded, mask, rules)[:, : out.logps.shape[1]]
    torch.testing.assert_close(out.logps, expected.detach(), atol=1e-5, rtol=0)


def test_rows_that_leave_the_batch_change_nothing(family, monkeypatch):
    cfg, images = family
    model, inputs, *_, rules = load(cfg, images, "language")
    rules = replace(rules, eos_ids=list(range(20, 60)))
    u = torch.rand(2 * 5, 40, generator=torch.Generator().manual_seed(5))
    kept, real = [], Decoding.take
    monkeypatch.setattr(Decoding, "take", lambda self, rows: (kept.append(len(rows)), real(self, rows)))
    monkeypatch.setattr(attention, "SHRINK", 1.0)
    leaving = sample(model, inputs, rules, u, 40, 5)
    assert len(kept) >= 2 and kept == sorted(kept, reverse=True)
    monkeypatch.setattr(attention, "SHRINK", 0.0)
    staying = sample(model, inputs, rules, u, 40, 5)
    assert torch.equal(leaving.completions, staying.completions) and torch.equal(leaving.finished, staying.finished)
    torch.testing.assert_close(leaving.logps, staying.logps, atol=1e-5, rtol=0)


def test_sampling_ends_with_the_last_report(family, monkeypatch):
    cfg, images = family
    model, inputs, *_, rules = load(cfg, images, "language")
    rules, steps, real = replace(rules, eos_ids=list(range(20, 240))), [], Decoding.step  # most tokens end a report
    monkeypatch.setattr(Decoding, "step", lambda self, *given: (steps.append(len(given[1])), real(self, *given))[1])
    out = sample(model, inputs, rules, torch.rand(10, 40, generator=torch.Generator().manual_seed(5)), 40, 5)
    assert out.finished.all() and len(steps) == out.completions.shape[1] - 1 < 39


def test_parts_of_the_vocabulary_product_change_nothing(family, monkeypatch):
    model, *given = load(*family, "language")
    whole = completion_logps(model, *given)
    whole.sum().backward()
    expected = grads_of(model)
    model.zero_grad()
    monkeypatch.setattr(policy_code, "LOGITS", 5 * get_base(model).lm_head.weight.shape[0])  # five tokens at a time
    parts = completion_logps(model, *given)
    parts.sum().backward()
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    assert_same_gradients(grads_of(model), expected)


def test_images_are_encoded_once_for_sampling_reference_and_loss(family):
    cfg, images = family
    model, inputs, completions, mask, rules = load(cfg, images, "language+projector")
    base, calls = get_base(model), []
    tower = base.model.visual if hasattr(base.model, "visual") else base.model.vision_tower
    tower.register_forward_hook(lambda *_: calls.append(1))
    known = encode_images(base, inputs)
    again = completion_logps(model, known, completions, mask, rules)
    sample(model, known, rules, None, 4, 2)
    one = completion_logps(model, select_studies(known, 1, 2), completions[G:], mask[G:], rules)
    assert len(calls) == 1
    torch.testing.assert_close(completion_logps(model, inputs, completions, mask, rules), again, atol=1e-6, rtol=0)
    torch.testing.assert_close(one, again[G:], atol=1e-5, rtol=0)
    again.sum().backward()
    assert any("lora_A" in name and gradient.abs().sum() > 0 for name, gradient in grads_of(model).items()
               if "projector" in name or "merger" in name)  # fmt: skip


def test_pack_by_hand():
    """One study, a prompt of 2 tokens after 1 of padding, reports of 3, 1 and 2 tokens."""
    packing = pack(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]))
    assert packing.order.tolist() == [[0, 1, 4]]  # o_1's tokens 0 and 1, o_3's token 0; the last ones are no input
    assert packing.positions.tolist() == [[0, 1, 0]]
    [(first, last, start, mask)] = packing.strips
    assert (first, last, start) == (0, 3, 0) and (mask[0, 0] == 0).int().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    assert packing.outputs[0].tolist() == [[2, 3, 4], [2, 0, 0], [2, 5, 0]]  # 0: nothing is predicted there
    assert (packing.prefix_mask[0, 0] == 0).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert causal_mask(torch.ones(2, 4), torch.float32) is None


def test_the_packing_that_the_module_explains():
    """The numbers in the head of vlm/attention.py: prefix x y, reports a b $ and c $."""
    packing = pack(torch.ones(1, 2), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert packing.order.tolist() == [[0, 1, 2]] and packing.positions.tolist() == [[0, 1, 0]]
    assert packing.outputs.tolist() == [[[1, 2, 3], [1, 4, 0]]]
    [(*_, mask)] = packing.strips
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]  # xya, xyab, xyc


def test_strips_by_hand(monkeypatch):
    """Strips of two slots: the second begins inside o_1, so it goes back to where o_1 begins."""
    monkeypatch.setattr(attention, "STRIP", 2)
    packing = pack(torch.ones(1, 1), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))  # inputs: 3 of o_1, 2 of o_2
    (*_, one), (first, last, start, two), (*last_strip, three) = packing.strips
    assert (one[0, 0] == 0).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert (first, last, start) == (2, 4, 0)
    assert (two[0, 0] == 0).int().tolist() == [[1, 1, 1, 1, 0], [1, 0, 0, 0, 1]]
    assert last_strip == [4, 5, 3] and (three[0, 0] == 0).int().tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("seed", range(8))
def test_every_report_token_sees_its_prompt_and_its_own_past(seed, monkeypatch):
    """Whatever the lengths: studies of one batch begin their reports at different slots, and some are padded."""
    monkeypatch.setattr(attention, "STRIP", 3)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (3 * 4,), generator=generator)
    lengths[4:8] //= 3  # a short study among long ones: most of its slots are padding
    lengths.clamp_(min=1)
    packing = pack(torch.ones(3, 2), (torch.arange(8) < lengths[:, None]).long())
    for study, own in enumerate(lengths.view(3, 4)):
        slots = [(report, step) for report, n in enumerate(own.tolist()) for step in range(n - 1)]
        for first, last, start, mask in packing.strips:
            for i in range(first, min(last, len(slots))):
                seen = {start + int(j) for j in (mask[study, 0, i - first, 2:] == 0).nonzero()}
                assert seen == {j for j, (report, _) in enumerate(slots[: i + 1]) if report == slots[i][0]}
                assert (mask[study, 0, i - first, :2] == 0).all()


def test_reports_of_one_token_need_no_input():
    packing = pack(torch.ones(2, 3), torch.ones(4, 1))
    assert packing.order.shape == (2, 0) and packing.outputs.tolist() == [[[2], [2]], [[2], [2]]]


def test_without_a_plan_the_models_are_transformers_own(family):
    cfg, images = family
    model, inputs, *_ = load(cfg, images, "language")
    base = get_base(model)
    inputs = {name: x for name, x in inputs.items() if name != "image_counts"}
    ours = base(**inputs).logits
    base.model.language_model.set_attn_implementation("sdpa")
    assert torch.equal(base(**inputs).logits, ours)


def test_a_model_that_would_not_ask_the_plan_is_refused(family):
    """Under transformers' own attention the 4-D mask of run_layers would let every token see every other."""
    model, *given = load(*family, "language")
    get_base(model).model.language_model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="does not attend as 'shared_prefix': call model.prepare"):
        completion_logps(model, *given)


def test_recorded_weights_are_the_softmax_of_q_and_k(family, monkeypatch):
    """Of every report token, in every layer, also where the prompt is padded; and the log-probs stay what they are."""
    monkeypatch.setattr(attention, "STRIP", 3)
    model, inputs, completions, mask, rules = load(*family, "language")
    expected, seen = completion_logps(model, inputs, completions, mask, rules), []

    class Watched(Recording):
        def attend(self, layer, query, key, value, scaling):
            seen.append((query.detach(), key.detach().repeat_interleave(query.shape[1] // key.shape[1], 1), scaling))
            return super().attend(layer, query, key, value, scaling)

    prompts = inputs["attention_mask"].bool()
    plan, length = pack(prompts, mask, torch.float32, Watched), prompts.shape[1]
    logps = completion_logps(model, inputs, completions, mask, rules, plan)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
    assert len(plan.weights) == len(seen) == len(get_base(model).model.language_model.layers)
    for recorded, (query, key, scaling) in zip(plan.weights, seen, strict=True):
        assert recorded.shape == (2, 1 + plan.order.shape[1], length)
        for report, n in enumerate(mask.sum(1).tolist()):
            study, rows = report // G, plan.outputs[report // G, report % G].tolist()
            for t in range(n):
                places = [*prompts[study].nonzero()[:, 0].tolist(), *rows[1 : t + 1]]  # the prompt and its own past
                weights = (key[study][:, places] @ query[study, :, rows[t], :, None] * scaling).softmax(1)  # (H, k, 1)
                naive = torch.zeros(length).masked_scatter(prompts[study], weights.mean(dim=0)[:, 0].detach())
                torch.testing.assert_close(recorded[study, rows[t] - (length - 1)], naive, atol=1e-6, rtol=0)
