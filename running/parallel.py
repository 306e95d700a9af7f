"""Data parallelism by hand: each process takes every world-th study, gradients are summed, one process writes.

Launched by `torchrun`; without it there is one process and every function here does nothing. A base too large for one
GPU is spread over all of them by PyTorch's FSDP2 (`shard`): then every process must run the same forward passes.
"""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

UPDATE = timedelta(minutes=30)  # longest wait for another process inside an update: beyond it, that one hangs
ALONE = timedelta(hours=24)  # and at a barrier, where the first process may be building assets or asking a 7B judge
patient = None  # the process group of the barriers


def start(device: str, threads: int = 0) -> None:
    """Join torchrun's process group, if there is one; all processes but the first fall silent on stdout.

    ValueError, one line, for a device that is not there, and for WORLD_SIZE without the rest of torchrun's variables.
    """
    global patient
    if threads:
        torch.set_num_threads(threads)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    try:
        place, world = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        if 0 < gpus <= place:
            raise ValueError(f"process {place} of this machine has no GPU of its own, there are {gpus}")
        if gpus:
            torch.cuda.set_device(place)
        if world > 1:
            dist.init_process_group("nccl" if gpus else "gloo", timeout=UPDATE)
            patient = dist.new_group(backend="gloo", timeout=ALONE)
    except (ValueError, dist.DistError) as error:
        raise ValueError(f"{error} (WORLD_SIZE is {os.environ.get('WORLD_SIZE')}): start by torchrun, a process a GPU; "
                         "for one process alone `unset WORLD_SIZE LOCAL_RANK`") from error  # fmt: skip
    pick_device(device)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


@contextmanager
def script(name: str, interrupted: str = ""):
    """Around a script's `main`: ends it with one line for what its user can mend, and for Ctrl-C, where `interrupted`
    says what then; leaves the process group."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{name}: {error!s:.1500}")
    except torch.OutOfMemoryError as error:
        lower = "Lower the stage's micro_batch or grpo.micro_group; in evaluation, eval.batch_size."
        sys.exit(f"{name}: {str(error).splitlines()[0]} {lower}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted{interrupted and f'; {interrupted}'}")
    finally:
        stop()


def pick_device(device: str) -> torch.device:
    """The device that the config's `device` means: under `auto` this process's GPU, or the CPU where there is none.

    ValueError, one line, for one that torch does not know or cannot use.
    """
    if device == "auto":
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0][:200]}; use --device auto or cpu") from error
    return torch.device(device)


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every process, also while the first one builds or scores alone."""
    if dist.is_initialized():
        dist.barrier(group=patient)


def gather(value) -> list:
    """The same Python object of every process, in rank order, on every process."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def broadcast(make: Callable):
    """What make() gives in the first process, on every process; its ValueError or OSError likewise, so none hangs."""
    try:
        result = [make() if rank() == 0 else None]
    except (ValueError, OSError) as error:
        result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result, group=patient)  # the first process may take hours
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def shard(base) -> None:
    """Keep only 1/world of each decoder layer's weights in a process; a layer is put together while it computes.

    Embeddings, vision tower, output layer and LoRA weights stay whole, so gradients, optimizer and checkpoints are
    those of plain data parallelism. Call before `base.to(device)`: layers go to the GPU one by one.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard  # a second

    language_model = base.model.language_model
    inside = {p for layer in language_model.layers for name, p in layer.named_parameters() if "lora_" not in name}
    whole = set(language_model.parameters()) - inside
    for module in (*language_model.layers, language_model):  # the root fetches the next layer ahead of time
        fully_shard(module, ignored_params=whole)


def optimizer_step(optimizer: torch.optim.Optimizer, max_norm: float, divide_by: float = 1.0) -> float:
    """Sum gradients over the processes in one flat buffer, divide, clip, update; the gradient norm before clipping.

    A process without studies contributes zeros.
    """
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if dist.is_initialized():
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad.copy_(grad.view_as(parameter))
    for parameter in parameters:
        parameter.grad /= divide_by
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
