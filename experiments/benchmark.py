"""The benchmark that Moving MNIST is known for, as an experiment of evaluate.py: ten frames after ten."""
from collections.abc import Callable
from functools import cache
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


def benchmark(lab: Lab) -> Arms:
    """10 → 10 frames: squared error of a frame, pixels in [0, 1], summed; SSIM; the share of drawn frames that
    show the digits that were given.

    Published for two digits at 64 px: ConvLSTM 103.3, PredRNN 56.8 (SSIM 0.867), PredRNN++ 46.5 (0.898) where
    they were first compared; ConvLSTM 29.9, PredRNN 25.0 where OpenSTL trained them longer. A network that is
    trained on this error draws the mean of all futures. A sample is one of them: the best that is possible
    has twice the error of that mean.
    """
    @cache
    def futures(seed: int) -> tuple[Tensor, Tensor, dict]:
        """Clips (B, C, 20, H, W), what is drawn after their tenth frame (N, B, C, 10, H, W), and the truth."""
        x, truth = clips(lab, seed)
        carried = sample.decide(lab.model, {"mode": "predict"})
        flags = carried | dict(mode="predict", overlap=GIVEN)
        drawn = []
        for number in range(lab.c.samples):
            y = lab.draw(lab.c.samples * seed + number, known(lab, x, slice(0, GIVEN)), **flags)
            drawn.append(y[:, :, GIVEN:])
        return x, torch.stack(drawn), truth

    def judged(guess: Callable[[Tensor, Tensor], Tensor], seed: int) -> Numbers:
        x, drawn, truth = futures(seed)
        y = guess(x, drawn)
        true = x[:, :, GIVEN:]
        found = {"squared_error": metrics.mse_per_frame(true, y), "ssim": metrics.ssim(true, y)}
        if truth:
            found["digits"] = lab.digit_named(y, truth)
        return found

    return each(judged, {
        "one sample": one,
        f"best of {lab.c.samples}": best,
        f"mean of {lab.c.samples}": mean,
        "the last frame again": last,
        "black frames": black})


# ---- guesses: of the clips x (B, C, 20, H, W) and what is drawn (N, B, C, 10, H, W), ten frames ------------


def one(x: Tensor, drawn: Tensor) -> Tensor:
    """The first sample."""
    return drawn[0]


def best(x: Tensor, drawn: Tensor) -> Tensor:
    """Of each clip the sample with the least error."""
    true = x[:, :, GIVEN:]
    errors = (drawn - true).square().mean((2, 3, 4, 5))  # (N, B)
    return drawn[errors.argmin(0), torch.arange(len(x))]


def mean(x: Tensor, drawn: Tensor) -> Tensor:
    """The mean of all samples."""
    return drawn.mean(0)


def last(x: Tensor, drawn: Tensor) -> Tensor:
    """The last given frame, ten times."""
    frame = x[:, :, GIVEN - 1:GIVEN]
    return frame.expand_as(drawn[0])


def black(x: Tensor, drawn: Tensor) -> Tensor:
    """Nothing."""
    return torch.full_like(drawn[0], -1)


# ---- the clips ---------------------------------------------------------------------------------------------


def clips(lab: Lab, seed: int) -> tuple[Tensor, dict]:
    """--clips clips (B, C, 20, H, W) and their truth. Those of --test_file come seed after seed, and have none;
    else they are of the test split.
    """
    if not lab.c.test_file:
        x, _, truth = lab.real(seed, ALL)
        return x, truth
    data, n = lab.model.data, lab.c.clips
    array = read_test_file(lab.c.test_file)
    part = array[:, n * seed:n * (seed + 1)]
    if part.shape[1:] != (n, data.size, data.size):
        needed = n * lab.c.seeds
        raise ValueError(f"{lab.c.test_file} holds {array.shape[1]} clips of {array.shape[2]} px, and --clips "
                         f"{n} --seeds {lab.c.seeds} need {needed} of {data.size} px, as the model draws")
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
