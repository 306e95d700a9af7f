"""A few updates of every stage, by `train.train`, and each stage's GPU memory beside running/memory.py's forecast.

    python benchmarks/stages.py                LLaVA-Med's geometry on a GPU; --size mini: LLaVA-mini on the CPU
    python benchmarks/stages.py --updates 5 --compile

Random weights (7b: bfloat16), float32 LoRA, gradient checkpointing, 8 studies x G = 8 x 64 new tokens at temperature
0.7 in one micro-batch (SFT: 2 studies); the small phantom's films, references and scorers. What is trained means
nothing: it shows that every stage runs, how long an update takes and what it needs. Memory: on a GPU the most that the
allocator has taken from it, its context not included; on the CPU none is shown. Written to benchmarks/results/.
"""

import gc
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava_mini import build  # noqa: E402
from sides import DEVICE  # noqa: E402

from config import Config, check, load_toml  # noqa: E402
from data import load_studies  # noqa: E402
from phantom.assets import resolve  # noqa: E402
from rewards import wrap  # noqa: E402
from running.memory import GIB, estimate, read_shape  # noqa: E402
from train import FOLDERS, train  # noqa: E402

HERE = Path(__file__).parent
COLUMNS = ("stage", "updates", "seconds an update", "loss, first and last", "gradient norm",
           "forecast, GiB", "seen, GiB", "forecast / seen")  # fmt: skip

DTYPE = {"mini": "float32", "7b": "bfloat16"}
WARM_UP = 40  # updates of SFT: until the candidates hold words of the references, and their rewards differ


@dataclass
class Stages:
    size: str = "7b"
    """mini or 7b (llava_mini.py)"""
    updates: int = 4
    """of each stage after SFT; the first is not timed"""
    compile: bool = False
    """rollout.compile"""


def config_of(stages: Stages, folder: Path) -> Config:
    """The smoke run's settings with this base model, sizes and checkpointing."""
    cfg = load_toml(str(HERE.parent / "configs" / "smoke.toml"), Config())
    size, steps, pairs = {"batch_size": 8, "micro_batch": 8}, {"steps": stages.updates}, str(folder / "pairs.jsonl")
    cfg = replace(
        cfg, run=str(folder / "run"), save_every=1000, dpo=replace(cfg.dpo, **size, **steps, pairs=pairs),
        model=replace(cfg.model, path=str(folder / "base"), dtype=DTYPE[stages.size], gradient_checkpointing=True),
        rollout=replace(cfg.rollout, group_size=8, max_new_tokens=64, temperature=0.7, compile=stages.compile),
        sft=replace(cfg.sft, batch_size=2, micro_batch=2, steps=WARM_UP, lr=1e-3), grpo=replace(cfg.grpo, **size),
        stage1=replace(cfg.stage1, **steps), stage2=replace(cfg.stage2, **steps),
    )  # fmt: skip
    return check(resolve(check(cfg), ("data", "labeller", "expert")))


def write_inputs(stages: Stages, cfg: Config) -> None:
    """The base model's folder, whose tokenizer knows the references' words, and pairs for DPO: another's report."""
    studies = load_studies(cfg.data, cfg.data.sft_split)
    words = dict.fromkeys(" ".join([wrap(cfg.data.prompt), *(study.report for study in studies)]).split())
    model, processor = build(stages.size, 576, DEVICE, tuple(words))
    model.save_pretrained(cfg.model.path)
    processor.save_pretrained(cfg.model.path)
    studies = load_studies(cfg.data, cfg.data.rl_split)
    others = zip(studies, studies[1:] + studies[:1], strict=True)
    rows = [{"id": study.id, "chosen": study.report, "rejected": other.report} for study, other in others]
    Path(cfg.dpo.pairs).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def row_of(cfg: Config, stage: int | str, shape) -> list:
    """Train one stage; its line of the table."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(replace(cfg, stage=str(stage)))
    seen = torch.cuda.max_memory_reserved() if DEVICE == "cuda" else 0
    lines = (Path(cfg.run) / FOLDERS[stage] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    forecast = estimate(shape, cfg, stage, scorers=0)["total"]  # the phantom's are a few MB
    loss, seconds = [row["loss"] for row in rows], [row["seconds"] for row in rows[1:]]
    norms = [row["grad_norm"] for row in rows]
    ratio = f"{forecast / seen:.2f}" if seen else ""
    return [FOLDERS[stage], len(rows), f"{statistics.median(seconds):.2f} [{min(seconds):.2f} to {max(seconds):.2f}]",
            f"{loss[0]:.3g}, {loss[-1]:.3g}", f"{min(norms):.2g} to {max(norms):.2g}",
            f"{forecast / GIB:.1f}", f"{seen / GIB:.1f}" if seen else "", ratio]  # fmt: skip


def main(stages: Stages) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(stages, Path(folder))
        write_inputs(stages, cfg)
        model = build(stages.size, 576, "meta")[0]
        shape = read_shape(model.config, model.num_parameters())
        where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
        lines = [f"# Every stage, {stages.size}, random weights", "", f"{where}; {versions}; {vars(stages)}", "",
                 f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]  # fmt: skip
        for stage in FOLDERS:
            lines.append(f"| {' | '.join(map(str, row_of(cfg, stage, shape)))} |")
            print(lines[-1], flush=True)
            name = f"stages-{stages.size}{'-compile' * stages.compile}.md"
            (HERE / "results" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Stages, description=__doc__))
