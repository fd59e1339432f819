"""A run on several of torchrun's processes: each with the whole model, or with --shard each with a part."""
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from machine import Machine
from unet3d import Block


def parallel(model: nn.Module, machine: Machine, shard: bool) -> nn.Module:
    """What the training loop calls: the model, whose gradients are those of all processes."""
    if machine.world == 1 or shard:  # what is sharded sees to that itself
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def split(networks: list[nn.Module]) -> None:
    """Leaves each process its part of the networks' weights, by PyTorch's fully_shard: a block has its whole
    weights only while it runs.
    """
    from torch.distributed.fsdp import fully_shard  # it takes a second, and few need it

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of outputs that are changed in place: none is
    for network in networks:
        network.to(memory_format=torch.contiguous_format)  # it takes no other
        for module in network.modules():
            if isinstance(module, Block):
                fully_shard(module, reshard_after_forward=True)
        fully_shard(network, reshard_after_forward=True)


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of whole that like is of its own, on its device, where like is split; else whole."""
    if not hasattr(like, "placements"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # each has read it


def gathered(content: Any, keep: bool = True) -> Any:
    """The same, with whole tensors where --shard left each process a part; all of them must ask. A process
    that does not keep them has memory for one at a time.
    """
    if isinstance(content, dict):
        return {name: gathered(value, keep) for name, value in content.items()}
    if not hasattr(content, "full_tensor"):
        return content
    whole = content.full_tensor()
    return whole.cpu() if keep else None
