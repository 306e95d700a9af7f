"""Data parallelism by hand: each process takes every world-th study, gradients are summed, one process writes.

Launched by `torchrun`; without it there is one process and every function here does nothing. A base too large for one
GPU is spread over all of them by PyTorch's FSDP2 (`shard`): then every process must run the same forward passes.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start(device: str) -> None:
    """Join torchrun's process group, if there is one; all processes but the first fall silent on stdout."""
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if use_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # the first process builds assets and validates alone, for longer than torch's limit of 10 or 30 minutes
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(hours=24))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")


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
    """Wait for every process."""
    if dist.is_initialized():
        dist.barrier()


def gather(value) -> list:
    """The same Python object of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """Whether `flag` holds on at least one process."""
    return any(gather(flag))


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
