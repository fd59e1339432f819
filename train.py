"""Training (section 2, and 4.3.1's joint video-image batches): python train.py --dataset moving_mnist.

Everything random in micro-batch i, data, times, noise and dropout, depends on (--seed, i) alone. So N
processes with torchrun are one process with N times the --accumulate, and a resumed run is the whole one.
"""
import contextlib
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import autoencoder
import checkpoint
import config
from clips import holds
from data import batches
from diffusion import loss
from machine import Machine, start, stop_signals
from optimizer import ema_update, lr_factor
from progress import log, plot_loss, preview
from settings import Settings, read_settings, suitable_preset
from shard import gathered, parallel
from state import State, new_state, path_of, save_state
from text import condition

# ---- one step --------------------------------------------------------------------------------------------


def micro_batch_loss(network: nn.Module, batch: tuple, index: int, s: Settings, machine: Machine) -> Tensor:
    """The mean loss of micro-batch number index: video and image frames with their captions, some dropped."""
    x, captions = batch
    # PyTorch takes 32 bits of a seed. The factor sends the micro-batches of another seed far away
    torch.manual_seed((s.train.seed * 2_654_435_761 + index) % 2**32)
    if s.train.arch == "autoencoder":
        with machine.autocast():
            return autoencoder.loss(network, x, s.autoencoder)
    cond = condition(captions, s.text, torch.device("cpu"))
    if cond is not None:
        kept = torch.rand(cond.shape[:2]) >= s.train.cond_dropout
        cond = cond * kept[..., None, None]
        cond = cond.to(x.device, non_blocking=x.is_cuda)
    with machine.autocast():
        return loss(network, x, s.diffusion, cond, s.data.num_images).mean()


def number(step: int, part: int, s: Settings, machine: Machine) -> int:
    """Of a step's micro-batch on this process: no other one has it."""
    return (step * s.train.accumulate + part) * machine.world + machine.rank


def train_step(network: nn.Module, state: State, stream: Iterator, s: Settings,
               machine: Machine) -> tuple[Tensor, float]:
    """One optimizer step over --accumulate micro-batches. Returns the mean loss and the gradient's norm.

    A gradient that is not finite is not applied. In fp16 the step counts all the same, and from then on the
    loss is scaled less.
    """
    total = torch.zeros((), device=machine.device)
    for part in range(s.train.accumulate):
        x, captions = next(stream)
        batch = state.coder.latents(x), captions
        index = number(state.step, part, s, machine)
        # with torchrun, gradients are exchanged once, after the last micro-batch; with --shard after each
        waits = part < s.train.accumulate - 1 and hasattr(network, "no_sync")
        with network.no_sync() if waits else contextlib.nullcontext():
            part_loss = micro_batch_loss(network, batch, index, s, machine) / s.train.accumulate
            state.scaler.scale(part_loss).backward()
        total += part_loss.detach()
    state.scaler.unscale_(state.optimizer)
    norm = gathered(nn.utils.clip_grad_norm_(state.model.parameters(), s.train.clip))
    norm = norm.item()  # the one wait for a GPU
    if math.isfinite(norm):
        factor = lr_factor(state.step, s.train.warmup, s.train.decay, s.train.steps)
        for group in state.optimizer.param_groups:
            group["lr"] = s.train.lr * factor
        state.optimizer.step()
        ema_update(state.ema, state.model, state.step, s.train.ema)
    if math.isfinite(norm) or state.scaler.is_enabled():
        state.step += 1
    state.scaler.update()
    state.optimizer.zero_grad()
    return total, norm


# ---- all steps -------------------------------------------------------------------------------------------


def fit(s: Settings, machine: Machine) -> None:
    """The training loop: steps, metrics, previews and checkpoints, until --steps or a signal to stop."""
    state, stop = new_state(s, machine.device), stop_signals()
    if machine.rank == 0:  # only now it is known that these settings can go on
        with checkpoint.replacing(Path(s.train.out) / "config.json") as file:
            file.write_text(json.dumps(s.flat() | {"processes": machine.world}, indent=1))
    network = parallel(state.model, machine, s.train.shard)
    if s.train.compile:  # last, so that it cuts the graph where processes exchange gradients
        network = torch.compile(network)
    first = number(state.step, 0, s, machine)
    stream = batches(s.data, s.train.batch_size, s.train.seed, first, machine.world, machine.device,
                     readers(s, machine))
    clips = s.train.batch_size * s.train.accumulate * machine.world
    allowed = 50 if state.scaler.is_enabled() else 1  # gradients in a row that are not finite
    failed, skipped, losses, begun = 0, 0, [], time.time()
    bar = tqdm(total=s.train.steps * clips, initial=state.step * clips, unit=" clips", smoothing=0.05,
               disable=machine.rank > 0)
    with bar, contextlib.closing(stream):  # or the stream's workers would stay
        while state.step < s.train.steps and not machine.any(bool(stop)):
            value, norm = train_step(network, state, stream, s, machine)
            if math.isfinite(norm):
                failed = 0
            else:
                failed += 1
                skipped += 1
            if failed == allowed:
                break
            losses.append(value)
            bar.update(clips)
            if state.step % s.train.log_every == 0:
                value = machine.mean(torch.stack(losses).mean())
                bar.set_postfix(step=state.step, loss=f"{value:.4f}")
                if machine.rank == 0:
                    log(Path(s.train.out), {
                        "step": state.step, "loss": value, "grad_norm": norm, "skipped": skipped,
                        "lr": state.optimizer.param_groups[0]["lr"],
                        "clips_per_second": clips * len(losses) / (time.time() - begun)})
                skipped, losses, begun = 0, [], time.time()
            write_due(state, s, machine)
    finish(state, s, stop, failed == allowed, machine)


def readers(s: Settings, machine: Machine) -> int:
    """How many more processes read clips ahead: --workers, or for films half of the cores, and one that makes
    digits while a GPU works.
    """
    if s.train.workers >= 0:
        return s.train.workers
    if s.data.dataset != "video_folder":
        return int(machine.device.type == "cuda")
    return max(1, machine.cores() // 2)


def write_due(state: State, s: Settings, machine: Machine) -> None:
    """Writes the checkpoint and the preview that are due after this step."""
    if state.step % s.train.save_every == 0:
        save_state(state, s, machine)
    every = s.train.preview_every
    early = every > 30 and state.step in (30, 200)  # to see that it works
    if state.step % every == 0 or early:
        preview(state, s, machine)


def finish(state: State, s: Settings, stop: list[int], failed: bool, machine: Machine) -> None:
    """Saves and says how to go on; exits with 128 + a signal, raises ValueError if training failed."""
    if state.step == 0 or state.step % s.train.save_every:  # else it was saved when it was due
        save_state(state, s, machine)
    out = shlex.quote(s.train.out)
    go_on = f"python train.py --resume {out}"
    if machine.world > 1:  # fewer processes would see other clips
        here = int(os.environ.get("LOCAL_WORLD_SIZE", machine.world))
        go_on = f"torchrun --nproc_per_node={here} train.py --resume {out}"
        if here < machine.world:
            go_on += f", on each of {machine.world // here} computers"
    if failed:
        if machine.rank > 0:
            return
        what = f"the gradient of step {state.step + 1} is not finite and was not applied"
        if state.scaler.is_enabled():
            what = "fifty gradients in a row were not finite and not applied"
        remedy = f"{go_on} with a lower --lr or --precision float32"
        raise ValueError(f"{what}; step {state.step} is saved: {remedy}")
    if state.step % s.train.preview_every:
        preview(state, s, machine)
    if machine.rank > 0:
        return
    curve = loss_curve(Path(s.train.out))
    if state.step < s.train.steps:
        print(f"stopped at step {state.step}; to go on: {go_on}\n{curve}")
        number = stop[0] if stop else signal.SIGTERM  # the signal may have reached another process
        raise SystemExit(128 + number)
    if s.train.arch == "autoencoder":
        use = f"train.py --latent {out}"
    else:
        use = f"sample.py --checkpoint {out}"
    newest = path_of(state, s).name
    print(f"done: in {out} are samples/, metrics.jsonl and {newest}\n{curve}\nto use it: python {use}")


def loss_curve(folder: Path) -> str:
    """Draws the loss curve where matplotlib is there, and says where it is, or how to get it."""
    try:
        return f"loss curve: {plot_loss(folder)}"
    except ImportError:
        run = shlex.quote(str(folder))
        return f"loss curve: pip install matplotlib && python -m experiments.plots --run {run}"
    except FileNotFoundError:
        return "no loss was logged yet"
    except OSError as error:
        return f"no loss curve: {error}"


# ---- the program -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def prepare(s: Settings, machine: Machine) -> Iterator[None]:
    """Names, makes and locks the run's folder and says on what it trains.

    Raises ValueError or OSError, before anything is written, for a folder with another run, one that another
    process is using or that cannot be written to, and for unusable data.
    """
    if not s.train.out:
        s.train.out = f"runs/{s.data.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, before = Path(s.train.out), Path(s.train.resume)
    if s.train.shard and machine.world == 1:
        raise ValueError("--shard splits a model over processes: start several with torchrun")
    if machine.rank == 0:
        next(batches(s.data, 1, s.train.seed))  # unusable data end here, before there is a folder
    machine.any(False)  # all others wait for what the first notes down of the clips
    if machine.rank > 0:
        yield
        return
    if s.data.dataset == "video_folder" and not s.data.list and holds(s.data.data_dir, folder / "samples/step.gif"):
        raise ValueError(f"--out {folder} lies in --data_dir, so its previews would be clips: give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with checkpoint.locked(folder):
        if any(folder.glob(checkpoint.NAMES)) and not (s.train.resume and folder.samefile(before)):
            raise ValueError(f"{folder} holds a run already: --resume {folder}, or give another --out")
        announce(s, machine)
        yield


def announce(s: Settings, machine: Machine) -> None:
    """Prints what is trained, on what, and what differs from the run that is resumed."""
    reason = "as given"
    if s.train.resume:
        reason = "as resumed"
    elif s.train.preset == suitable_preset({"device": s.train.device, "dataset": s.data.dataset}):
        reason = "it fits the data and this hardware"
    clips = s.train.batch_size * s.train.accumulate * machine.world
    print(f"preset {s.train.preset} ({reason}) on {machine}, {clips} clips a step, into {s.train.out}")
    if machine.device.type == "cuda":
        how = "with" if s.unet.checkpointing else "without"
        print(f"{s.train.batch_size} clips at a time, {how} --checkpointing")
    if s.train.latent:
        print(f"in the latents of {s.train.latent}")
    if s.train.resume and s.changes():
        print(f"other settings than before: {s.changes()}")
    with contextlib.suppress(OSError, ValueError, KeyError):  # of an older version, or lost
        made = json.loads((Path(s.train.out) / "config.json").read_text())
        before, now = made["processes"] * made["accumulate"], machine.world * s.train.accumulate
        if before != now:
            print(f"processes times --accumulate are {now}, and were {before}: other clips than the next ones come")


def less_memory(s: Settings) -> str:
    """Which flags take less memory than these settings."""
    if not s.unet.checkpointing and s.train.arch != "autoencoder":
        return "--checkpointing takes less, and a third more time"
    if s.train.batch_size > 1:
        half, twice = s.train.batch_size // 2, 2 * s.train.accumulate
        return f"--batch_size {half} --accumulate {twice} takes less, for about as many clips a step"
    return ("one clip does not fit: a smaller --num_images, --size, --frames or --dim takes less, and --shard on "
            "several GPUs")


def main() -> None:
    """Trains, as the flags say."""
    s = read_settings()
    machine = start(s.train.device, s.train.precision, s.train.threads)
    try:
        with prepare(s, machine):
            fit(s, machine)
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory: {less_memory(s)}") from None
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    config.run(main)
