"""Training (section 2, and 4.3.1's joint video-image batches): python train.py --dataset moving_mnist.

Everything random in micro-batch i, data, times, noise and dropout, depends on (--seed, i) alone. So N
processes with torchrun are one process with N times the --accumulate, and a resumed run is the whole one.
"""
import contextlib
import dataclasses
import json
import math
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import autoencoder
import checkpoint
import config
import cost
from data import batches
from diffusion import denoiser, loss, noise_like, schedule
from files import save_video
from machine import Machine, start, stop_signals
from magicvideo import between
from sampling import dpm_solver
from run import Settings, State, TrainConfig, build, forget_log, gathered, log, save, settings
from text import TextConfig, embed


def lr_factor(train: TrainConfig, step: int) -> float:
    """The learning rate of a step over --lr: linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / max(1, train.warmup))
    if train.decay == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / train.steps)))


def micro_batch_loss(network: nn.Module, batch: tuple, index: int, s: Settings, machine: Machine) -> Tensor:
    """The mean loss of micro-batch number index: video and image frames with their captions, some dropped."""
    x, captions = batch
    torch.manual_seed(s.train.seed << 32 | index)
    if s.train.arch == "autoencoder":
        with machine.autocast():
            return autoencoder.loss(network, x, s.autoencoder, s.data.num_images)
    cond = condition(captions, s.text, x.device)
    if cond is not None:
        kept = torch.rand(cond.shape[:2]) >= s.train.cond_dropout
        cond = cond * kept[..., None, None].to(x.device)
    call = between(network, x, s.diffusion) if s.unet.keys else network
    with machine.autocast():
        return loss(call, x, s.diffusion, cond, s.data.num_images).mean()


def condition(captions: list[list[str]], text: TextConfig, device: torch.device) -> Tensor | None:
    """Embeddings (B, 1 + num_images, tokens, cond_dim) of nested captions; None without a condition."""
    if not text.cond_dim:
        return None
    cond = embed([caption for clip in captions for caption in clip], text)
    return cond.to(device).unflatten(0, (len(captions), -1))


def train_step(network: nn.Module, state: State, stream: Iterator, s: Settings,
               machine: Machine) -> tuple[Tensor, Tensor]:
    """One optimizer step over --accumulate micro-batches. Returns the mean loss and the gradient's norm.

    A gradient that is not finite is not applied, and the step does not count.
    """
    total = torch.zeros((), device=machine.device)
    for part in range(s.train.accumulate):
        index = (state.step * s.train.accumulate + part) * machine.world + machine.rank
        waits = part < s.train.accumulate - 1 and hasattr(network, "no_sync")
        with network.no_sync() if waits else contextlib.nullcontext():
            part_loss = micro_batch_loss(network, next(stream), index, s, machine) / s.train.accumulate
            part_loss.backward()
        total += part_loss.detach()
    norm = gathered(nn.utils.clip_grad_norm_(state.model.parameters(), s.train.clip))
    if torch.isfinite(norm):
        for group in state.optimizer.param_groups:
            group["lr"] = s.train.lr * lr_factor(s.train, state.step)
        state.optimizer.step()
        state.ema.update_parameters(state.model)
        state.step += 1
    state.optimizer.zero_grad()
    return total, norm


def fit(s: Settings, machine: Machine) -> None:
    """The training loop: steps, metrics, previews and checkpoints, until --steps or a signal to stop."""
    state, stop = build(s, machine.device), stop_signals()
    if machine.rank == 0:
        forget_log(Path(s.train.out), state.step)
    network = torch.compile(state.model) if s.train.compile else state.model
    network = DistributedDataParallel(network) if machine.world > 1 and not s.train.shard else network
    b, first = s.train.batch_size, state.step * s.train.accumulate * machine.world + machine.rank
    auto = machine.cores() // 2 or 1 if s.data.dataset == "video_folder" else 0
    workers = auto if s.train.workers < 0 else s.train.workers
    stream = clean(batches(s.data, b, s.train.seed, first, machine.world, machine.device, workers), state)
    clips, norm = b * s.train.accumulate * machine.world, torch.zeros(())
    with tqdm(total=s.train.steps * clips, initial=state.step * clips, unit=" clips", smoothing=0.05,
              disable=machine.rank > 0) as bar, contextlib.closing(stream):  # or its workers would stay
        losses, begun = [], time.time()
        while state.step < s.train.steps and not machine.any(bool(stop)):
            value, norm = train_step(network, state, stream, s, machine)
            if not torch.isfinite(norm):
                break
            losses.append(value)
            bar.update(clips)
            if state.step % s.train.log_every == 0:
                value = machine.mean(torch.stack(losses).mean())
                bar.set_postfix(step=state.step, loss=f"{value:.4f}")
                if machine.rank == 0:
                    log(Path(s.train.out), {
                        "step": state.step, "loss": value, "grad_norm": norm.item(),
                        "lr": state.optimizer.param_groups[0]["lr"],
                        "clips_per_second": clips * len(losses) / (time.time() - begun)})
                losses, begun = [], time.time()
            if machine.rank == 0 or s.train.shard:
                keep(state, s, machine)
    if machine.rank == 0 or s.train.shard:
        finish(state, s, stop, norm, machine)


def clean(stream: Iterator, state: State) -> Iterator:
    """The stream as the network knows it: with --latent, of the latents of its clean frames."""
    coder = state.autoencoder
    return ((coder.latents(x), captions) for x, captions in stream) if coder else stream


def keep(state: State, s: Settings, machine: Machine) -> None:
    """Writes the checkpoint and the preview that are due after this step."""
    if state.step % s.train.save_every == 0:
        save(state, s, machine)
    every = s.train.preview_every
    if state.step % every == 0 or state.step in (30, 200) and every > 30:  # early ones, to see that it works
        preview(state, s, machine)


@torch.no_grad()
def preview(state: State, s: Settings, machine: Machine) -> None:
    """Writes samples/step_<step>.gif (.webp, .png): EMA weights, captions of the data, 25 calls.

    An autoencoder shows four clips and then their reconstructions.
    """
    data = dataclasses.replace(s.data, num_images=0)
    x, captions = next(clean(batches(data, 4, s.train.seed, device=machine.device), state))
    model = state.ema.module.eval()
    with machine.autocast():
        video = (torch.cat([x, model.video(model.latents(x))]) if s.train.arch == "autoencoder"
                 else draw(state, x, captions, s))
    if machine.rank == 0:
        save_video(video, Path(s.train.out) / "samples" / f"step_{state.step:08d}")


def draw(state: State, x: Tensor, captions: list[list[str]], s: Settings) -> Tensor:
    """A video for each caption, of the size that x has, or that the autoencoder gives its latents."""
    z = noise_like(x, torch.Generator().manual_seed(s.train.seed))  # always the same
    logsnrs = schedule(torch.linspace(1, 0, 26), s.diffusion).to(x.device)
    network = between(state.ema.module, x, s.diffusion) if s.unet.keys else state.ema.module
    denoise = denoiser(network, s.diffusion, condition(captions, s.text, x.device))
    if state.autoencoder:  # latents have no bounds
        return state.autoencoder.video(dpm_solver(denoise, z, logsnrs))
    return dpm_solver(lambda z, logsnr: denoise(z, logsnr).clamp(-1, 1), z, logsnrs)


def finish(state: State, s: Settings, stop: list[int], norm: Tensor, machine: Machine) -> None:
    """Saves and says how to go on; exits with 128 + a signal, raises ValueError if norm is not finite."""
    path = save(state, s, machine)
    if machine.rank > 0:
        return
    go_on = f"python train.py --resume {shlex.quote(s.train.out)}"
    if not torch.isfinite(norm):
        raise ValueError(f"the gradient of step {state.step + 1} is not finite and was not applied; step "
                         f"{state.step} is saved: {go_on} with a lower --lr or --precision float32")
    if state.step < s.train.steps:
        print(f"stopped at step {state.step}; to go on: {go_on}")
        raise SystemExit(128 + (stop or [signal.SIGTERM])[0])  # the signal may have reached another process
    out, use = shlex.quote(s.train.out), "train.py --latent" if s.train.arch == "autoencoder" else (
        "sample.py --mode key_frames --checkpoint" if s.unet.keys else "sample.py --checkpoint")
    print(f"done: in {out} are samples/, metrics.jsonl and {path.name}\nto use it: python {use} {out}")


@contextlib.contextmanager
def prepare(s: Settings, machine: Machine) -> Iterator[None]:
    """Names, makes and locks the run's folder and says on what it trains.

    Raises ValueError or OSError, before anything is written, for a folder with another run, one that another
    process is using or that cannot be written to, and for unusable data.
    """
    s.train.out = s.train.out or f"runs/{s.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, resumed = Path(s.train.out), Path(s.train.resume)
    if s.train.shard and machine.world == 1:
        raise ValueError("--shard splits a model over processes, and there is one: start several with torchrun")
    if machine.rank == 0:
        next(batches(s.data, 1, s.train.seed))  # unusable data end here, before there is a folder
    machine.any(False)  # all others wait for what the first notes down of the clips
    if machine.rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.locked(folder):
        if any(folder.glob("checkpoint_*.pt")) and not (s.train.resume and folder.samefile(resumed)):
            raise ValueError(f"{folder} holds a run already: --resume {folder}, or give another --out")
        with checkpoint.replacing(folder / "config.json") as file:
            file.write_text(json.dumps(s.flat(), indent=1))
        announce(s, machine)
        yield


def announce(s: Settings, machine: Machine) -> None:
    """Prints what is trained, on what, and what differs from the run that is resumed."""
    fits = s.train.preset == ("cuda" if machine.device.type == "cuda" else "cpu")
    clips = s.train.batch_size * s.train.accumulate * machine.world
    reason = "as resumed" if s.train.resume else "it fits this hardware" if fits else "as given"
    print(f"preset {s.train.preset} ({reason}) on {machine}, {clips} clips a step, into {s.train.out}")
    if s.train.resume and s.changes():
        print(f"other settings than before: {s.changes()}")


def main() -> None:
    """Trains, as the flags say."""
    s = settings()
    if s.train.dry_run:
        images, tokens = s.data.num_images, s.text.tokens
        parameters, flops = cost.step_cost(s.network, s.diffusion, images, tokens, s.train.arch)
        print(cost.table_row(s.train.preset, parameters, flops, s.train.batch_size * s.train.accumulate))
        return
    machine = start(s.train.device, s.train.precision, s.train.threads)
    try:
        with prepare(s, machine):
            fit(s, machine)
    except (RuntimeError, ConnectionError) as error:
        reader = "DataLoader worker" in str(error) or isinstance(error, ConnectionError)
        if not reader and not machine.lost(error):
            raise
        lost = "a process that reads clips, perhaps for want of memory" if reader else "another one"
        raise ValueError(f"process {machine.rank} of {machine.world} lost {lost}; start all of them "
                         f"again with --resume {shlex.quote(s.train.out)}") from None
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main)
