"""A run on several of torchrun's processes: each with the whole model, or with --shard each with a part."""
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from machine import Machine
from magicvideo import Block


def parallel(model: nn.Module, machine: Machine, shard: bool) -> nn.Module:
    """What the training loop calls: the model, whose gradients are those of all processes."""
    if machine.world == 1 or shard:  # what is sharded sees to that itself
        return model
    return DistributedDataParallel(model)


def split(networks: list[nn.Module]) -> None:
    """Leaves each process its part of the networks' weights, by PyTorch's fully_shard: a block has its whole
    weights only while it runs.
    """
    from torch.distributed.fsdp import fully_shard  # it takes a second, and few need it

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of outputs that are changed in place: none is
    for network in networks:
        network.to(memory_format=torch.contiguous_format)  # it takes no other
        for part in network.modules():
            if isinstance(part, Block):
                fully_shard(part, reshard_after_forward=True)
        fully_shard(network, reshard_after_forward=True)


def split_optimizer(new: torch.optim.Optimizer, whole: torch.optim.Optimizer) -> None:
    """Fills new, the optimizer of split weights, with its part of the state of whole."""
    from torch.distributed.tensor import distribute_tensor

    pairs = zip(whole.param_groups[0]["params"], new.param_groups[0]["params"])
    for before, parameter in pairs:
        state = {}
        for name, value in whole.state[before].items():
            if value.shape:
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            state[name] = value
        new.state[parameter] = state


def gathered(content: Any) -> Any:
    """The same, with whole tensors where --shard left each process a part; all of them must ask."""
    if isinstance(content, dict):
        return {name: gathered(value) for name, value in content.items()}
    if hasattr(content, "full_tensor"):
        return content.full_tensor().cpu()
    return content
