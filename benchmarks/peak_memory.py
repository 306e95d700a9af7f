"""What running/memory.py predicts beside what is needed at the peak: LLaVA-mini on the CPU, or LLaVA-Med's geometry.

    python benchmarks/peak_memory.py                on the CPU
    python benchmarks/peak_memory.py --size 7b      on a GPU

After loading the model, one loss pass (forward and backward) or one sampling runs; its peak less what was taken before
it is compared with `loss_bytes` or `sampling_bytes`. On a GPU that is what the allocator gave out. On the CPU each row
is a process of its own and its highest resident size counts; to the sampler's prediction comes the copy of the weights
that it makes there (vlm/fast_linear.py).
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import sides  # noqa: E402
from llava_mini import build, lora_config, pictures, shape_of  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

import model as policy  # noqa: E402
from config import Config, ModelConfig  # noqa: E402
from rollout import sample, uniforms  # noqa: E402
from running import memory  # noqa: E402
from vlm.adapters import targets  # noqa: E402

ROWS = [  # what, studies, candidates, tokens, image tokens, part that trains, gradient checkpointing
    ("loss", 2, 8, 64, 576, "language", False),
    ("loss", 2, 8, 64, 576, "language", True),
    ("loss", 2, 8, 64, 576, "projector", False),
    ("loss", 1, 8, 64, 576, "language", False),
    ("loss", 2, 2, 64, 576, "language", False),
    ("loss", 4, 16, 128, 64, "language", False),
    ("loss", 4, 16, 128, 64, "language", True),
    ("sampling", 4, 16, 64, 576, "", False),
    ("sampling", 16, 8, 96, 64, "", False),
]
ROWS_7B = [
    ("loss", 8, 8, 128, 576, "language", True),
    ("loss", 2, 8, 128, 576, "projector", True),
    ("loss", 1, 8, 128, 576, "language", False),
    ("loss", 1, 8, 128, 576, "projector", False),
    ("sampling", 8, 8, 128, 576, "", False),
    ("sampling", 16, 16, 128, 576, "", False),
]


def measure(size: str, row: tuple) -> tuple[int, int]:
    """(predicted, measured) bytes."""
    what, studies, group, length, image_tokens, trains, checkpointing = row
    torch.set_num_threads(2)
    dtype, itemsize = ("float32", 4) if size == "mini" else ("bfloat16", 2)
    cfg = Config(model=ModelConfig(gradient_checkpointing=checkpointing, dtype=dtype))
    base, processor = build(size, image_tokens, sides.DEVICE)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=targets(base))
    model = get_peft_model(base.requires_grad_(False), lora_config() if what == "sampling" else lora)
    policy.prepare(model, cfg)
    inputs = policy.encode_prompts(processor, pictures(studies, 1), "USER: describe", sides.DEVICE)
    rules = policy.sampling_rules(model, processor, cfg)
    prefix = inputs["input_ids"].shape[1]
    if what == "sampling":
        rules = replace(rules, min_new_tokens=length)
        u = uniforms([str(i) for i in range(studies)], 0, 0, group, length)
        mark()
        sample(model.eval(), inputs, rules, u, length, group)
        kept = [*base.model.language_model.layers.parameters(), *base.lm_head.parameters()]
        copy = sum(p.numel() * p.element_size() for p in kept) * (sides.DEVICE == "cpu")  # vlm/fast_linear.py's
        return copy + memory.sampling_bytes(shape_of(size), prefix, length, studies, group, itemsize), peak()
    policy.set_trainable(model, trains)
    completions = torch.randint(20, 2000, (studies * group, length), device=sides.DEVICE)
    model.train(checkpointing)
    mark()
    policy.completion_logps(model, inputs, completions, torch.ones_like(completions), rules).sum().backward()
    return memory.loss_bytes(shape_of(size), prefix, length, studies, group, trains, cfg), peak()


def mark() -> None:
    """What is taken now is not counted."""
    sides.mark_memory()
    sides.loaded = torch.cuda.memory_allocated() if sides.DEVICE == "cuda" else sides.loaded


def peak() -> int:
    """Bytes on top of what was taken at `mark`."""
    return sides.peak_memory() - (sides.loaded if sides.DEVICE == "cuda" else 0)


def measure_apart(row: tuple) -> tuple[int, int]:
    """The same for LLaVA-mini in a process of its own; large blocks go back to the system when they are freed."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(row)], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def rows(size: str) -> list[dict]:
    """All rows, measured one after the other."""
    found = []
    for row in ROWS if size == "mini" else ROWS_7B:
        predicted, measured = measure_apart(row) if size == "mini" else measure(size, row)
        found.append({"row": row, "predicted": predicted, "measured": measured})
        gc.collect()  # the model of the row before
    return found


def table(found: list[dict]) -> str:
    columns = ["what", "studies x candidates x tokens", "image tokens", "trains", "checkpointing", "predicted, MiB",
               "seen, MiB", "predicted / seen"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for x in found:
        what, studies, group, length, image, trains, checkpointing = x["row"]
        numbers = f"{x['predicted'] / 2**20:.0f} | {x['measured'] / 2**20:.0f} | {x['predicted'] / x['measured']:.2f}"
        lines.append(f"| {what} | {studies} x {group} x {length} | {image} | {trains} | {checkpointing} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure("mini", json.loads(sys.argv[1]))))
    else:
        size = "7b" if sys.argv[1:] == ["--size", "7b"] else "mini"
        text = table(rows(size))
        if sides.DEVICE == "cuda":
            text = f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{text}"
        print(text)
        name = "peak_memory.md" if size == "mini" else "peak_memory-7b.md"
        (Path(__file__).parent / "results").mkdir(exist_ok=True)
        (Path(__file__).parent / "results" / name).write_text(text + "\n", encoding="utf-8")
