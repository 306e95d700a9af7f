"""The policy and the sampler: every path to a log-prob gives the same log-prob."""

from dataclasses import replace

import pytest
import torch
from conftest import randomise
from transformers import AutoConfig, AutoProcessor, BioGptConfig, LlavaConfig, LlavaForConditionalGeneration

from model import (
    SamplingRules,
    add_reference,
    completion_logps,
    encode_prompts,
    get_base,
    load_policy,
    policy_logits,
    sampling_rules,
    set_trainable,
    tokenize_reports,
    use_reference,
)
from rollout import draw, generate_reports, rollout, sample, truncate, uniforms


def plain_logps(model, inputs, tokens, mask, rules):
    """One full forward per row, no cache: log-probs (N, T) of `tokens` after the prompt."""
    base, rows = get_base(model), []
    for i in range(len(tokens)):
        n = int(mask[i].sum())
        ids = torch.cat([inputs["input_ids"][i : i + 1], tokens[i : i + 1, :n]], dim=1)
        logits = base(input_ids=ids, pixel_values=inputs["pixel_values"][i : i + 1]).logits[0, -n - 1 : -1]
        logps = policy_logits(logits, torch.arange(n), rules).log_softmax(-1)
        row = torch.zeros(tokens.shape[1])
        row[:n] = logps.gather(1, tokens[i, :n, None])[:, 0]
        rows.append(row)
    return torch.stack(rows)


def repeat_inputs(inputs, times):
    return {name: x.repeat_interleave(times, dim=0) for name, x in inputs.items()}


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logps_equal_training_logps_equal_plain_logps(policy, images, cfg, temperature):
    model, processor = policy
    cfg = replace(cfg, rollout=replace(cfg.rollout, temperature=temperature, top_p=0.9, top_k=20))
    rules = sampling_rules(model, processor, cfg)
    out, texts, inputs = rollout(model, processor, images, ["a", "b", "c"], cfg, step=1)
    trained = completion_logps(model, inputs, out.completions, out.completion_mask, rules)
    torch.testing.assert_close(out.logps, trained, atol=1e-5, rtol=0)
    plain = plain_logps(model, repeat_inputs(inputs, 4), out.completions, out.completion_mask, rules)
    torch.testing.assert_close(trained, plain, atol=1e-5, rtol=0)
    assert [len(group) for group in texts] == [4, 4, 4]


def test_shared_prefix_gives_the_gradients_of_full_forwards(policy, images, cfg):
    model, processor = policy
    set_trainable(model, "language+projector")
    rules = sampling_rules(model, processor, cfg)
    out, _, inputs = rollout(model, processor, images[:2], ["a", "b"], cfg, step=1)
    weights = torch.randn(out.logps.shape, generator=torch.Generator().manual_seed(0))
    (
        completion_logps(model, inputs, out.completions, out.completion_mask, rules)
        * weights
    ).sum().backward()
    shared = grads_of(model)
    model.zero_grad()
    (
        plain_logps(model, repeat_inputs(inputs, 4), out.completions, out.completion_mask, rules) * weights
    ).sum().backward()
    plain = grads_of(model)
    assert shared.keys() == plain.keys() and any("projector" in name for name in plain)
    for name in plain:
        torch.testing.assert_close(shared[name], plain[name], atol=1e-4, rtol=1e-4)


@pytest.fixture
def absolute(base_dir, tmp_path, cfg):
    """The tiny LLaVA over BioGPT, whose positions are absolute: rotary ones hide a shift by padding."""
    old = AutoConfig.from_pretrained(base_dir)
    text = BioGptConfig(
        vocab_size=old.text_config.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=old.vision_config, text_config=text, image_token_id=old.image_token_id,
                    vision_feature_layer=-1, image_seq_length=4)
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(base_dir).save_pretrained(tmp_path)
    return load_policy(replace(cfg, model=replace(cfg.model, path=str(tmp_path))))


@pytest.mark.parametrize("kind", ["policy", "absolute"])
def test_padding_left_and_right_changes_nothing(kind, images, cfg, request):
    model, processor = request.getfixturevalue(kind)
    rules = sampling_rules(model, processor, cfg)
    inputs = encode_prompts(processor, images[:1], "Write", "cpu")
    tokens, mask, _ = tokenize_reports(processor, ["The lungs are clear."], 50, "cpu")
    alone = completion_logps(model, inputs, tokens, mask, rules)
    pad = torch.nn.functional.pad
    left = {
        "input_ids": pad(inputs["input_ids"], (3, 0), value=0),
        "attention_mask": pad(inputs["attention_mask"], (3, 0)),
        "pixel_values": inputs["pixel_values"],
    }
    wide, wide_mask = pad(tokens, (0, 5), value=2), pad(mask, (0, 5))
    padded = completion_logps(model, left, wide, wide_mask, rules)
    torch.testing.assert_close(padded[:, :-5], alone, atol=1e-5, rtol=0)
    assert (padded[:, -5:] == 0).all()
    sampled = sample(model, left, rules, torch.full((1, 12), 0.5), 12)
    again = sample(model, inputs, rules, torch.full((1, 12), 0.5), 12)
    assert torch.equal(sampled.completions, again.completions)
    torch.testing.assert_close(sampled.logps, again.logps, atol=1e-5, rtol=0)


def test_log_probs_follow_their_rows(policy, images, cfg):
    model, processor = policy
    rules = sampling_rules(model, processor, cfg)
    tokens, mask, _ = tokenize_reports(
        processor, ["The lungs are clear.", "Cardiomegaly.", "Small left effusion."], 50, "cpu"
    )

    def logps(order):
        inputs = encode_prompts(processor, [images[i] for i in order], "Write", "cpu")
        return completion_logps(model, inputs, tokens[order], mask[order], rules)

    together = logps([0, 1, 2])
    torch.testing.assert_close(logps([2, 0, 1]), together[[2, 0, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(logps([1]), together[[1]], atol=1e-5, rtol=0)
    inputs = encode_prompts(processor, [images[1]] * 3, "Write", "cpu")
    other = completion_logps(model, inputs, tokens, mask, rules)
    assert not torch.allclose(other[0], together[0])  # the image matters at all


def test_mask_counts_eos_by_position(policy, cfg):
    _, processor = policy
    tokens, mask, cut = tokenize_reports(processor, ["The", "The lungs are clear."], 4, "cpu")
    eos = processor.tokenizer.eos_token_id
    first = int(mask[0].sum())
    assert (
        tokens[0, first - 1] == eos and (tokens[0, first:] == eos).all()
    )  # padding looks like EOS: only position tells
    assert mask[1].tolist() == [1, 1, 1, 1] and cut == 1


def test_sampled_reports_stop_at_the_first_eos(policy, images, cfg):
    model, processor = policy
    ends = list(range(20, 60))  # with one of 400 tokens as EOS, random weights would hardly ever stop
    get_base(model).generation_config.eos_token_id = ends
    ends = {*ends, processor.tokenizer.eos_token_id}
    out, texts, inputs = rollout(model, processor, images, ["a", "b", "c"], cfg, step=3)
    assert out.finished.any() and not out.finished.all()
    for ids, mask, finished in zip(out.completions, out.completion_mask, out.finished, strict=True):
        n = int(mask.sum())
        assert mask.tolist() == [1] * n + [0] * (len(mask) - n)
        assert not ends & set(ids[: n - 1].tolist())
        assert bool(finished) == (ids[n - 1].item() in ends)  # the EOS itself is inside the mask
        assert finished or n == cfg.rollout.max_new_tokens
        assert n > 2  # min_new_tokens = 2: EOS is impossible at positions 0 and 1
    rules = sampling_rules(model, processor, cfg)
    trained = completion_logps(model, inputs, out.completions, out.completion_mask, rules)
    torch.testing.assert_close(out.logps, trained, atol=1e-5, rtol=0)  # rows that left the batch early included


def test_policy_logits_by_hand():
    rules = SamplingRules(temperature=0.5, min_new_tokens=1, eos_ids=[1], banned_ids=[3])
    got = policy_logits(torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2), torch.tensor([0, 1]), rules)
    low = float("-inf")
    assert got.tolist() == [[2.0, low, 6.0, low], [2.0, 4.0, 6.0, low]]


def test_image_and_padding_tokens_are_impossible(policy, cfg):
    model, processor = policy
    rules = sampling_rules(model, processor, cfg)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    logits = torch.zeros(2, len(processor.tokenizer))
    logits[:, image_id] = 100.0
    probs = policy_logits(logits, torch.tensor([0, 5]), rules).softmax(-1)
    assert probs[:, [image_id, processor.tokenizer.pad_token_id]].sum() == 0
    assert probs[0, rules.eos_ids[0]] == 0 and probs[1, rules.eos_ids[0]] > 0


def test_candidates_depend_on_study_and_seed_only(policy, images, cfg):
    model, processor = policy
    both = rollout(model, processor, images[:2], ["a", "b"], cfg, step=1)[1]
    swapped = rollout(model, processor, [images[1], images[0]], ["b", "a"], cfg, step=1)[1]
    assert both == [swapped[1], swapped[0]]
    assert rollout(model, processor, images[1:2], ["b"], cfg, step=1)[1][0] == both[1]
    assert rollout(model, processor, images[:2], ["a", "b"], cfg, step=2)[1] != both
    assert rollout(model, processor, images[:2], ["a", "b"], replace(cfg, seed=1), step=1)[1] != both


def test_greedy_decoding_takes_the_most_likely_token(policy, images, cfg):
    model, processor = policy
    text = generate_reports(model, processor, images[:1], cfg, ids=["a"])
    assert text == generate_reports(model, processor, images[:1], replace(cfg, seed=9), ids=["a"])
    base, inputs = get_base(model), encode_prompts(processor, images[:1], cfg.data.prompt, "cpu")
    rules, ids = sampling_rules(model, processor, cfg), inputs["input_ids"]
    for t in range(cfg.rollout.max_new_tokens):
        logits = base(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, policy_logits(logits, torch.tensor([t]), rules).argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1].item() in rules.eos_ids:
            break
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert text == [[processor.tokenizer.decode(new, skip_special_tokens=True)]]


def test_draw_is_inverse_cdf_and_never_takes_weight_zero():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(5, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-24])
    assert draw(probs, u).tolist() == [1, 1, 3, 3, 3]
    counts = torch.bincount(
        draw(probs[:1].repeat(20000, 1), torch.rand(20000, generator=torch.Generator().manual_seed(0))), minlength=5
    )
    assert counts[[0, 2, 4]].sum() == 0 and abs(counts[3] / 20000 - 0.75) < 0.015


def test_truncate_by_hand():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert truncate(probs, 2, 1.0).tolist() == [[pytest.approx(0.4), pytest.approx(0.3), 0, 0]]
    assert (truncate(probs, 0, 0.65) > 0).tolist() == [[True, True, False, False]]  # .4 + .3 reaches .65
    assert (truncate(probs, 0, 0.3) > 0).tolist() == [[True, False, False, False]]
    assert truncate(probs, 0, 1.0) is probs


def test_uniforms_are_a_function_of_seed_step_and_study():
    u = uniforms(["a", "b"], seed=0, step=1, group_size=2, length=3)
    assert u.shape == (4, 3) and torch.equal(u[2:], uniforms(["b"], 0, 1, 2, 3))
    assert not torch.equal(u[:2], uniforms(["a"], 0, 2, 2, 3))


def test_reference_is_the_adapter_given_and_stays_frozen(cfg, images, tmp_path):
    model, processor = load_policy(cfg, new_lora=True)
    randomise(model)
    model.save_pretrained(tmp_path / "sft")
    model, processor = load_policy(cfg, tmp_path / "sft")
    add_reference(model, tmp_path / "sft")
    names = set_trainable(model, "language")
    rules = sampling_rules(model, processor, cfg)
    tokens, mask, _ = tokenize_reports(processor, ["The lungs are clear."], 50, "cpu")
    inputs = encode_prompts(processor, images[:1], "Write", "cpu")

    def logps():
        return completion_logps(model, inputs, tokens, mask, rules)

    def ref_logps():
        with torch.no_grad(), use_reference(model):
            return logps()

    reference = ref_logps()
    assert torch.equal(logps().detach(), reference)  # the KL starts at exactly 0
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(names)  # the switch gave requires_grad back
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (-logps().sum()).backward()
    optimizer.step()
    assert not torch.allclose(logps(), reference) and torch.equal(ref_logps(), reference)
    base = get_base(model)
    with model.disable_adapter():
        assert not torch.allclose(completion_logps(base, inputs, tokens, mask, rules), reference)


@pytest.mark.parametrize("part", ["language", "projector"])
def test_set_trainable_picks_exactly_that_part(policy, part):
    model, _ = policy
    names = set_trainable(model, part)
    key = {"language": "language_model", "projector": "multi_modal_projector"}[part]
    assert names and all(key in name and "lora_" in name for name in names)
    everything = set_trainable(model, "language+projector")
    assert len(everything) > len(names)
    assert not any("vision_tower" in name for name in everything)
    assert len(everything) == 2 * (2 * 7 + 2)  # 2 layers x 7 linears + 2 projector linears, A and B each


def test_dropout_is_off_in_rl_even_in_train_mode(cfg, images, tmp_path):
    cfg = replace(cfg, model=replace(cfg.model, lora_dropout=0.5))
    model, processor = load_policy(cfg, new_lora=True)
    randomise(model)
    model.save_pretrained(tmp_path)
    model.train()
    rules = sampling_rules(model, processor, cfg)
    tokens, mask, _ = tokenize_reports(processor, ["The lungs are clear."], 50, "cpu")
    inputs = encode_prompts(processor, images[:1], "Write", "cpu")

    def logps():
        return completion_logps(model, inputs, tokens, mask, rules)

    assert not torch.equal(logps(), logps())
    add_reference(model, tmp_path)
    model.train()
    assert torch.equal(logps(), logps())


def test_log_probs_are_float32_even_for_a_bf16_base(cfg, images):
    model, processor = load_policy(replace(cfg, model=replace(cfg.model, dtype="bfloat16")), new_lora=True)
    rules = sampling_rules(model, processor, cfg)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    inputs = encode_prompts(processor, images[:1], "Write", "cpu")
    tokens, mask, _ = tokenize_reports(processor, ["The lungs are clear."], 50, "cpu")
    assert completion_logps(model, inputs, tokens, mask, rules).dtype == torch.float32
    assert policy_logits(torch.zeros(1, 400, dtype=torch.bfloat16), torch.zeros(1), rules).dtype == torch.float32


def test_a_folder_that_is_no_adapter_is_named(cfg, tmp_path):
    with pytest.raises(ValueError, match="no adapter_config.json"):
        load_policy(cfg, tmp_path)
