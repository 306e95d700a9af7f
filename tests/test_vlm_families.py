"""Every model family: loaded whole, trained where a stage says, and sampler, shared prefix and plain forwards agree."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise
from PIL import Image
from tiny_families import studies, write_llava_med, write_qwen

import train
from formats.images import read_image
from grpo import grpo_loss
from model import (
    add_reference,
    completion_logps,
    encode_prompts,
    get_base,
    load_policy,
    policy_logits,
    report_start,
    sampling_rules,
    set_trainable,
)
from rollout import generate_reports, rollout
from running import parallel
from vlm.families import PARTS, load_family, prompt_positions, select_studies

FAMILIES = list(PARTS)
SHARED = Path(os.environ.get("VALOR_SHARED", Path(__file__).parents[2] / "shared" / "data"))
X_RAYS = sorted((SHARED / "cxr_cc0").glob("*.jpg")) + sorted((SHARED / "cxr_nih").glob("*.png"))
PROJECTOR = {"llava": ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"],
             "qwen2_5_vl": ["visual.merger.mlp.0", "visual.merger.mlp.2"]}  # fmt: skip


@pytest.fixture(scope="session")
def folders(base_dir, tmp_path_factory):
    """{family: folder of a tiny random checkpoint in its real layout}."""
    folders = {"llava": base_dir} | {name: tmp_path_factory.mktemp(name) for name in FAMILIES[1:]}
    write_llava_med(folders["llava_mistral"])
    write_qwen(folders["qwen2_5_vl"])
    return folders


@pytest.fixture
def family_cfg(request, folders, cfg):
    return replace(cfg, model=replace(cfg.model, path=str(folders[request.param])))


@pytest.fixture
def family(family_cfg):
    """(config, model with a LoRA adapter that is not zero and many ways to end a report, processor)."""
    model, processor = load_policy(family_cfg, new_lora=True)
    randomise(model)
    base = get_base(model)
    base.generation_config.eos_token_id = [*range(20, 60)]  # else random weights hardly ever stop: all lengths alike
    return family_cfg, model, processor


@pytest.fixture
def views():
    return studies()


def plain_logps(model, inputs, tokens, mask, rules, group_size):
    """One full forward per candidate, no cache, no padding, positions of the model's own making: (N, T)."""
    rows = []
    for i in range(len(tokens)):
        n, study = int(mask[i].sum()), select_studies(inputs, i // group_size, i // group_size + 1)
        real = study.pop("attention_mask")[0].bool()
        study = {k: v for k, v in study.items() if k != "image_counts"}
        study["input_ids"] = torch.cat([study["input_ids"][:, real], tokens[i : i + 1, :n]], dim=1)
        if "mm_token_type_ids" in study:
            types = study["mm_token_type_ids"][:, real]
            study["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, n))
        logits = get_base(model)(**study).logits[0, -n - 1 : -1]
        logps = policy_logits(logits, torch.arange(n), rules).log_softmax(-1).gather(1, tokens[i, :n, None])[:, 0]
        rows.append(torch.nn.functional.pad(logps, (0, tokens.shape[1] - n)))
    return torch.stack(rows)


@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_sampler_shared_prefix_and_plain_forwards_agree(family, views):
    cfg, model, processor = family
    set_trainable(model, "language+projector")
    rules = sampling_rules(model, processor, cfg)
    out, _, inputs = rollout(model, processor, views, list("abcd"), cfg, step=1)
    lengths, prompts = out.completion_mask.sum(1), inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 2 and len(set(prompts.tolist())) > 2  # ragged on both sides
    noise = torch.randn(out.logps.shape, generator=torch.Generator().manual_seed(0))
    advantages, found = noise[:, 0], []

    def shared():
        return completion_logps(model, inputs, out.completions, out.completion_mask, rules)

    for logps in (shared(), plain_logps(model, inputs, out.completions, out.completion_mask, rules, 4)):
        loss, _ = grpo_loss(
            logps, out.logps + 0.1 * noise, out.logps - 0.1 * noise, advantages, out.completion_mask,
            eps_low=0.2, eps_high=0.2, beta=0.04,
        )  # fmt: skip
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, logps, grads), (plain_loss, plain, plain_grads) = found
    torch.testing.assert_close(out.logps, logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(logps, plain, atol=1e-5, rtol=0)
    assert abs(loss - plain_loss) < 1e-6
    for name, grad in plain_grads.items():
        assert grad.norm() > 0 and (grads[name] - grad).norm() < 1e-5 * grad.norm(), name


def take_gradient(optimizer) -> torch.Tensor:
    """The gradient that a step would use; there is none afterwards."""
    parameters = optimizer.param_groups[0]["params"]
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    optimizer.zero_grad()
    return gradient


@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_micro_batches_add_up_to_the_gradient_of_the_batch(family, views, tmp_path, monkeypatch):
    cfg, model, processor = family
    model.save_pretrained(tmp_path / "sft")
    add_reference(model, tmp_path / "sft")
    set_trainable(model, "language+projector")
    parameters = [p for p in model.parameters() if p.requires_grad]
    out, _, inputs = rollout(model, processor, views, list("abcd"), cfg, step=1)
    advantages, grads = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), []
    taken = []
    monkeypatch.setattr(parallel, "optimizer_step", lambda optimizer, max_norm: taken.append(take_gradient(optimizer)))
    for size in (4, 3, 1):
        cfg = replace(cfg, grpo=replace(cfg.grpo, micro_batch=size, batch_size=4))
        parts = train.split_batch(inputs, out, advantages, list("abcd"), cfg)
        train.policy_step(model, torch.optim.SGD(parameters), parts, sampling_rules(model, processor, cfg), cfg)
        grads.append(taken.pop())
    assert (grads[1] - grads[0]).norm() < 1e-5 * grads[0].norm()
    assert (grads[2] - grads[0]).norm() < 1e-5 * grads[0].norm()


@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_a_stage_trains_exactly_its_part(family):
    _, model, _ = family
    projector = PROJECTOR[get_base(model).config.model_type]
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    language = [f"language_model.layers.{i}.{x}" for i in (0, 1) for x in linears]
    for trainable, modules in (("language", language), ("projector", projector)):
        want = {f"base_model.model.model.{m}.lora_{x}.default.weight" for m in modules for x in "AB"}
        assert set(set_trainable(model, trainable)) == want
        assert {name for name, p in model.named_parameters() if p.requires_grad} == want
    assert {name.split(".lora_")[0].removeprefix("base_model.model.model.") for name in model.state_dict()
            if ".lora_" in name} == {*language, *projector}  # fmt: skip


@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_no_placeholder_can_be_sampled(family):
    cfg, model, processor = family
    tokenizer = processor.tokenizer
    qwen = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    names = {"llava": ["<image>", "<pad>"], "llava_mistral": ["<unk>"], "qwen2_5_vl": [*qwen, "<|endoftext|>"]}
    size = get_base(model).config.get_text_config().vocab_size
    family = json.loads((Path(cfg.model.path) / "config.json").read_text())["model_type"]
    want = {*tokenizer.convert_tokens_to_ids(names[family]), *range(len(tokenizer), size)}
    rules = sampling_rules(model, processor, cfg)
    assert set(rules.banned_ids) == want and tokenizer.eos_token_id in rules.eos_ids
    logits = torch.full((1, size), -50.0).index_fill(1, torch.tensor(sorted(want)), 50.0)
    assert policy_logits(logits, torch.tensor([5]), rules).softmax(-1)[:, sorted(want)].sum() == 0


@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_a_study_is_encoded_alike_alone_and_in_a_batch(family, views):
    cfg, model, processor = family
    together = encode_prompts(processor, views, "the chest", "cpu")
    assert together["image_counts"].tolist() == [1, 2, 1, 3]
    for i, study in enumerate(views):
        alone = encode_prompts(processor, [study[0] if i == 0 else study], "the chest", "cpu")  # one image, or a list
        mine = select_studies(together, i, i + 1)
        real = mine["attention_mask"][0].bool()
        assert torch.equal(mine["input_ids"][:, real], alone["input_ids"]) and real[-1]
        assert torch.equal(mine["pixel_values"], alone["pixel_values"])
        tokens = get_base(model).config.image_token_id == alone["input_ids"]
        per_image = [4] * len(study)
        if "image_grid_thw" in alone:
            per_image = [int(g.prod()) // 4 for g in alone["image_grid_thw"]]
        assert int(tokens.sum()) == sum(per_image)
    with pytest.raises(ValueError, match="leave the image placeholder out"):
        encode_prompts(processor, views, "<image>\nthe chest", "cpu")


# -------------------------------------------------------------------------------------------------------- Qwen2.5-VL


@pytest.mark.parametrize("tied", [False, True])  # 7B has an lm_head of its own, 3B has not
def test_qwen_loads_its_released_layout(tied, tmp_path, views):
    oracle = write_qwen(tmp_path, tied)
    model, processor = load_family(str(tmp_path), torch.float32)
    inputs = encode_prompts(processor, views, "the chest", "cpu")
    inputs.pop("image_counts")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, oracle(**inputs).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_qwen_positions_by_hand(folders, views):
    model, processor = load_family(str(folders["qwen2_5_vl"]), torch.float32)
    inputs = encode_prompts(processor, [views[0][0], views[3]], "the chest", "cpu")
    start = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    positions, pad = prompt_positions(model, inputs), int((inputs["attention_mask"][0] == 0).sum())
    assert pad > 0 and positions.shape == (3, *inputs["input_ids"].shape)
    row = positions[:, 0, pad:]  # 60 x 60 pixels -> 56 x 56 -> 2 x 2 tokens
    at = inputs["input_ids"][0, pad:].tolist().index(start) + 1  # of the image's first token
    assert row[:, :at].tolist() == [list(range(at))] * 3
    assert row[:, at : at + 4].tolist() == [[at] * 4, [at, at, at + 1, at + 1], [at, at + 1, at, at + 1]]
    rest = row.shape[1] - at - 4
    assert row[:, at + 4 :].tolist() == [list(range(at + 2, at + 2 + rest))] * 3  # 4 tokens took 2 positions
    first = report_start(positions)
    assert first[0].item() == at + 2 + rest
    assert (first < inputs["attention_mask"].sum(1)).all()


def test_qwen_scales_large_images_down_to_max_pixels(folders, cfg):
    image = Image.new("RGB", (560, 280))
    for pixels, tokens in ((0, 200), (50_000, 5 * 11)):  # 280 x 560 -> 20 x 10 tokens; -> 140 x 308
        at = replace(cfg, model=replace(cfg.model, path=str(folders["qwen2_5_vl"]), max_pixels=pixels))
        model, processor = load_policy(at)
        inputs = encode_prompts(processor, [image], "the chest", "cpu")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    with pytest.raises(ValueError, match="max_pixels is for qwen2_5_vl"):
        load_policy(replace(cfg, model=replace(cfg.model, max_pixels=1000)))


# ------------------------------------------------------------------------------------ what would fail in mid-run


@pytest.fixture
def llava(base_dir, tmp_path):
    """A copy of the tiny LLaVA's folder, and a function that changes one of its JSON files."""
    folder = Path(shutil.copytree(base_dir, tmp_path / "llava"))

    def change(file, **values):
        path = folder / file
        kept = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
        path.write_text(json.dumps(kept))

    return folder, change


def test_a_processor_of_2024_takes_its_patch_size_from_config_json(llava, cfg, images):
    folder, change = llava
    before = encode_prompts(load_policy(cfg)[1], images, "the chest", "cpu")
    later = ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]
    change("processor_config.json", **dict.fromkeys(later))
    at = replace(cfg, model=replace(cfg.model, path=str(folder)))
    after = encode_prompts(load_policy(at)[1], images, "the chest", "cpu")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("values", [{"patch_size": 8}, {"num_additional_image_tokens": 3},
                                    {"vision_feature_select_strategy": "full"}])  # fmt: skip
def test_image_tokens_without_features_are_found_before_training(values, llava, cfg):
    folder, change = llava
    change("processor_config.json", **values)
    at = replace(cfg, model=replace(cfg.model, path=str(folder)))
    with pytest.raises(ValueError, match=rf"{folder}: .*\b\d+ image tokens in the prompts, but 4 image features: "):
        load_policy(at)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ nobody.knows }}", "{{ raise_exception('a') }}",
                                      "no image {{ messages[0]['content'][1]['text'] }}"])  # fmt: skip
def test_a_broken_chat_template_is_one_line(template, llava, cfg):
    folder, _ = llava
    (folder / "chat_template.jinja").write_text(template)
    at = replace(cfg, model=replace(cfg.model, path=str(folder)))
    with pytest.raises(ValueError, match=f"{folder}: ") as error:
        load_policy(at)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sampled", [None, 0])
def test_a_policy_that_diverged_is_named_and_not_sampled(policy, cfg, images, sampled):
    model, processor = policy
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e38)
    with pytest.raises(ValueError, match="study a are not finite: lower the learning rate"):
        rollout(model, processor, images[:1], ["a"], cfg, step=1, samples=sampled)


@pytest.mark.skipif(not X_RAYS, reason=f"no real X-rays at {SHARED}")
@pytest.mark.parametrize("family_cfg", FAMILIES, indirect=True)
def test_real_radiographs_go_through_every_family(family):
    cfg, model, processor = family
    images = [read_image(path) for path in X_RAYS]
    texts = generate_reports(model, processor, [images[0], images], cfg, ids=["one view", "all views"])
    assert [len(group) for group in texts] == [1, 1]
