"""One side of one case, in a process of its own: `bench.py` starts it, tells it when to run, and reads its times.

    python benchmarks/sides.py our_step --group 8          then a line "go" on stdin for each repeat, its end to stop

After a warm-up it prints "ready", then the seconds of each repeat, at last its peak memory: on the CPU the highest
resident size less the size after loading, on a GPU the allocator's peak. Nothing else is printed to stdout.
"""

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

from llava_mini import PROMPT, build, lora_config, pictures, with_lora  # noqa: E402

import model as policy  # noqa: E402
from config import Config, GRPOConfig, ModelConfig, RolloutConfig  # noqa: E402
from grpo import group_advantages, grpo_loss  # noqa: E402
from rollout import rollout, sample, uniforms  # noqa: E402
from train import policy_step, split_batch  # noqa: E402
from vlm.families import embed_prompt  # noqa: E402


@dataclass(frozen=True)
class Case:
    size: str = "mini"
    """mini or 7b"""
    studies: int = 2
    """B, images or sets of views"""
    group: int = 8
    """G"""
    tokens: int = 64
    """T, new tokens of each report, exactly"""
    image_tokens: int = 576
    """of one image"""
    views: int = 1
    """images of a study"""
    checkpointing: bool = False
    """gradient checkpointing, on both sides"""
    reward: str = ""
    """of the reward pass: which of reward_pass.PARTS"""
    compile: bool = False
    """ours decodes by rollout.compile"""
    threads: int = 2
    """CPU threads"""

    def config(self) -> Config:
        """Our settings."""
        lengths = {"min_new_tokens": self.tokens - 1, "max_new_tokens": self.tokens}
        rollout_config = RolloutConfig(self.group, compile=self.compile, **lengths)
        settings = GRPOConfig(self.studies, micro_batch=self.studies, advantage="zscore", lr=1e-6)
        model_config = ModelConfig(gradient_checkpointing=self.checkpointing)
        config = Config(rollout=rollout_config, grpo=settings, model=model_config)
        return replace(config, data=replace(config.data, prompt=PROMPT))


STEPS = 20  # that TRL may be asked for: its data set encodes as many copies of each image before the first
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reward(texts: list[str]) -> list[float]:
    """Any function of the texts will do; the same on both sides."""
    return [len(set(text.split())) / 64 for text in texts]


def our_model(case: Case):
    """(policy as `load_policy` and `add_reference` make it, processor)."""
    base, processor = build(case.size, case.image_tokens, DEVICE)
    model = with_lora(base.requires_grad_(False))
    policy.prepare(model, case.config())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        policy.add_reference(model, folder)
    policy.set_trainable(model, "language")
    return model, processor


def our_step(case: Case) -> Callable[[], None]:
    """One update: rollout, reward, advantages, then `train.policy_step` (`train.grpo_update` less logs)."""
    cfg, (model, processor) = case.config(), our_model(case)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.grpo.lr, weight_decay=0.0)
    rules, images, k = policy.sampling_rules(model, processor, cfg), pictures(case.studies, case.views), 0
    ids = [str(i) for i in range(case.studies)]

    def step() -> None:
        nonlocal k
        k += 1
        out, texts, inputs = rollout(model, processor, images, ids, cfg, step=k)
        rewards = torch.tensor([reward(group) for group in texts])
        advantages = group_advantages(rewards, cfg.grpo.advantage)
        policy_step(model, optimizer, split_batch(inputs, out, advantages, ids, cfg), rules, cfg)

    return step


def trl_step(case: Case) -> None:
    """TRL's GRPOTrainer; a repeat is what lies between its callbacks for the begin and the end of a step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as TRLConfig
    from trl import GRPOTrainer

    model, processor = build(case.size, case.image_tokens, DEVICE)

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:  # step 0 was the warm-up
                ready()
            if state.global_step and not told_to_go():
                control.should_training_stop = True
            self.start = clock()

        def on_step_end(self, args, state, control, **_):
            seconds = clock() - self.start
            if state.global_step > 1 and not control.should_training_stop:
                say(seconds)

    rows = [{"prompt": [{"role": "user", "content": PROMPT}], "images": views}
            for views in pictures(case.studies, case.views)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args = TRLConfig(
            folder, per_device_train_batch_size=case.studies * case.group, num_generations=case.group, beta=0.04,
            max_completion_length=case.tokens, generation_kwargs={"min_new_tokens": case.tokens}, learning_rate=1e-6,
            gradient_checkpointing=case.checkpointing, max_steps=STEPS, report_to="none", save_strategy="no",
            logging_steps=1, bf16=case.size == "7b", use_cpu=DEVICE == "cpu", disable_tqdm=True, max_grad_norm=1.0,
            optim="adamw_torch", dataloader_pin_memory=False, shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, lambda completions, **_: reward([c[0]["content"] for c in completions]), args,
            Dataset.from_list(rows * STEPS), processing_class=processor, peft_config=lora_config(), callbacks=[Ask()],
        )  # fmt: skip
        mark_memory()
        trainer.train()


def our_sampling(case: Case) -> Callable[[], None]:
    """Group sampling."""
    cfg, (model, processor) = case.config(), our_model(case)
    images, ids = pictures(case.studies, case.views), [str(i) for i in range(case.studies)]
    rules = replace(policy.sampling_rules(model, processor, cfg), min_new_tokens=case.tokens)
    u = uniforms(ids, 0, 0, case.group, case.tokens)
    inputs = policy.encode_prompts(processor, images, PROMPT, DEVICE)

    def run() -> None:
        out = sample(model, inputs, rules, u, case.tokens, case.group, compiled=case.compile)
        assert out.completion_mask.all()

    return run


def our_compiled_step(case: Case) -> Callable[[], None]:
    """The same update with rollout.compile."""
    return our_step(replace(case, compile=True))


def our_compiled_sampling(case: Case) -> Callable[[], None]:
    """The same sampling with rollout.compile."""
    return our_sampling(replace(case, compile=True))


def generate(case: Case) -> Callable[[], None]:
    """Hugging Face's `generate` with num_return_sequences = G."""
    model, processor = build(case.size, case.image_tokens, DEVICE)
    model = with_lora(model)
    inputs = policy.encode_prompts(processor, pictures(case.studies, case.views), PROMPT, DEVICE)
    inputs.pop("image_counts")

    def run() -> None:
        out = model.generate(
            **inputs, do_sample=True, top_k=0, num_return_sequences=case.group, min_new_tokens=case.tokens,
            max_new_tokens=case.tokens,
        )  # fmt: skip
        assert out.shape == (case.studies * case.group, inputs["input_ids"].shape[1] + case.tokens)

    return run


def loss_inputs(case: Case, model, processor):
    """Encoded prompts, random completions (N, T), their mask, and what the loss needs beside log-probs."""
    inputs = policy.encode_prompts(processor, pictures(case.studies, case.views), PROMPT, DEVICE)
    generator = torch.Generator().manual_seed(2)
    n, size = case.studies * case.group, model.config.get_text_config().vocab_size
    completions = torch.randint(20, size, (n, case.tokens), generator=generator).to(DEVICE)
    return inputs, completions, torch.ones_like(completions), torch.randn(n, generator=generator).to(DEVICE)


def backward_of(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, model) -> None:
    """Eq. 10 on these log-probs, its gradient, and away with it."""
    old = logps.detach()
    grpo_loss(logps, old, old - 0.1, advantages, mask, eps_low=0.2, eps_high=0.2, beta=0.04)[0].backward()
    model.zero_grad(set_to_none=True)


def our_loss(case: Case) -> Callable[[], None]:
    """Forward and backward of the policy loss; the images are encoded in it."""
    cfg, (model, processor) = case.config(), our_model(case)
    inputs, completions, mask, advantages = loss_inputs(case, model, processor)
    rules = replace(policy.sampling_rules(model, processor, cfg), min_new_tokens=0)

    def run() -> None:
        logps = policy.completion_logps(model.train(case.checkpointing), inputs, completions, mask, rules)
        backward_of(logps, advantages, mask, model)

    return run


def plain_loss(case: Case) -> Callable[[], None]:
    """The same with B * G plain forwards in one batch: images, prompts and reports all G times."""
    model, processor = build(case.size, case.image_tokens, DEVICE)
    model = with_lora(model)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    inputs, completions, mask, advantages = loss_inputs(case, model, processor)
    repeated = {name: inputs[name].repeat_interleave(case.group, dim=0) for name in ("input_ids", "attention_mask")}
    pixels = inputs["pixel_values"].view(case.studies, case.views, *inputs["pixel_values"].shape[1:])
    pixels = pixels.repeat_interleave(case.group, dim=0).flatten(0, 1)

    def run() -> None:
        ids = torch.cat([repeated["input_ids"], completions], dim=1)
        attention_mask = torch.cat([repeated["attention_mask"], mask], dim=1)
        logits = model(
            input_ids=ids, attention_mask=attention_mask, pixel_values=pixels, logits_to_keep=case.tokens + 1,
            use_cache=False,
        ).logits[:, :-1]  # fmt: skip
        logps = logits.float().log_softmax(dim=-1).gather(2, completions[..., None])[..., 0]
        backward_of(logps, advantages, mask, model)

    return run


def prefix_grouper_loss(case: Case) -> Callable[[], None]:
    """The same by the prefix-grouper package: image and prompt once, its attention around torch's sdpa, with causal
    masks made once; what it registers with transformers wants FlashAttention's two-dimensional ones."""
    from prefix_grouper import PrefixGrouper
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface

    model, processor = build(case.size, case.image_tokens, DEVICE)
    model = with_lora(model)
    base = model.get_base_model()
    inputs, completions, mask, advantages = loss_inputs(case, model, processor)
    grouper = PrefixGrouper.from_ungrouped_masks(inputs["attention_mask"], mask, case.group, device=DEVICE)
    lengths = [grouper.prefix_attn_mask.shape[1], grouper.suffix_attn_mask.shape[1]]
    causal = {t: torch.ones(t, k, dtype=torch.bool, device=DEVICE).tril(k - t)
              for t, k in ((lengths[0], lengths[0]), (case.tokens, lengths[1]))}  # fmt: skip
    masks = {id(m): m[:, None, None].bool() & causal[t]
             for m, t in ((grouper.prefix_attn_mask, lengths[0]), (grouper.suffix_attn_mask, case.tokens))}  # fmt: skip

    def sdpa(q, k, v, seen):  # (b, H, t, d) -> (b, t, H, d)
        return scaled_dot_product_attention(q, k, v, masks[id(seen)]).transpose(1, 2)

    AttentionInterface.register("grouped", lambda module, q, k, v, *_, **__: (grouper.forward(sdpa, q, k, v), None))
    base.model.language_model.set_attn_implementation("grouped")
    prefix = torch.arange(lengths[0], device=DEVICE).expand(case.studies, -1)
    suffix = torch.arange(lengths[0], lengths[1], device=DEVICE).expand(len(completions), -1)
    positions = grouper.concat_input(prefix, inputs["attention_mask"], suffix, mask)

    def run() -> None:
        embeds = grouper.concat_input(embed_prompt(base, inputs), inputs["attention_mask"],
                                      base.get_input_embeddings()(completions), mask)  # fmt: skip
        hidden = base.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=embeds.new_zeros(1, 1, 1, 1), use_cache=False
        ).last_hidden_state
        reports = grouper.split_output(hidden, include_prefix_last=1)[2][:, :-1]  # (N, T, D)
        logits = base.lm_head(reports).float()
        logps = logits.gather(2, completions[..., None])[..., 0] - logits.logsumexp(dim=-1)
        backward_of(logps, advantages, mask, model)

    return run


def our_rewards(case: Case) -> Callable[[], None]:
    """One part of the reward pass."""
    from reward_pass import one_side  # here, as it needs the packages

    return one_side(case.reward, True, DEVICE)


def package_rewards(case: Case) -> Callable[[], None]:
    """The same by the package, pair by pair."""
    from reward_pass import one_side

    return one_side(case.reward, False, DEVICE)


# ------------------------------------------------------------------------------------------------------- the protocol


def clock() -> float:
    """Seconds, the GPU's work done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


loaded = 0


def mark_memory() -> None:
    """What is resident now is the loaded model; the peak is counted from here."""
    global loaded
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        loaded = resident("VmRSS")


def peak_memory() -> int:
    """Bytes: on a GPU everything allocated at the peak, on the CPU what came on top of the loaded model."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM") - loaded


def say(*words) -> None:
    print(*words, file=answers, flush=True)


def ready() -> None:
    say("ready")


def told_to_go() -> bool:
    return sys.stdin.readline().strip() == "go"


FUNCTIONS = (our_step, our_compiled_step, trl_step, our_sampling, our_compiled_sampling, generate, our_loss, plain_loss,
             prefix_grouper_loss, our_rewards, package_rewards)  # fmt: skip
SIDES = {f.__name__: f for f in FUNCTIONS}


def main(side: str, case: Case) -> None:
    torch.set_num_threads(case.threads)
    run = SIDES[side](case)
    if run is not None:  # TRL's trainer has run its own loop by now
        mark_memory()
        run()
        ready()
        while told_to_go():
            start = clock()
            run()
            say(clock() - start)
    say(peak_memory())


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; the parent reads stdout
        main(sys.argv[1], tyro.cli(Case, args=sys.argv[2:]))
