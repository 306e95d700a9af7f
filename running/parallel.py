"""Data parallelism by hand: each process takes every world-th study, gradients are summed, one process writes.

Launched by `torchrun`; without it there is one process and every function here does nothing. A base too large for one
GPU is spread over all of them by PyTorch's FSDP2 (`shard`): then every process must run the same forward passes.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

UPDATE = timedelta(minutes=30)  # longest wait for another process inside an update: beyond it, that one hangs
ALONE = timedelta(hours=24)  # and at a barrier, where the first process may be building assets or asking a 7B judge
patient = None  # the process group of the barriers


def start(device: str, threads: int = 0) -> None:
    """Join torchrun's process group, if there is one; all processes but the first fall silent on stdout."""
    if threads:
        torch.set_num_threads(threads)
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=UPDATE)
        global patient
        patient = dist.new_group(backend="gloo", timeout=ALONE)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


def pick_device(device: str) -> torch.device:
    """The device that the config's `device` means: under `auto` this process's GPU, or the CPU where there is none."""
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device}: torch sees no GPU; use --device cpu")
        return torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(make: Callable):
    """What make() gives in the first process, on every process; its ValueError or OSError likewise, so none hangs."""
    result = None
    if rank() == 0:
        try:
            result = make()
        except (ValueError, OSError) as error:
            result = error
    if dist.is_initialized():
        shared = [result]
        dist.broadcast_object_list(shared, group=patient)  # the first process may take hours
        result = shared[0]
    if isinstance(result, Exception):
        raise result
    return result


def shard(base) -> None:
    """Keep only 1/world of each decoder layer's weights in a process; a layer is put together while it computes.

    LoRA weights stay whole everywhere, as they are small and train: gradients, optimizer and checkpoints are those of
    plain data parallelism. Embeddings, vision tower and the output layer stay whole too. Call before `base.to(device)`:
    layers go to the GPU one by one.
    """
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard

    language_model = base.model.language_model
    inside = {p for layer in language_model.layers for name, p in layer.named_parameters() if "lora_" not in name}
    whole = set(language_model.parameters()) - inside
    for layer in language_model.layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(language_model, ignored_params=whole)  # the root, which fetches the next layer ahead of time


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum gradients over the processes in one flat buffer. A process without studies contributes zeros."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not dist.is_initialized():
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(grad.view_as(parameter))


def optimizer_step(optimizer: torch.optim.Optimizer, max_norm: float, divide_by: float = 1.0) -> float:
    """Sum gradients over the processes, divide, clip, update. Returns the gradient norm before clipping."""
    parameters = optimizer.param_groups[0]["params"]
    sum_gradients(parameters)
    for parameter in parameters:
        parameter.grad /= divide_by
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
