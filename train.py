"""Train VALOR: Stage 0 (SFT), Stage 1 (GRPO on text rewards), Stage 2 (GRPO with the visual reward mixed in).

    python train.py --stage all                          # one process
    python train.py --check --config C                   # is everything there that this run needs? (preflight.py)
    torchrun --nproc-per-node 2 train.py --stage 2       # a missing Stage 0 or 1 is trained first

Algorithm 1 of the paper: `sft_update` and `grpo_update` are one policy update each, `run_stage` repeats one of them,
`main` strings the stages together. What a run leaves behind, and how it goes on after a kill: runs.py.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, parse
from data import Study, batch_ids, load_studies, read_views
from evidence import metrics
from grpo import group_advantages, grpo_loss
from model import (
    add_reference,
    completion_logps,
    disable_dropout,
    encode_prompts,
    get_base,
    load_policy,
    sampling_rules,
    select_studies,
    set_trainable,
    use_reference,
)
from phantom.assets import NAMES, resolve
from phantom.oracle import exact_labels, oracle_similarity
from rewards import Scorers, compute_rewards, wrap
from rollout import Rollout, generate_split, rollout
from running import parallel, preflight
from running.folder import (
    Log,
    adapter_folder,
    adapter_state,
    average,
    claim_folder,
    load_checkpoint,
    lock,
    sample_record,
    save_adapter,
    save_checkpoint,
)
from scorers.load import load_scorers
from sft import sft_loss, text_logps
from vlm.fast_linear import lean_layers

FOLDERS = {0: "sft", 1: "stage1", 2: "stage2"}
HIGH_KL = 0.25  # nats per token; beyond it reward hacking was seen (two IMPRESSION sections in one report)


@dataclass
class Trainer:
    """What every update of a stage needs."""

    cfg: Config
    stage: int
    model: torch.nn.Module
    processor: object
    scorers: Scorers | None
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]

    def step(self, max_norm: float, divide_by: float = 1.0) -> float:
        """Sum gradients over the processes, divide, clip, update. Returns the gradient norm before clipping."""
        parallel.sum_gradients(self.parameters)
        for parameter in self.parameters:
            parameter.grad /= divide_by
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def sft_update(t: Trainer, batch: list[Study], step: int, steps: int) -> dict[str, float]:
    """One update of Stage 0 (Eq. 2); `batch` is this process's share. Returns the row for metrics.jsonl."""
    cfg, lr = t.cfg, t.cfg.sft.lr * min(1.0, (step + 1) / max(1.0, 0.03 * steps)) * (1 - step / steps)
    t.optimizer.param_groups[0]["lr"] = lr
    part = {"nll": 0.0, "tokens": 0, "cut": 0}
    t.model.train()  # dropout, if any, belongs to Stage 0 alone
    for block in blocks(len(batch), cfg.sft.micro_batch):
        some = batch[block.start : block.stop]
        inputs = encode_prompts(t.processor, [read_views(s) for s in some], cfg.data.prompt, t.model.device)
        logps, mask, cut = text_logps(t.model, t.processor, inputs, [wrap(s.report) for s in some], cfg)
        require_finite(logps, some)
        loss = sft_loss(logps, mask, total_tokens=1)  # the sum: divided by the global token count below
        loss.backward()
        part = {"nll": part["nll"] + loss.item(), "tokens": part["tokens"] + int(mask.sum()), "cut": part["cut"] + cut}
    total = {name: sum(p[name] for p in parallel.gather(part)) for name in part}
    norm = t.step(cfg.sft.max_grad_norm, divide_by=total["tokens"])
    return {"loss": total["nll"] / total["tokens"], "grad_norm": norm, "lr": lr, "cut_reports": total["cut"]}


def grpo_update(t: Trainer, batch: list[Study], k: int) -> tuple[dict[str, float], dict | None]:
    """One policy update k of Algorithm 1; `batch` is this process's share of the studies.

    Returns (the row for metrics.jsonl, the first study's candidates with their rewards for samples.jsonl).
    """
    cfg, views, ids = t.cfg, [read_views(s) for s in batch], [s.id for s in batch]
    part, sample, passes = {}, None, []
    if batch:
        out, outputs, inputs = rollout(t.model, t.processor, views, ids, cfg, step=k)
        references = [s.report for s in batch]
        rewards, parts = compute_rewards(
            outputs, references, [v[0] for v in views], ids, t.scorers, cfg.rewards, k=k, stage=t.stage
        )  # (B, G) each
        advantages = group_advantages(rewards, cfg.grpo.advantage).flatten().to(t.model.device)  # (B * G,)
        passes = loss_passes(t, inputs, out, advantages, batch)
        part = group_metrics(out, rewards, parts)
        sample = sample_record(batch, outputs, rewards, parts, k)
    stats, norm = [], 0.0
    for _ in range(cfg.grpo.num_iterations):
        stats += [stat for backward in passes for stat in backward()]
        norm = t.step(cfg.grpo.max_grad_norm)
    if stats:
        part |= {name: [s[name] for s in stats] for name in stats[0]}
    row = average(parallel.gather(part)) | {"grad_norm": norm, "lr": cfg.grpo.lr}
    if row["kl"] > HIGH_KL:
        tqdm.write(
            f"update {k}: KL {row['kl']:.2f} is above {HIGH_KL}: read samples.jsonl for reward hacking", sys.stderr
        )
    return row, sample


def loss_passes(
    t: Trainer, inputs: dict[str, Tensor], out: Rollout, advantages: Tensor, batch: list[Study]
) -> list[Callable]:
    """Eq. 10 over micro-batches: functions that add their share of the gradient and return it with its statistics.

    A micro-batch is some studies, and of these all candidates or some. Each is weighted so that the gradient is the
    mean over the global batch, however that is split over micro-batches and processes. The reference's log-probs are
    computed here, once per batch of rollouts.
    """
    cfg, group, rules = t.cfg.grpo, t.cfg.rollout.group_size, sampling_rules(t.model, t.processor, t.cfg)
    t.model.train(t.cfg.model.gradient_checkpointing)  # it acts in train mode only; dropout is off

    def one_pass(studies: range, candidates: range) -> Callable:
        some = select_studies(inputs, studies.start, studies.stop)
        rows = torch.tensor([study * group + i for study in studies for i in candidates], device=advantages.device)
        mask, old_logps = out.completion_mask[rows], None  # (n, T)
        share = len(rows) / (cfg.batch_size * group)  # of the global batch

        def logps_now() -> Tensor:  # (n, T)
            return completion_logps(t.model, some, out.completions[rows], mask, rules)

        ref_logps = logps_now()  # within use_reference, below

        def backward() -> list[dict[str, float]]:
            nonlocal old_logps
            logps = logps_now()
            require_finite(logps, batch[studies.start : studies.stop])
            if old_logps is None:  # the first pass is by the policy that sampled: its ratio is 1 exactly
                old_logps = logps.detach()
            loss, stats = grpo_loss(
                logps, old_logps, ref_logps, advantages[rows], mask,
                eps_low=cfg.eps_low, eps_high=cfg.eps_high, beta=cfg.beta,
            )  # fmt: skip
            (loss * share).backward()
            return [{"loss": loss.item()} | stats] * len(rows)

        return backward

    with torch.no_grad(), use_reference(t.model), lean_layers(get_base(t.model)):
        return [
            one_pass(studies, candidates)
            for studies in blocks(len(batch), cfg.micro_batch)
            for candidates in blocks(group, cfg.micro_group or group)
        ]


def blocks(n: int, size: int) -> list[range]:
    """0 .. n - 1 in runs of `size`; the last may be shorter."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def group_metrics(out: Rollout, rewards: Tensor, parts: dict[str, Tensor]) -> dict[str, list[float]]:
    """Per-study metrics of a rollout: mean and within-group spread of each reward, length, entropy, rates."""
    metrics = {}
    for name, values in {"total": rewards, **parts}.items():
        metrics[f"reward/{name}"] = values.mean(dim=1).tolist()
        metrics[f"spread/{name}"] = values.std(dim=1, correction=0).tolist()
    lengths = out.completion_mask.sum(dim=1)  # (N,)
    per_row = {
        "length": lengths.float(),
        "entropy": -out.logps.sum(dim=1) / lengths,  # mean -log p of sampled tokens: unbiased for the entropy
        "finished_rate": out.finished.float(),
        "format_rate": parts["format"].flatten(),
    }
    return metrics | {name: x.view(rewards.shape).mean(dim=1).tolist() for name, x in per_row.items()}


def require_finite(logps: Tensor, batch: list[Study]) -> None:
    """Stop with the name of the first study whose log-probs (N, T) are not finite; N is a multiple of the studies."""
    bad = (~torch.isfinite(logps).all(dim=1)).nonzero().flatten()
    if len(bad):
        study = batch[int(bad[0]) * len(batch) // len(logps)]
        raise ValueError(f"the log-probs of study {study.id} are not finite: lower the learning rate")


def load_trainer(cfg: Config, stage: int, init: Path | None, reference: Path | None) -> Trainer:
    """Model, reference, scorers and optimizer of a stage. init None: a new adapter."""
    torch.manual_seed(cfg.seed)
    model, processor = load_policy(cfg, init, new_lora=init is None)
    scorers = None
    if stage > 0:
        add_reference(model, reference)
        disable_dropout(model)
        oracle, visual = cfg.scorers.expert == "oracle", stage == 2 and cfg.rewards.lambda_vis > 0
        scorers = load_scorers(cfg, model.device, with_expert=visual and not oracle)
        if oracle and visual:
            scorers.similarity = oracle_similarity(exact_labels(cfg))
    set_trainable(model, {0: cfg.sft, 1: cfg.stage1, 2: cfg.stage2}[stage].trainable)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = cfg.sft.lr if stage == 0 else cfg.grpo.lr
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    return Trainer(cfg, stage, model, processor, scorers, optimizer, parameters)


def run_stage(cfg: Config, stage: int, folder: Path, init: Path | None, reference: Path | None) -> None:
    """Train one stage from adapter `init` and save `folder/adapter`; goes on from a checkpoint where there is one."""
    rank, world, cfg = parallel.rank(), parallel.world(), resolve(cfg, needs=())
    studies = load_studies(cfg.data, cfg.data.sft_split if stage == 0 else cfg.data.rl_split)
    t = load_trainer(cfg, stage, init, reference)
    stage_cfg = {0: cfg.sft, 1: cfg.stage1, 2: cfg.stage2}[stage]
    batch_size = cfg.sft.batch_size if stage == 0 else cfg.grpo.batch_size
    if cfg.fsdp and batch_size % world:
        raise ValueError(f"fsdp: the batch of {batch_size} studies must be a multiple of the {world} processes")
    steps = stage_cfg.steps or max(1, round(stage_cfg.epochs * len(studies) / batch_size))
    k0 = adapter_state(init).get("k", 0) if stage > 0 else 0  # k counts policy updates over both RL stages
    done = load_checkpoint(folder, t.model, t.optimizer)
    log = Log(folder, k0 + done, active=rank == 0)
    held_out = load_studies(cfg.data, cfg.data.val_split)[: cfg.eval.val_studies] if cfg.val_every else []
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=f"{folder.name:<18}", disable=rank > 0)
    for step in bar:
        k, began = k0 + step + 1, time.perf_counter()
        order = batch_ids(len(studies), batch_size, cfg.seed, k - 1)  # Stage 2 reads on where Stage 1 stopped
        batch = [studies[i] for i in order[rank::world]]
        row, sample = (sft_update(t, batch, step, steps), None) if stage == 0 else grpo_update(t, batch, k)
        row["seconds"] = time.perf_counter() - began
        if held_out and (step + 1) % cfg.val_every == 0:
            t.model.eval()
            outputs = generate_split(t.model, t.processor, held_out, cfg)
            row |= metrics.validation_row(outputs, held_out, cfg.rewards.required_sections)
        log.write(k, row, None if step % cfg.sample_every else sample)
        shown = {n.split("/")[-1]: f"{row[n]:.3f}" for n in ("loss", "reward/total", "kl") if n in row}
        bar.set_postfix(shown, refresh=False)  # drawn with the bar, so that a log file is not flooded
        if (step + 1) % cfg.save_every == 0 and rank == 0:
            save_checkpoint(folder, t.model, t.optimizer, step + 1)
    log.close()
    if rank == 0:
        save_adapter(folder, t.model, {"stage": stage, "k": k0 + steps if stage else 0, "seed": cfg.seed})
    parallel.barrier()


def train(cfg: Config) -> None:
    """Run the stages that `cfg.stage` asks for, the missing ones before them first."""
    run = Path(cfg.run)
    last = 2 if cfg.stage == "all" else int(cfg.stage)
    first = last if cfg.init_from else 0
    for stage in range(first, last + 1):
        asked = cfg.stage == "all" or stage == last
        folder = run / (cfg.name if cfg.name and stage == last else FOLDERS[stage])
        done = parallel.gather((folder / "adapter").exists())[0]  # the writing process's word, for all
        if parallel.rank() == 0 and (asked or not done):
            claim_folder(folder, cfg)
        parallel.barrier()
        if done:
            print(f"{folder.name} is complete: {folder / 'adapter'} (delete the folder to train it again)")
            continue
        if not asked:
            print(f"stage {last} needs {folder / 'adapter'}, which is missing: training it first")
        init = run / FOLDERS[stage - 1] / "adapter" if stage > 0 else None
        init = adapter_folder(cfg.init_from) if cfg.init_from else init
        reference = run / FOLDERS[0] / "adapter"
        if stage > 0 and not reference.exists():
            print(f"{reference} is missing: the KL reference is {init} instead")
            reference = init
        held = lock(folder / ".lock", wait=False) if parallel.rank() == 0 else None  # noqa: F841, freed at exit
        run_stage(cfg, stage, folder, init, reference)
        print(f"{folder.name} is done: {folder / 'adapter'}")


@dataclass
class TrainRun(Config):
    check: bool = False
    """only list what this run needs and lacks; exit code 1 when something is missing [ours]"""


def main() -> None:
    args = parse(TrainRun, __doc__)
    cfg = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    if args.check:
        sys.exit(preflight.preflight(cfg))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    parallel.start(cfg.device)
    try:
        needs = ("data", "base") if cfg.stage == "0" else NAMES
        if parallel.rank() == 0:
            resolve(cfg, needs)  # builds what is missing, once
        parallel.barrier()
        train(cfg)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command goes on from the last checkpoint")
    finally:
        parallel.stop()


if __name__ == "__main__":
    main()
