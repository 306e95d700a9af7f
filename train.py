"""Train VALOR: Stage 0 (SFT), Stage 1 (GRPO on text rewards), Stage 2 (GRPO with the visual reward mixed in); and DPO.

    python train.py --stage all                          # one process
    python train.py --check --config C                   # is everything there that this run needs?
    torchrun --nproc-per-node 2 train.py --stage 2       # a missing Stage 0 or 1 is trained first
    python train.py --stage dpo --dpo.pairs FILE         # beside them: preference pairs, from the SFT policy

Algorithm 1 of the paper, and where each line stands below:

    theta <- SFT (Eq. 2), theta_ref <- theta, k <- 0                                     sft_update, load_stage
    for t in {1, 2}:                                                                     train
        choose what of the model stage t trains                                          load_stage
        for minibatch B of the data:                                                     run_stage
            k <- k + 1
            1.  sample G candidates o_i of pi_theta(. | image, prompt) for each study    grpo_update
            2.  R_text(o_i, g; k) (Eqs. 3-5); in Stage 2 S_i, r_vis, R_vis (Eqs. 6-8)
            3.  A_i <- RankNorm over the group (Eq. 9)
            4.  log-probs of the candidates under pi_ref                                 policy_step
            5.  loss of Eq. 10: clipped ratio to the sampling policy, KL to pi_ref
            6.  gradient step on theta
    return theta
"""

import math
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config, parse
from data import Study, batch_ids, load_studies, read_views
from dpo import dpo_loss
from evidence.generate import generate_split
from evidence.metrics import validation_row
from formats.preferences import Pair, load_pairs, read_pairs
from grpo import group_advantages, grpo_loss
from model import SamplingRules, completion_logps, get_base, load_policy, require_finite, sampling_rules, use_reference
from phantom.assets import resolve
from phantom.oracle import stand_in
from rewards import Scorers, compute_rewards, require_format
from rollout import Rollout, rollout
from running import parallel, preflight
from running.folder import adapter_folder, claim_folder, is_done, load_checkpoint, lock, save_adapter, save_checkpoint
from running.log import Log, Sample, average, group_metrics, shown
from scorers.load import load_scorers, may_judge
from sft import describe_references, encode_pairs, sft_update, text_logps
from vlm.families import encode_images, select_studies
from vlm.fast_linear import fast_linears

FOLDERS = {0: "sft", 1: "stage1", 2: "stage2", "dpo": "dpo"}  # also the names of their settings in the config
HIGH_KL = 0.25  # nats per token; beyond it reward hacking was seen (two IMPRESSION sections in one report)


@dataclass
class MicroBatch:
    """n candidates of b studies, the part of a batch that one forward and backward pass holds."""

    ids: list[str]  # of the b studies
    inputs: dict[str, Tensor]  # their encoded prompts
    completions: Tensor  # (n, T)
    mask: Tensor  # (n, T)
    advantages: Tensor  # (n,)
    share: float  # of the global batch's B * G candidates: weighs the loss, so that any split gives the same gradient
    seen: tuple[Tensor, ...] = ()  # current, old and reference log-probs (n, T) of its last pass, for samples.jsonl


def grpo_update(model, processor, scorers: Scorers, optimizer, batch: list[Study], cfg, *, k, stage, record=False):
    """Policy update k of Algorithm 1; `batch` is this process's share of the studies.

    Returns (the row for metrics.jsonl, with `record` the first study's group for samples.jsonl, else None).
    """
    part, sample, micro_batches = {}, None, []
    if batch:  # fewer studies than processes leave some without
        ids, views, references = [s.id for s in batch], [read_views(s) for s in batch], [s.report for s in batch]
        # 1. sample G candidates of each study from the policy as it is now
        out, texts, inputs = rollout(model, processor, views, ids, cfg, step=k)  # N = B * G rows, texts [B][G]
        # 2. reward each: Eqs. 3-5, in Stage 2 Eqs. 6-8 too
        frontal = [images[0] for images in views]
        rewards, parts = compute_rewards(texts, references, frontal, ids, scorers, cfg.rewards, k=k, stage=stage)
        # 3. what counts is to be better than the other candidates of the same study: Eq. 9
        advantages = group_advantages(rewards, cfg.grpo.advantage)  # (B, G), as rewards
        micro_batches = split_batch(inputs, out, advantages, ids, cfg)
        part, sample = group_metrics(out, rewards, parts), record and Sample(model, processor, batch[0], views[0], cfg)
    # 4. - 6. make the better candidates likelier
    stats, norm = policy_step(model, optimizer, micro_batches, sampling_rules(model, processor, cfg), cfg)
    part |= {name: [s[name] for s in stats] for name in (stats[0] if stats else ())}
    row = average(parallel.gather(part)) | {"grad_norm": norm, "lr": optimizer.param_groups[0]["lr"]}
    if row["kl"] > HIGH_KL and parallel.rank() == 0:
        tqdm.write(f"update {k}: KL {row['kl']:.2f} is above {HIGH_KL}: read samples.jsonl for hacking", sys.stderr)
    return row, sample.row(k, texts[0], rewards, parts, micro_batches) if sample else None


def policy_step(model, optimizer, micro_batches: list[MicroBatch], rules: SamplingRules, cfg: Config):
    """Lines 4-6 of Algorithm 1 on this process's candidates: `grpo.num_iterations` gradient steps on Eq. 10.

    Returns ([statistics of each candidate's pass], gradient norm of the last step before clipping).
    """
    g, stats, norm = cfg.grpo, [], 0.0
    model.train(cfg.model.gradient_checkpointing)  # it acts in train mode only; dropout is off

    # 4. log-probs under the reference policy, once per batch of rollouts
    with torch.no_grad(), use_reference(model), fast_linears(get_base(model)):
        ref_logps = [completion_logps(model, m.inputs, m.completions, m.mask, rules) for m in micro_batches]  # (n, T)
    for m, logps in zip(micro_batches, ref_logps, strict=True):
        require_finite(logps, m.ids, "is the reference's adapter whole?")
    old_logps: list[Tensor] = []
    for iteration in range(g.num_iterations):
        for i, m in enumerate(micro_batches):
            # 5. Eq. 10; the first pass is by the policy that sampled: its log-probs are the old ones, its ratio is 1
            logps = completion_logps(model, m.inputs, m.completions, m.mask, rules)  # (n, T)
            require_finite(logps, m.ids)
            if iteration == 0:
                old_logps.append(logps.detach())
            given = logps, old_logps[i], ref_logps[i], m.advantages, m.mask
            m.seen = logps.detach(), *given[1:3]
            loss, found = grpo_loss(*given, eps_low=g.eps_low, eps_high=g.eps_high, beta=g.beta)
            (loss * m.share).backward()
            stats += [{"loss": loss.item()} | found] * len(logps)
        # 6. gradients are summed over the processes, clipped, and taken one step along
        norm = parallel.optimizer_step(optimizer, g.max_grad_norm)
    return stats, norm


def split_batch(inputs: dict[str, Tensor], out: Rollout, advantages: Tensor, ids: list[str], cfg: Config):
    """[MicroBatch] of B studies and advantages (B, G): grpo.micro_batch studies x grpo.micro_group candidates each."""
    b, group = advantages.shape
    studies, candidates = cfg.grpo.micro_batch, cfg.grpo.micro_group or group
    grid = torch.arange(b * group, device=out.completions.device).view(b, group)  # row b * G + g of `out`
    advantages, parts = advantages.flatten().to(grid.device), []
    for i in range(0, b, studies):
        some = select_studies(inputs, i, min(i + studies, b))
        for j in range(0, group, candidates):
            rows = grid[i : i + studies, j : j + candidates].flatten()  # (n,)
            mask, share = out.completion_mask[rows], len(rows) / (cfg.grpo.batch_size * group)
            parts.append(MicroBatch(ids[i : i + studies], some, out.completions[rows], mask, advantages[rows], share))
    return parts


def dpo_update(model, processor, optimizer, batch: list[Pair], cfg: Config, step: int, steps: int) -> dict[str, float]:
    """One update of DPO; `batch` is this process's share of the pairs. Returns the row for metrics.jsonl.

    Learning rate: 3% warm-up and a cosine to 0 over `steps` updates [MMedPO]; `step` counts from 0.
    """
    lr = cfg.dpo.lr * min(1.0, (step + 1) / max(1.0, 0.03 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    optimizer.param_groups[0]["lr"] = lr
    model.train(cfg.model.gradient_checkpointing)  # as in policy_step
    stats, batch = [], sorted(batch, key=lambda pair: pair.rejected_image is not None)  # those of one image together
    for start in range(0, len(batch), cfg.dpo.micro_batch):
        pairs = batch[start : start + cfg.dpo.micro_batch]
        ids, weights = [pair.id for pair in pairs], torch.tensor([pair.weight for pair in pairs], device=model.device)
        inputs, texts = encode_pairs(model, processor, pairs, cfg)  # text 2b is pair b's chosen one, 2b + 1 the other
        inputs = encode_images(get_base(model), inputs)  # once for both policies
        with torch.no_grad(), use_reference(model):  # not in fast_linears, whose rounding would be a first margin
            ref_logps = text_logps(model, processor, inputs, texts, cfg)[0]  # (2b, T), 0 behind a report's EOS
        require_finite(ref_logps, ids, "is the reference's adapter whole?")
        logps = text_logps(model, processor, inputs, texts, cfg)[0]  # (2b, T)
        require_finite(logps, ids)
        sums = [side for x in (logps, ref_logps) for side in x.sum(dim=1).view(-1, 2).unbind(dim=1)]  # four of (b,)
        loss, found = dpo_loss(*sums, beta=cfg.dpo.beta, weights=weights)
        (loss * len(pairs)).backward()  # the sum: divided by the global number of pairs below
        stats += [{"loss": loss.item()} | found] * len(pairs)
    norm = parallel.optimizer_step(optimizer, cfg.dpo.max_grad_norm, divide_by=sum(parallel.gather(len(batch))))
    part = {name: [s[name] for s in stats] for name in (stats[0] if stats else ())}
    return average(parallel.gather(part)) | {"grad_norm": norm, "lr": lr}


FROM_TEXTS = {0: sft_update, "dpo": dpo_update}  # stages on given reports; the others sample their own


def stage_settings(cfg: Config, stage: int | str):
    """The table of a stage's batch size and learning rate."""
    return {0: cfg.sft, "dpo": cfg.dpo}.get(stage, cfg.grpo)


def load_stage(cfg: Config, stage: int | str, init: Path | None, reference: Path | None):
    """(model, processor, scorers or None, optimizer) of a stage that starts from adapter `init`; None: a new one."""
    torch.manual_seed(cfg.seed)
    trainable, scorers = getattr(cfg, FOLDERS[stage]).trainable, None
    model, processor = load_policy(cfg, init, new_lora=init is None, trainable=trainable, reference=reference)
    if stage not in FROM_TEXTS:
        visual = stage == 2 and cfg.rewards.lambda_vis > 0
        scorers = load_scorers(cfg, model.device, with_expert=visual and cfg.scorers.expert != "oracle")
        if visual:
            scorers.similarity = stand_in(cfg, scorers.similarity)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage_settings(cfg, stage).lr, weight_decay=0.0)
    return model, processor, scorers, optimizer


def load_batches(cfg: Config, stage: int | str) -> list[Study] | list[Pair]:
    """What a stage's batches are drawn from: the studies of its split, or for DPO the pairs of these."""
    studies = load_studies(cfg.data, cfg.data.sft_split if stage == 0 else cfg.data.rl_split)
    if cfg.stage not in ("0", "dpo") and cfg.rewards.lambda_format:  # also before the Stage 0 of a longer run
        require_format([study.report for study in studies], cfg.rewards.required_sections)
    return load_pairs(cfg.dpo.pairs, studies, cfg.dpo.weighted, cfg.dpo.kinds) if stage == "dpo" else studies


def run_stage(cfg: Config, stage: int | str, folder: Path, init: Path | None, reference: Path | None) -> None:
    """Train one stage from adapter `init` and save `folder/adapter`; goes on from a checkpoint where there is one."""
    rank, world, cfg = parallel.rank(), parallel.world(), resolve(cfg, needs=())
    if reference:
        print(f"starting from {init}; the {'margin' if stage == 'dpo' else 'KL'} is taken to {reference}")
    studies = load_batches(cfg, stage)
    held_out = load_studies(cfg.data, cfg.data.val_split)[: cfg.eval.val_studies] if cfg.val_every else []
    stage_cfg, batch_size = getattr(cfg, FOLDERS[stage]), stage_settings(cfg, stage).batch_size
    if cfg.fsdp and batch_size % world:
        raise ValueError(f"fsdp: the batch of {batch_size} studies must be a multiple of the {world} processes")
    steps = stage_cfg.steps or max(1, round(stage_cfg.epochs * len(studies) / batch_size))
    model, processor, scorers, optimizer = load_stage(cfg, stage, init, reference)
    if stage in FROM_TEXTS:
        print("".join(f"{line}\n" for line in describe_references(model, processor, studies, cfg)), end="")
    k0, done = load_checkpoint(folder, model, optimizer, stage, steps, init)  # k counts over both RL stages
    log = Log(folder, k0, done, active=rank == 0)
    bar = tqdm(range(done, steps), folder.name.ljust(18), steps, initial=done, disable=rank > 0)
    for step in bar:
        k, began = k0 + step + 1, time.perf_counter()
        order = batch_ids(len(studies), batch_size, cfg.seed, k - 1)  # Stage 2 reads on where Stage 1 stopped
        batch = [studies[i] for i in order[rank::world]]
        if stage in FROM_TEXTS:
            row, sample = FROM_TEXTS[stage](model, processor, optimizer, batch, cfg, step, steps), None
        else:
            left = 1 - step / steps if cfg.grpo.lr_scheduler_type == "linear" else 1
            optimizer.param_groups[0]["lr"] = cfg.grpo.lr * left
            record = step % cfg.sample_every == 0 and (rank == 0 or cfg.fsdp)  # a spread base needs all processes
            row, sample = grpo_update(model, processor, scorers, optimizer, batch, cfg, k=k, stage=stage, record=record)
        if not math.isfinite(row["grad_norm"]):  # the weights are lost: keep the checkpoint before them
            raise ValueError(f"{folder.name}: the gradient of update {step + 1} is not finite: lower the learning rate")
        row["seconds"] = time.perf_counter() - began
        if held_out and (step + 1) % cfg.val_every == 0:
            outputs = generate_split(model.eval(), processor, held_out, cfg)
            row |= validation_row(outputs, held_out, cfg)
        log.write(k, row, sample)
        bar.set_postfix(shown(row), refresh=False)  # drawn with the bar, so that a log file is not flooded
        if (step + 1) % cfg.save_every == 0 and rank == 0:
            save_checkpoint(folder, model, optimizer, stage, k, step + 1)
    log.close()
    if rank == 0:
        save_adapter(folder, model, {"stage": stage, "k": k0 + steps if stage else 0, "seed": cfg.seed})
    parallel.barrier()


def train(cfg: Config) -> None:
    """Run the stages that `cfg.stage` asks for, the missing ones before them first."""
    run, last = Path(cfg.run), {"all": 2, "dpo": "dpo"}.get(cfg.stage) or int(cfg.stage)
    plan = [0, "dpo"] if last == "dpo" else [*range(last + 1)]
    if cfg.init_from and cfg.stage == "all":
        raise ValueError("init_from starts one stage from an adapter: say which by --stage 0, 1 or 2, or dpo")
    if cfg.name in {"base", "eval", "images", *FOLDERS.values()} - {FOLDERS[last]}:
        raise ValueError(f"--name {cfg.name}: in a run this is the name of something else; choose another")
    foreign = may_judge(cfg, last == 2 and cfg.rewards.lambda_vis > 0) if last not in FROM_TEXTS else []
    if foreign:
        raise ValueError(f"the phantom's scorers know nothing of {cfg.data.path}: name others by {', '.join(foreign)}")
    if parallel.rank() == 0:
        resolve(cfg, needed_assets(cfg))  # builds what is missing, once
    parallel.barrier()
    for stage in plan[-1:] if cfg.init_from else plan:
        asked = cfg.stage == "all" or stage == last
        folder = run / (cfg.name if cfg.name and stage == last else FOLDERS[stage])
        done = held = None
        if parallel.rank() == 0:
            done = is_done(folder)
            if not done:
                held = lock(folder / ".lock", wait=False)  # freed at the end of the stage or of the process
                done = is_done(folder)  # another process may have finished it just now
            if asked or not done:
                claim_folder(folder, cfg)
        if parallel.gather(done)[0]:  # the writing process's word, for all
            print(f"{folder.name} is complete: {folder / 'adapter'} (delete the folder to train it again)")
            continue
        if not asked:
            print(f"stage {last} needs {folder / 'adapter'}, which is missing: training it first")
        if last == "dpo":
            read_pairs(cfg.dpo.pairs)  # a fault in them is said before a long Stage 0
        before = FOLDERS[plan[plan.index(stage) - 1]]
        init = adapter_folder(cfg.init_from or str(run / before)) if cfg.init_from or stage else None
        reference = adapter_folder(cfg.reference) if cfg.reference else run / FOLDERS[0] / "adapter"
        if stage and not reference.exists():
            raise ValueError(f"no {reference}: name {init}'s SFT policy by --reference, for the KL")
        run_stage(cfg, stage, folder, init, reference if stage else None)
        del held
        print(f"{folder.name} is done: {folder / 'adapter'}")


def needed_assets(cfg: Config) -> tuple[str, ...]:
    """The phantom's assets that the stages of this run read (phantom/assets.py)."""
    expert = ("expert",) if cfg.stage in ("2", "all") and cfg.rewards.lambda_vis > 0 else ()
    return ("data", "base") if cfg.stage in ("0", "dpo") else ("data", "base", "labeller", *expert)


@dataclass
class TrainRun(Config):
    check: bool = False  # only list what this run needs and lacks; exit code 1 when something is missing [ours]


@parallel.script("train.py", "the same command goes on from the last checkpoint")
def main() -> None:
    args = parse(TrainRun, __doc__)
    cfg = Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
    if args.check:
        sys.exit(preflight.preflight(cfg))
    parallel.start(cfg.device, cfg.threads)
    train(cfg)


if __name__ == "__main__":
    main()
