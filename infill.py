"""Section 3.1: given some frames, or some frames made small, draw the rest of a video.

Here guidance, sampler and network meet. Whatever is known is a Given, and fill() draws what is not, in blocks
of the model's length where the video is longer. sample.py makes a Given of each of its modes.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint
import config
from autoencoder import Autoencoder, AutoencoderConfig, Pixels, frozen, in_latents
from data import DataConfig
from diffusion import Denoiser, DiffusionConfig, denoiser, noise_like, schedule
from guidance import classifier_free, clipped, reconstruction_guided, replacement
from magicvideo import MagicVideoConfig, build_network
from sampling import ddim, dpm_solver, identity, sample
from text import TextConfig, embed
from unet3d import UNet3D

PARTS = DataConfig, MagicVideoConfig, DiffusionConfig, TextConfig, AutoencoderConfig
Mode = Literal["generate", "predict", "extend", "interpolate", "super_resolve", "cascade"]
SMALL = ("super_resolve", "cascade")  # the modes that are given small frames
SLOW = ("interpolate", "cascade")  # the modes that are given every --stride-th frame


@dataclass
class SampleConfig:
    """What to draw, and how. Raises ValueError for settings that do not fit each other."""
    mode: Mode = "generate"  # what is drawn, given what: see the table in README.md
    checkpoint: str = ""  # a checkpoint or a run's folder; by default your newest run that is half done
    text: str = ""  # caption of the clips, or several taking turns, separated by |; "" is unconditional
    fps: float = 0.0  # [0, 64] frames per second said after each caption of --text; 0 says none
    num: int = 4  # [1, 1024] clips
    seed: int = 0  # [0, 2147483647] the same seed gives the same clips, however many they are
    sampler: Literal["ancestral", "ddim", "dpm_solver"] = "ancestral"  # Eqs. 4 and 5; the others add no noise
    steps: int = 64  # [1, 100000] steps from noise to video
    gamma: float = 0.0  # [0, 1] ancestral: 0 is the small variance, 1 the large one
    delta: float = 0.0  # [0, 2] ancestral: step size of the Langevin corrector, 0.1 in the paper
    w: float = 0.0  # [0, 100] weight of classifier-free guidance; we read the paper's tables as 1 + w
    w_t: float = 0.0  # [0, 100] weight of temporal guidance, away from what each frame is alone; ours
    w_t_from: float = -2.0  # [-40, 40] log-SNR at which temporal guidance begins
    w_r: float = 10.0  # [0, 10000] weight of reconstruction guidance; 0 is replacement alone
    w_r_power: float = 1.0  # [-1, 1] power of alpha beside w_r; 1 is the paper, less guides more in noise
    frames: int = 0  # [0, 100000] frames of the result; 0 is the model's length, 4 times that for extend
    overlap: int = 0  # [0, 1024] frames given to predict, and shared by blocks; 0 is half the model's length
    stride: int = 3  # [2, 64] interpolate, cascade: every so many frames one is given
    scale: int = 2  # [2, 64] super_resolve, cascade: the given frames are so many times smaller
    input: str = ""  # a video to start from, of whole or of small frames; by default clips of the test split
    out: str = "samples"  # folder for the .gif, .webp and .png
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"  # auto: the fastest that the hardware has
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice

    def __post_init__(self):
        if self.sampler != "ancestral" and (self.delta or self.gamma):
            raise ValueError("--delta and --gamma belong to --sampler ancestral")
        if self.text.count("|") >= self.num:
            raise ValueError(f"--text has {self.text.count('|') + 1} captions, and --num is {self.num}")
        if self.w and not self.text:
            raise ValueError("--w guides to a caption: it needs --text and a model trained with captions")
        if self.fps and not self.text:
            raise ValueError("--fps is said after a caption, and needs --text: films are read at the model's rate")
        if self.w_r == 0 and self.mode in SMALL:
            raise ValueError("--w_r 0 is replacement alone, which replaces whole frames, not small ones")
        if self.input and self.mode == "generate":
            raise ValueError("--input is for modes that are given frames, and generate is given none")


@dataclass
class Model:
    """A trained network with frozen averaged weights, and the settings that its checkpoint carries."""
    network: UNet3D
    data: DataConfig
    diffusion: DiffusionConfig
    text: TextConfig
    device: torch.device
    coder: Autoencoder | Pixels  # whose latents the network draws
    sampling: dict[str, dict] = field(default_factory=dict)  # settings for --mode, as in presets.SAMPLING
    step: int = 0  # of its training

    @property
    def speed(self) -> float:
        """Frames per second of its clips: the highest that training had."""
        return self.data.rate / min(self.data.frame_stride)

    def latents(self, x: Tensor) -> Tensor:
        """The frames x as the network knows them."""
        return self.coder.latents(x.to(self.device))


@dataclass
class Given:
    """What is known before sampling: x where a frame is known, and low where it is low_known."""
    x: Tensor  # (B, C, T, H, W), zero where unknown
    known: Tensor  # (T,) bool
    low: Tensor | None = None  # (B, C, T, H / scale, W / scale), zero where unknown
    low_known: Tensor | None = None  # (T,) bool

    def block(self, where: slice) -> "Given":
        part = Given(self.x[:, :, where], self.known[where])
        if self.low is not None:
            part.low, part.low_known = self.low[:, :, where], self.low_known[where]
        return part


def nothing(model: Model, s: SampleConfig, frames: int) -> Given:
    """A video of which no frame is known."""
    unet = model.network.config
    x = torch.zeros(s.num, unet.channels, frames, unet.size, unet.size, device=model.device)
    return Given(x, torch.zeros(frames, dtype=torch.bool, device=model.device))


def show(given: Given, where: slice, x: Tensor) -> Given:
    """Writes the known frames x (B, C, n, H, W) into given, at where, and returns given."""
    given.x[:, :, where] = x.to(given.x.device)
    given.known[where] = True
    return given


def show_small(given: Given, stride: int, small: Tensor) -> Given:
    """Writes every stride-th frame, made small (B, C, n, H / scale, W / scale), into given and returns given."""
    b, c, _, h, w = small.shape
    given.low = torch.zeros(b, c, len(given.known), h, w, device=given.x.device)
    given.low[:, :, ::stride] = small.to(given.x.device)
    given.low_known = torch.zeros_like(given.known)
    given.low_known[::stride] = True
    return given


def smaller(x: Tensor, scale: int) -> Tensor:
    """The video with each scale x scale square of pixels averaged into one."""
    return nnf.avg_pool3d(x, (1, scale, scale))


# ---- from a checkpoint to a denoiser ---------------------------------------------------------------------


def load_model(path: Path, device: torch.device) -> Model:
    """The model in a checkpoint: EMA weights, no gradients. Raises ValueError if there is none in it."""
    content = checkpoint.load(path)
    settings = content.get("settings")
    if "features" in content:
        raise ValueError(f"{path} holds the networks that measure, for experiments/: it draws nothing")
    if isinstance(settings, dict) and settings.get("arch") == "autoencoder":
        raise ValueError(f"{path} holds an autoencoder, which draws nothing: train in its latents with "
                         "python train.py --latent")
    try:
        return rebuilt(content, device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if config.out_of_memory(error):
            raise
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} holds no model that this version can build: {reason}") from None


def rebuilt(content: dict[str, Any], device: torch.device) -> Model:
    """The model of a checkpoint's content; what is wrong with it raises whatever it is."""
    data, unet, diffusion, text, latent = config.rebuild(content["settings"], *PARTS)
    coder = Pixels()
    if "autoencoder" in content:
        coder = frozen(latent, content["autoencoder"], device)
        unet = in_latents(unet, latent)
    network = build_network(content["settings"]["arch"], unet)
    network.load_state_dict(content["ema"])
    network = network.to(device, memory_format=torch.channels_last).eval()
    network.requires_grad_(False)  # guidance differentiates with respect to z: half the backward pass
    sampling = content.get("sampling", {})
    for mode in sampling.values():
        config.check(mode, SampleConfig)
    return Model(network, data, diffusion, text, device, coder, sampling, content["step"])


def guided(model: Model, s: SampleConfig) -> Denoiser:
    """The model's denoiser for --text (c = 0 without one), with guidance of the weights --w and --w_t."""
    network, cond = model.network, None
    denoise = denoiser(network, model.diffusion)
    if s.text:
        cond = embed(captions(model, s), model.text).to(model.device)
        denoise = classifier_free(denoiser(network, model.diffusion, cond), denoise, s.w)
    if s.w_t == 0:
        return denoise
    if not model.data.num_images:
        raise ValueError("--w_t needs a model trained with image frames (--num_images)")
    # Not in the paper: Eq. 6 again, where a frame's condition is the other frames, and an image has none
    alone = denoiser(each_alone(network), model.diffusion, cond)
    away = classifier_free(denoise, alone, s.w_t)

    def late(z: Tensor, logsnr: Tensor) -> Tensor:
        if logsnr >= s.w_t_from:
            return away(z, logsnr)
        return denoise(z, logsnr)
    return late


def each_alone(network: Callable) -> Callable:
    """The network where every frame is an image of joint training (4.3.1), which sees no other frame.

    Without gradient. In Eq. 7 that changes nothing: a known frame's x_hat depends here on its own z alone,
    which is replaced. In Eq. 8 it makes the gradient approximate.
    """
    @torch.no_grad()
    def call(z: Tensor, logsnr: Tensor, cond: Tensor | None) -> Tensor:
        others = z.shape[2] - 1  # all frames but the first are image frames; the first is a video of one
        return network(z, logsnr, cond, others)
    return call


def captions(model: Model, s: SampleConfig) -> list[str]:
    """A caption for each clip: those of --text in turn, with the speed if training said it. Raises ValueError
    if the model knows no captions, or no speeds; whether captions of films said one is not known.
    """
    if not model.text.cond_dim:
        raise ValueError("--text needs a model trained with captions, and this one is unconditional")
    strides, texts, fps = model.data.frame_stride, s.text.split("|"), s.fps
    if fps and len(strides) == 1 and model.data.dataset != "video_folder":
        raise ValueError("--fps needs a model trained with several --frame_stride")
    said = []
    for clip in range(s.num):
        text = texts[clip % len(texts)]
        if fps:
            text += f" at {fps:g} fps"
        elif len(strides) > 1 and " fps" not in text:
            text += f" at {model.speed:g} fps"
        said.append(text)
    return said


# ---- drawing ---------------------------------------------------------------------------------------------


def fill(model: Model, s: SampleConfig, given: Given) -> Tensor:
    """The video (B, C, T, H, W): block after block, each given what is drawn already (autoregression)."""
    length = model.network.config.frames
    kind = model.device.type
    if torch.is_autocast_enabled(kind):
        cast_weights(model.network, torch.get_autocast_dtype(kind))
    denoise, noise = guided(model, s), generators(s.seed, len(given.x))
    starts = block_starts(given.known, length, overlap(model, s))
    calls = 2 * s.steps - 1 if s.delta else s.steps
    video = Given(given.x.clone(), given.known.clone(), given.low, given.low_known)
    with tqdm(total=len(starts) * calls, unit=" calls", desc=s.mode) as bar:
        for start in starts:
            where = slice(start, start + length)
            block = video.block(where)
            drawn = draw_block(counted(denoise, bar), block, model, s, noise)
            video.x[:, :, where] = torch.where(block.known[:, None, None], block.x, drawn)
            video.known[where] = True
    drawn = model.coder.video(video.x)
    if not drawn.isfinite().all():
        raise ValueError("what was drawn is not finite: try --precision float32, or a smaller --w_r")
    return drawn


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of convolutions and products once. Autocast would do it in every call, since they are
    frozen. The network stays so.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)


def generators(seed: int, clips: int) -> list[torch.Generator]:
    """A source of noise for each clip, by --seed and the clip's number alone: clip i is the same whatever
    --num is.
    """
    found = []
    for clip in range(clips):
        number = np.random.SeedSequence((seed, clip)).generate_state(1)
        found.append(torch.Generator().manual_seed(int(number[0])))
    return found


def overlap(model: Model, s: SampleConfig) -> int:
    """The frames that predict is given and that blocks share. Raises ValueError if none is left to draw."""
    length = model.network.config.frames
    if s.overlap == 0:
        return length // 2
    if s.overlap >= length:
        raise ValueError(f"--overlap {s.overlap} must be less than the model's {length} frames")
    return s.overlap


def block_starts(known: Tensor, length: int, overlap: int) -> list[int]:
    """Where a video's blocks begin: each shares overlap frames or more with what is known before it."""
    total = len(known)
    prefix = int(known.int().cumprod(0).sum())  # known frames before the first unknown one
    starts = [max(0, min(prefix - overlap, total - length))]
    while starts[-1] + length < total:
        starts.append(min(starts[-1] + length - overlap, total - length))
    return starts


def draw_block(denoise: Denoiser, given: Given, model: Model, s: SampleConfig,
               noise: list[torch.Generator]) -> Tensor:
    """One block: what is given guides the denoiser, known frames are replaced too, and the sampler runs."""
    known = given.known[:, None, None]
    constrain = identity
    if known.any():
        constrain = replacement(given.x, known, noise)
    if s.w_r and (given.low is not None or known.any()):
        def observe(x: Tensor) -> Tensor:
            small = None
            if given.low is not None:
                small = smaller(model.coder.unclamped(x), s.scale)
            return seen(given, s, x, small)
        x_a = seen(given, s, given.x, given.low)
        denoise = reconstruction_guided(denoise, x_a, observe, s.w_r, s.w_r_power)
    # float64, or the levels of neighbouring steps lose digits; Apple's GPU has none
    dtype = torch.float32 if model.device.type == "mps" else torch.float64
    times = torch.linspace(1, 0, s.steps + 1, dtype=dtype)
    logsnrs = schedule(times, model.diffusion)  # on the CPU: to look at one must not wait for a GPU
    z = noise_like(given.x, noise)
    if model.coder.bounded:  # pixels; latents have no bounds
        denoise = clipped(denoise)
    if s.sampler == "ancestral":
        return sample(denoise, z, logsnrs, s.gamma, s.delta, constrain, noise)
    if s.sampler == "ddim":
        return ddim(denoise, z, logsnrs, constrain)
    return dpm_solver(denoise, z, logsnrs, constrain)


def seen(given: Given, s: SampleConfig, video: Tensor, small: Tensor | None) -> Tensor:
    """What is given of a video, flat (B, n): its known frames, and its low_known frames made small."""
    whole = (video * given.known[:, None, None]).flatten(1)
    if small is None:
        return whole
    # Paper: no factor. With it pooling has norm 1, and w_r means in space what it means in time
    low = s.scale * small * given.low_known[:, None, None]
    return torch.cat([whole, low.flatten(1)], 1)


def counted(denoise: Denoiser, bar: tqdm) -> Denoiser:
    """The denoiser, moving the progress bar at each call."""
    def call(z: Tensor, logsnr: Tensor) -> Tensor:
        bar.update()
        return denoise(z, logsnr)
    return call
