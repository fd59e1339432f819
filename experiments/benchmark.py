"""Two digits: ten frames after ten, the benchmark that Moving MNIST is known for, and how well digits are read.

Both are experiments of evaluate.py.
"""
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

import sample
from experiments import metrics
from experiments.lab import Arms, Lab, Numbers, each, known
from files import to_float

GIVEN, ALL = 10, 20  # frames

# ---- ten frames after ten ----------------------------------------------------------------------------------


def benchmark(lab: Lab) -> Arms:
    """10 → 10 frames: squared error of a frame, pixels in [0, 1], summed; SSIM; the share of drawn frames that
    show the digits that were given, which the true frames bound.

    Published for two digits at 64 px: ConvLSTM 103.3, PredRNN 56.8 (SSIM 0.867), PredRNN++ 46.5 (0.898) where
    they were first compared; ConvLSTM 29.8, PredRNN 24.0, PredRNN++ 22.1 where OpenSTL trained them for 200
    epochs. A network that is trained on this error draws the mean of all futures. A sample is one of them: the
    best that is possible has twice the error of that mean.
    """
    n = lab.c.samples
    guessed = cache(partial(guesses, lab))

    def judged(name: str, seed: int) -> Numbers:
        found, _, truth = guessed(seed)
        true, y = found["the true frames"], found[name]
        numbers = {"squared_error": metrics.squared_error(true, y).mean().item(), "ssim": metrics.ssim(true, y)}
        if truth:
            numbers["digits"] = lab.digit_named(y, truth)
        return numbers

    def mean_of_all(seed: int) -> Numbers:
        # a mean of n has the error of the mean of infinitely many, and an n-th of the variance beside it
        found, alone, _ = guessed(seed)
        error = metrics.squared_error(found["the true frames"], found[f"mean of {n}"]).mean().item()
        return {"squared_error": (n * error - alone) / (n - 1)}

    names = ["one sample", f"best of {n}", f"mean of {n}",
             "the last frame again", "black frames", "the true frames"]
    arms = {name: partial(judged, name) for name in names}
    return arms | {"mean of infinitely many, by the spread": mean_of_all}


def guesses(lab: Lab, seed: int) -> tuple[dict[str, Tensor], float, dict]:
    """Guesses (B, C, 10, H, W) by name, "the true frames" among them; the mean error of single samples; and
    the truth.
    """
    x, truth = clips(lab, seed)
    true = x[:, :, GIVEN:]
    first, best, mean, alone = samples(lab, x, seed)
    n = lab.c.samples
    found = {
        "one sample": first,
        f"best of {n}": best,
        f"mean of {n}": mean,
        "the last frame again": x[:, :, GIVEN - 1:GIVEN].expand_as(true),
        "black frames": torch.full_like(true, -1),
        "the true frames": true}
    return found, alone, truth


def samples(lab: Lab, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """What is drawn --samples times after the tenth frame of clips x: the first sample, of each clip the one
    with the least error, and the mean, each (B, C, 10, H, W); and the mean error of single samples.
    """
    n, true = lab.c.samples, x[:, :, GIVEN:]
    flags = sample.decide(lab.model, {"mode": "predict"}) | dict(mode="predict", overlap=GIVEN)
    least = torch.full([len(x)], math.inf)
    best = torch.zeros_like(true)
    mean = torch.zeros_like(true)
    alone = 0.0
    for number in range(n):
        y = lab.draw(n * seed + number, known(lab, x, slice(0, GIVEN)), **flags)[:, :, GIVEN:]
        if number == 0:
            first = y
        error = metrics.squared_error(true, y)
        better = error < least
        best[better] = y[better]
        least[better] = error[better]
        mean += y / n
        alone += error.mean().item() / n
    return first, best, mean, alone


# ---- the clips ---------------------------------------------------------------------------------------------


def clips(lab: Lab, seed: int) -> tuple[Tensor, dict]:
    """--clips clips (B, C, 20, H, W) and their truth. Those of --test_file come seed after seed, and have none;
    else they are of the test split.
    """
    if not lab.c.test_file:
        x, _, truth = lab.real(seed, ALL)
        return x, truth
    data, n = lab.model.data, lab.c.clips
    needed = n * lab.c.seeds
    array = read_test_file(lab.c.test_file)
    _, count, *shape = array.shape
    if count < needed or shape != [data.size, data.size]:
        raise ValueError(f"{lab.c.test_file} holds {count} clips of {shape[0]} px, and --clips {n} --seeds "
                         f"{lab.c.seeds} need {needed} of {data.size} px, as the model draws")
    part = array[:, n * seed:n * (seed + 1)]
    x = to_float(torch.from_numpy(np.array(part)))
    return rearrange(x, "f n h w -> n 1 f h w").expand(-1, data.channels, -1, -1, -1), {}


def read_test_file(path: str) -> np.ndarray:
    """The array (20, N, H, W) uint8 of Moving MNIST's public test file, left on the disk; else ValueError."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no array: {error}") from None
    if array.dtype != np.uint8 or array.ndim != 4 or len(array) != ALL:
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, and not the uint8 of (20, clips, "
                         "height, width) that mnist_test_seq.npy has")
    return array


# ---- how well digits are read ------------------------------------------------------------------------------


def reader(lab: Lab) -> Arms:
    """How well the networks that measure read test clips; for several digits, by how far they are apart.

    digits: share of frames whose digits are all read right. off: how far a digit is read from where it is, in
    pixels. followed: share of clips whose digits of the last frame are linked to those of the first as they are.
    """
    where = {"all frames": lambda apart: apart >= 0}
    if lab.model.data.digits > 1:
        where |= {
            "16 px apart or more": lambda apart: apart >= 16,
            "8 to 16 px": lambda apart: (apart >= 8) & (apart < 16),
            "under 8 px": lambda apart: apart < 8}

    def frames(chosen: Callable[[Tensor], Tensor], seed: int) -> Numbers:
        x, _, truth = lab.real(seed)
        right, off, _ = metrics.read_right(lab.observe(x), truth, x.shape[-1])
        here = chosen(metrics.distance(truth, x.shape[-1]))  # (B, F)
        return {
            "share": here.float().mean().item(),
            "digits": right[here].float().mean().item(),
            "off": off[here].mean().item()}

    def whole(seed: int) -> Numbers:
        x, _, truth = lab.real(seed)
        _, _, followed = metrics.read_right(lab.observe(x), truth, x.shape[-1])
        return {"followed": followed.float().mean().item()}

    return each(frames, where) | {"whole clips": whole}
