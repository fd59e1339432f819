"""All that training changes, and how it goes into checkpoints and comes back.

There is no random state to save. Everything random in micro-batch i, data, times, noise and dropout, depends
on (--seed, i) alone, so that weights, the optimizer's state and the step make a resumed run the whole one.
"""
import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import config
from autoencoder import Autoencoder, Pixels, frozen
from data import batches
from machine import Machine
from magicvideo import build_network
from optimizer import make_optimizer
from presets import SAMPLING
from settings import Settings, TrainConfig, read_run
from shard import gathered, part, split


@dataclass
class State:
    """All that training changes; and the coder whose latents are diffused, which stays as it is."""
    model: nn.Module
    ema: nn.Module  # with averaged weights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    coder: Autoencoder | Pixels
    step: int = 0


def new_state(s: Settings, device: torch.device) -> State:
    """Network, averaged network and optimizer, at step 0 or where --resume left them."""
    torch.manual_seed(s.train.seed)
    if s.train.arch == "autoencoder":
        model = Autoencoder(s.autoencoder)
    else:
        model = build_network(s.train.arch, s.network)
    if s.train.init and not s.train.resume:
        with weights_of("init", s) as content:
            model.load_state_dict(content["ema"])
    if s.train.shard:  # it goes to the device part by part: the whole need not fit there
        model = model.to(memory_format=torch.channels_last)
    else:
        model = model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    if s.train.shard:
        split([model, ema])
    optimizer = make_optimizer(s.train.optimizer, model, s.train.lr, s.train.beta2, s.train.weight_decay)
    precision = Machine(device, s.train.precision).chosen()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # or small gradients would be 0
    state = State(model, ema, optimizer, scaler, Pixels())
    if s.train.resume:
        with weights_of("resume", s) as content:
            restore(state, content)
            if s.train.latent:
                state.coder = frozen(s.autoencoder, content["autoencoder"], device)
    elif s.train.latent:
        state.coder = new_coder(s, device)
    return state


def new_coder(s: Settings, device: torch.device) -> Autoencoder:
    """The autoencoder that --latent names, scaled so that latents of the data have unit variance."""
    with weights_of("latent", s) as content:
        coder = frozen(s.autoencoder, content["ema"], device)
    clips, _ = next(batches(replace(s.data, num_images=0), 64, s.train.seed))
    coder.measure(clips.to(device))
    return coder


@contextlib.contextmanager
def weights_of(flag: str, s: Settings) -> Iterator[dict[str, Any]]:
    """What the checkpoint of a flag holds, to be loaded; weights that do not fit are one ValueError."""
    path, content, _ = read_run(flag, getattr(s.train, flag))
    try:
        yield content
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        if config.out_of_memory(error):
            raise
        word = "resume" if s.train.resume else "start"
        reason = s.changes() or "no flag explains it"
        raise ValueError(f"--{flag} {path} holds another network: {reason}; {word} without flags that "
                         "change it") from None


def restore(state: State, content: dict[str, Any]) -> None:
    """Puts a checkpoint's content into state, whatever each process holds of it, beside the parameters."""
    for network, weights in ((state.model, content["model"]), (state.ema, content["ema"])):
        now = network.state_dict()
        network.load_state_dict({name: part(value, now[name]) for name, value in weights.items()})
    parameters = list(state.model.parameters())
    for index, values in content["optimizer"]["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if value.shape:  # fused Adam reads it in the parameter's order in memory, which --shard changes
                kept = torch.empty_like(parameter).copy_(part(value, parameter))
            else:
                kept = value.to(parameter.device, copy=True)
            state.optimizer.state[parameter][name] = kept
    if content.get("scaler"):
        state.scaler.load_state_dict(content["scaler"])
    state.step = int(content["step"])


def path_of(state: State, s: Settings) -> Path:
    """Where the checkpoint of a state is."""
    return Path(s.train.out) / f"checkpoint_{state.step:08d}.pt"


def save_state(state: State, s: Settings, machine: Machine) -> None:
    """Writes a checkpoint into the run's folder and keeps the newest --keep. All processes must ask; the first
    one writes.
    """
    content = {"settings": s.flat(), "step": state.step, "sampling": SAMPLING[s.train.preset],
               "model": state.model.state_dict(), "ema": state.ema.state_dict(),
               "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
    if s.train.latent:
        content["autoencoder"] = state.coder.state_dict()
    content = gathered(content, machine.rank == 0)
    path = path_of(state, s)
    if machine.rank == 0:
        checkpoint.save(path, content)
        for old in sorted(path.parent.glob(checkpoint.NAMES))[:-s.train.keep]:
            old.unlink()
