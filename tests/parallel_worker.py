"""One process of test_running_parallel.py: a GRPO update on a tiny policy; the first process saves what came of it.

    torchrun ... tests/parallel_worker.py FOLDER fsdp|whole [crash]
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import train
from config import Config, GRPOConfig, ModelConfig, RolloutConfig
from data import Study
from evidence.generate import generate_split
from model import add_reference, load_policy, set_trainable
from running import parallel


def rewards_of(outputs, references, images, ids, scorers, cfg, k, stage):
    """A reward of the text alone."""
    values = torch.tensor([[sum(map(ord, text)) % 97 / 97 for text in group] for group in outputs])
    return values, {"format": values}


seen = {}


def keep_gradient(parameters, max_norm: float) -> torch.Tensor:
    """In the place of the clipping: keeps the summed gradient that a step would use."""
    seen["gradient"] = torch.cat([p.grad.flatten() for p in parameters])
    return torch.zeros(())


def main(folder: Path, fsdp: bool, crash: bool) -> None:
    torch.set_num_threads(1)
    parallel.start("cpu")
    studies = [Study(path.stem, [path], "", "train") for path in sorted(folder.glob("*.png"))]
    if fsdp:
        studies = studies[:4]
    settings = GRPOConfig(batch_size=len(studies), micro_batch=2, micro_group=3)
    cfg = Config(model=ModelConfig(path=str(folder / "base")), rollout=RolloutConfig(4, max_new_tokens=12),
                 grpo=settings, device="cpu", fsdp=fsdp)  # fmt: skip
    model, processor = load_policy(cfg, folder / "adapter")
    add_reference(model, folder / "reference")
    set_trainable(model, "language+projector")
    model.get_base_model().generation_config.eos_token_id = list(range(20, 60))  # reports of different lengths
    parameters = [p for p in model.parameters() if p.requires_grad]
    train.compute_rewards, torch.nn.utils.clip_grad_norm_ = rewards_of, keep_gradient
    written, real = {}, train.rollout

    def rollout(model, processor, views, ids, cfg, step):
        if crash and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        out, texts, inputs = real(model, processor, views, ids, cfg, step)
        written.update(zip(ids, texts, strict=True))
        return out, texts, inputs

    train.rollout = rollout
    mine, optimizer = studies[parallel.rank() :: parallel.world()], torch.optim.SGD(parameters, lr=0.0)
    row, _ = train.grpo_update(model, processor, None, optimizer, mine, cfg, k=1, stage=1)
    split = generate_split(model, processor, studies, replace(cfg, eval=replace(cfg.eval, batch_size=2)))
    sharded = sum(hasattr(p, "full_tensor") for p in model.parameters())
    shares = parallel.gather(written)
    if parallel.rank() == 0:
        candidates = {study_id: texts for share in shares for study_id, texts in share.items()}
        state = {"gradient": seen["gradient"], "candidates": candidates, "row": row, "split": split, "sharded": sharded}
        torch.save(state, folder / f"result_{parallel.world()}.pt")
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "fsdp" in sys.argv, "crash" in sys.argv)
