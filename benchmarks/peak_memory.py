"""What running/memory.py predicts beside what is resident at the peak, on LLaVA-mini on the CPU.

    python benchmarks/peak_memory.py

Each row is a process of its own: the model is loaded, then one loss pass (forward and backward) or one sampling runs;
its highest resident size less the size after loading is compared with `loss_bytes` or `sampling_bytes`; to the latter
comes the copy of the weights that the sampler makes on a CPU (vlm/fast_linear.py).
"""

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
from peft import get_peft_model  # noqa: E402

import model as policy  # noqa: E402
from config import Config, ModelConfig  # noqa: E402
from rollout import sample, uniforms  # noqa: E402
from running import memory  # noqa: E402

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


def measure(what: str, studies: int, group: int, length: int, image_tokens: int, trains: str, checkpointing: bool):
    """(predicted, measured) bytes."""
    torch.set_num_threads(2)
    cfg = Config(model=ModelConfig(gradient_checkpointing=checkpointing))
    base, processor = build("mini", image_tokens, "cpu")
    lora = lora_config() if what == "sampling" else policy.lora_config(cfg, base)
    model = get_peft_model(base.requires_grad_(False), lora)
    policy.prepare(model, cfg)
    inputs = policy.encode_prompts(processor, pictures(studies, 1), "USER: describe", "cpu")
    rules = policy.sampling_rules(model, processor, cfg)
    prefix = inputs["input_ids"].shape[1]
    if what == "sampling":
        rules = replace(rules, min_new_tokens=length)
        u = uniforms([str(i) for i in range(studies)], 0, 0, group, length)
        sides.mark_memory()
        sample(model.eval(), inputs, rules, u, length, group)
        kept = [*base.model.language_model.layers.parameters(), *base.lm_head.parameters()]
        copy = sum(p.numel() * p.element_size() for p in kept)  # vlm/fast_linear.py's, on the CPU alone
        return copy + memory.sampling_bytes(shape_of("mini"), prefix, length, studies, group, 4), sides.peak_memory()
    policy.set_trainable(model, trains)
    completions = torch.randint(20, 2000, (studies * group, length))
    model.train(checkpointing)
    sides.mark_memory()
    policy.completion_logps(model, inputs, completions, torch.ones_like(completions), rules).sum().backward()
    return memory.loss_bytes(shape_of("mini"), prefix, length, studies, group, trains, cfg), sides.peak_memory()


def rows() -> list[dict]:
    """All rows, each measured in its own process; large blocks go back to the system when they are freed."""
    found = []
    for row in ROWS:
        words = [sys.executable, __file__, json.dumps(row)]
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        predicted, measured = json.loads(done.stdout.splitlines()[-1])
        found.append({"row": row, "predicted": predicted, "measured": measured})
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
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        text = table(rows())
        print(text)
        (Path(__file__).parent / "results").mkdir(exist_ok=True)
        (Path(__file__).parent / "results" / "peak_memory.md").write_text(text + "\n", encoding="utf-8")
