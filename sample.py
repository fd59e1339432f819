"""Section 3.1 and figure 2: conditional sampling, the only place where guidance, sampler and network meet.

Every mode is one question: given some frames, or some frames made small, draw the rest. So a mode only makes
a Given, and fill() answers it, in blocks of the model's length where it is longer.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import checkpoint
import config
from autoencoder import Autoencoder, AutoencoderConfig, frozen
from data import DataConfig, batches, load_video, save_video
from diffusion import Denoiser, DiffusionConfig, denoiser, noise_like, schedule
from guidance import classifier_free, clipped, reconstruction_guided, replacement
from machine import start
from magicvideo import NETWORKS
from sampling import ddim, dpm_solver, identity, sample
from text import TextConfig, embed
from unet3d import UNet3D, UNetConfig

PARTS = DataConfig, UNetConfig, DiffusionConfig, TextConfig, AutoencoderConfig
SMALL = ("super_resolve", "cascade")  # the modes that are given small frames
Mode = Literal["generate", "predict", "extend", "interpolate", "super_resolve", "cascade", "key_frames"]


@dataclass
class SampleConfig:
    """What to draw, and how."""
    mode: Mode = "generate"  # what is drawn, given what: see the table in README.md
    checkpoint: str = ""  # a checkpoint or a run's folder; by default the newest in runs/, else pretrained/
    base: str = ""  # cascade, key_frames: the model that draws what is given; else it is a real clip
    text: str = ""  # caption of the clips, or several taking turns, separated by |; none: unconditional
    fps: float = 0.0  # [0, 64] frames per second said after each caption of --text; 0 says none
    num: int = 4  # [1, 1024] clips
    seed: int = 0  # [0, 2147483647] the same seed gives the same video
    sampler: Literal["ancestral", "ddim", "dpm_solver"] = "ancestral"  # Eqs. 4 and 5, or fewer network calls
    steps: int = 64  # [1, 100000] steps from noise to video
    gamma: float = 0.0  # [0, 1] ancestral: 0 is the small variance, 1 the large one
    delta: float = 0.0  # [0, 2] ancestral: step size of the Langevin corrector, 0.1 in the paper
    w: float = 0.0  # [0, 100] weight of classifier-free guidance; the paper's tables list 1 + w
    method: Literal["reconstruction", "replacement"] = "reconstruction"  # how given frames steer the others
    w_r: float = 0.0  # [0, 10000] weight of reconstruction guidance; 0: 2 for frames, 1.5 for small ones
    frames: int = 0  # [0, 100000] frames of the result; 0 is the model's length, 4 times that for extend
    overlap: int = 0  # [0, 1024] frames given to predict, and shared by blocks; 0 is half the model's length
    stride: int = 3  # [2, 64] interpolate, cascade: every so many frames one is given (the paper's frameskip)
    scale: int = 2  # [2, 64] super_resolve, cascade: the given frames are so many times smaller
    input: str = ""  # a video to start from; by default clips of the test split
    out: str = "samples"  # folder for the .gif, .webp and .png
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    precision: Literal["auto", "bf16", "float32"] = "auto"  # bf16 autocast where the hardware has it
    threads: int = 0  # [0, 1024] CPU threads; 0 leaves PyTorch's choice


@dataclass
class Model:
    """A trained network with frozen averaged weights, and the settings that its checkpoint carries."""
    network: UNet3D
    data: DataConfig
    diffusion: DiffusionConfig
    text: TextConfig
    device: torch.device
    autoencoder: Autoencoder | None = None  # of a network that draws latents


@dataclass
class Given:
    """What is known before sampling: x where a frame is known, and low where it is low_known."""
    x: Tensor  # (B, C, T, H, W), zero where unknown
    known: Tensor  # (T,) bool
    low: Tensor | None = None  # (B, C, T, H / scale, W / scale), zero where unknown
    low_known: Tensor | None = None  # (T,) bool

    def block(self, where: slice) -> "Given":
        low = (None, None) if self.low is None else (self.low[:, :, where], self.low_known[where])
        return Given(self.x[:, :, where], self.known[where], *low)


# ---- from a checkpoint to a denoiser ---------------------------------------------------------------------


def find(path: str) -> Path:
    """The checkpoint that a file, a run's folder or "" means: the newest run's, else pretrained/'s first."""
    if path:
        return checkpoint.newest(Path(path)) if Path(path).is_dir() else Path(path)
    shipped = sorted((Path(__file__).parent / "pretrained").glob("moving_mnist*.pt"))
    runs = [folder for folder in Path("runs").glob("*") if any(folder.glob("checkpoint_*.pt"))]
    if not runs and not shipped:
        raise ValueError("there is no checkpoint in runs/ or pretrained/; train one with "
                         "python train.py --dataset moving_mnist, or name one with --checkpoint")
    return checkpoint.newest(*runs) if runs else shipped[0]


def load_model(path: Path, device: torch.device) -> tuple[Model, dict[str, Any]]:
    """The model in a checkpoint, EMA weights, no gradients, and the settings it was trained with."""
    content = checkpoint.load(path)
    try:
        data, unet, diffusion, text, latent = config.rebuild(settings := content["settings"], *PARTS)
        network = NETWORKS[settings.get("arch", "unet3d")](unet)
        network.load_state_dict(content["ema"])
        coder = frozen(latent, content["autoencoder"], device) if "autoencoder" in content else None
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} holds no model that this version can build: {reason}") from None
    network = network.to(device, memory_format=torch.channels_last).eval()
    network.requires_grad_(False)  # guidance differentiates with respect to z: half the backward pass
    return Model(network, data, diffusion, text, device, coder), settings


def text_guided(model: Model, s: SampleConfig, keys: Tensor | None = None) -> Denoiser:
    """The model's denoiser for --text, with classifier-free guidance of weight --w; c = 0 without a text."""
    plain = denoiser(model.network, model.diffusion, keys=keys)
    if not s.text or not model.text.cond_dim:
        return plain
    texts = captions(s) if keys is None else captions(dataclasses.replace(s, fps=0)) * (len(keys) // s.num)
    cond = embed(texts, model.text).to(model.device)
    return classifier_free(denoiser(model.network, model.diffusion, cond, keys), plain, s.w)


def captions(s: SampleConfig) -> list[str]:
    """One caption for each of --num clips: those of --text in turn, with --fps if it is given."""
    return [text + f" at {s.fps:g} fps" * bool(s.fps) for text in s.text.split("|") * s.num][:s.num]


# ---- drawing ---------------------------------------------------------------------------------------------


def fill(model: Model, s: SampleConfig, given: Given) -> Tensor:
    """The video (B, C, T, H, W): block after block, each given what is drawn already (autoregression)."""
    length, keys = model.network.config.frames, given.x if model.network.config.keys else None
    generator, denoise = torch.Generator().manual_seed(s.seed), text_guided(model, s, keys)
    starts = block_starts(given.known, length, overlap(model, s))
    calls = s.steps if not s.delta else 2 * s.steps - 1
    video = Given(given.x.clone(), given.known.clone(), given.low, given.low_known)
    with tqdm(total=len(starts) * calls, unit=" calls", desc=s.mode) as bar:
        for start in starts:
            where = slice(start, start + length)
            video.x[:, :, where] = draw(counted(denoise, bar), video.block(where), model, s, generator)
            video.known[where] = True
    return model.autoencoder.video(video.x) if model.autoencoder else video.x


def overlap(model: Model, s: SampleConfig) -> int:
    """The frames that predict is given and that blocks share."""
    return s.overlap or model.network.config.frames // 2


def block_starts(known: Tensor, length: int, overlap: int) -> list[int]:
    """Where a video's blocks begin: each shares overlap frames or more with what is known before it."""
    total, prefix = len(known), int(known.int().cumprod(0).sum())
    starts = [max(0, min(prefix - overlap, total - length))]
    while starts[-1] + length < total:
        starts.append(min(starts[-1] + length - overlap, total - length))
    return starts


def draw(denoise: Denoiser, given: Given, model: Model, s: SampleConfig, noise: torch.Generator) -> Tensor:
    """One block: what is given guides the denoiser, known frames are replaced too, and the sampler runs."""
    known, constrain = given.known[:, None, None], identity
    if model.network.config.keys:
        known = torch.zeros_like(known)  # its denoiser knows them
    if known.any():
        constrain = replacement(given.x.clone(), known, noise)
    if given.low is not None or known.any() and s.method == "reconstruction":
        w_r = s.w_r or (2.0 if given.low is None else 1.5)
        denoise = reconstruction_guided(denoise, seen(given, s, given.x, given.low),
                                        lambda x: seen(given, s, x, smaller(x, s.scale)), w_r)
    times = torch.linspace(1, 0, s.steps + 1, dtype=torch.float64)
    logsnrs, z = schedule(times, model.diffusion).to(model.device), noise_like(given.x, noise)
    denoise = denoise if model.autoencoder else clipped(denoise)  # latents have no bounds
    if s.sampler == "ancestral":
        return sample(denoise, z, logsnrs, s.gamma, s.delta, constrain, noise)
    return {"ddim": ddim, "dpm_solver": dpm_solver}[s.sampler](denoise, z, logsnrs, constrain)


def seen(given: Given, s: SampleConfig, video: Tensor, small: Tensor | None) -> Tensor:
    """What is given of a video, flat (B, n): its known frames, and its low_known frames made small."""
    parts = [video * given.known[:, None, None]]
    if given.low is not None:
        # Paper: no factor. With it pooling has norm 1, and w_r means in space what it means in time
        parts.append(s.scale * small * given.low_known[:, None, None])
    return torch.cat([part.flatten(1) for part in parts], 1)


def counted(denoise: Denoiser, bar: tqdm) -> Denoiser:
    """The denoiser, moving the progress bar at each call."""
    def call(z: Tensor, logsnr: Tensor) -> Tensor:
        bar.update()
        return denoise(z, logsnr)
    return call


# ---- the modes: what is given ----------------------------------------------------------------------------


def generate(model: Model, s: SampleConfig) -> Given:
    """Nothing."""
    return nothing(model, s, s.frames or model.network.config.frames)


def predict(model: Model, s: SampleConfig) -> Given:
    """The first --overlap frames (Eq. 7)."""
    k = overlap(model, s)
    return show(generate(model, s), slice(0, k), source(model, s, k))


def extend(model: Model, s: SampleConfig) -> Given:
    """Nothing, or the whole --input; four times the model's length is drawn block after block (Table 6)."""
    given = nothing(model, s, s.frames or 4 * model.network.config.frames)
    if not s.input:
        return given
    x = source(model, s, 0)
    if x.shape[2] >= len(given.known):
        raise ValueError(f"--input {s.input} has {x.shape[2]} frames already; --frames must be more")
    return show(given, slice(0, x.shape[2]), x)


def interpolate(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, from a slow clip (Eq. 7)."""
    x, frames = slow_clip(model, s)
    return show(nothing(model, s, frames), slice(None, None, s.stride), x)


def super_resolve(model: Model, s: SampleConfig) -> Given:
    """All frames, --scale times smaller (Eq. 8)."""
    x = source(model, s, s.frames or (0 if s.input else model.network.config.frames))
    return show_small(nothing(model, s, x.shape[2]), 1, smaller(x, s.scale))


def cascade(model: Model, s: SampleConfig) -> Given:
    """Every --stride-th frame, --scale times smaller: both observations at once (figure 2)."""
    if not s.base:
        x, frames = slow_clip(model, s)
        return show_small(nothing(model, s, frames), s.stride, smaller(x, s.scale))
    x = drawn_by_base(model, s, s.scale, (s.frames - 1) // s.stride + 1)
    return show_small(nothing(model, s, s.frames or (x.shape[2] - 1) * s.stride + 1), s.stride, x)


def drawn_by_base(model: Model, s: SampleConfig, scale: int, frames: int) -> Tensor:
    """The clips that --base draws of as many frames (0: its own length), scale times smaller than model's."""
    base, _ = load_model(find(s.base), model.device)
    check(base, dataclasses.replace(s, mode="generate", base="", input=""))
    small, large = base.data, model.data
    if (small.size * scale, small.channels) != (large.size, large.channels):
        raise ValueError(f"--base draws frames of {small.channels} x {small.size} px, but "
                         f"{large.channels} x {large.size // scale} px are needed")
    return fill(base, s, nothing(base, s, frames or base.network.config.frames))


def key_frames(model: Model, s: SampleConfig) -> Given:
    """The gaps between neighbouring key frames (MagicVideo), which --base draws or which are of a slow clip."""
    gap = model.network.config.frames - 1
    if s.base:
        return gaps(model, s, inside(model, drawn_by_base(model, s, 1, s.frames and (s.frames - 1) // gap + 1)))
    frames = s.frames or (0 if s.input else 4 * gap + 1)
    return gaps(model, s, slow_clip(model, dataclasses.replace(s, stride=gap, frames=frames))[0])


def gaps(model: Model, s: SampleConfig, keys: Tensor) -> Given:
    """Both ends of each gap of the key frames (B, C, n + 1, H, W): every clip's first gap, then every clip's
    second, ..., (n B, C, gap + 1, H, W)."""
    if keys.shape[2] < 2:
        raise ValueError("one key frame has no neighbour: --frames must be more, or --input longer")
    pairs = rearrange([keys[:, :, :-1], keys[:, :, 1:]], "two b c n h w -> (n b) c two h w")
    whole = nothing(model, dataclasses.replace(s, num=len(pairs)), length := model.network.config.frames)
    return show(whole, slice(None, None, length - 1), pairs)


def joined(gaps: Tensor, clips: int) -> Tensor:
    """The videos (clips, C, n * gap + 1, H, W) of their gaps (n * clips, C, gap + 1, H, W)."""
    video = rearrange(gaps[:, :, :-1], "(n b) c f h w -> b c (n f) h w", b=clips)
    return torch.cat([video, gaps[-clips:, :, -1:]], 2)


def nothing(model: Model, s: SampleConfig, frames: int) -> Given:
    """A video of which no frame is known."""
    unet = model.network.config
    x = torch.zeros(s.num, unet.channels, frames, unet.size, unet.size, device=model.device)
    return Given(x, torch.zeros(frames, dtype=torch.bool, device=model.device))


def show(given: Given, where: slice, x: Tensor) -> Given:
    """given, with the frames x (B, C, n, H, W) known at where."""
    given.x[:, :, where], given.known[where] = x.to(given.x.device), True
    return given


def show_small(given: Given, stride: int, small: Tensor) -> Given:
    """given, with every stride-th frame seen as small (B, C, n, H / scale, W / scale)."""
    given.low = torch.zeros(*given.x.shape[:3], *small.shape[3:], device=given.x.device)
    given.low_known = torch.zeros_like(given.known)
    given.low[:, :, ::stride], given.low_known[::stride] = small.to(given.x.device), True
    return given


def smaller(x: Tensor, scale: int) -> Tensor:
    """The video with each scale x scale square of pixels averaged into one."""
    return nnf.avg_pool3d(x, (1, scale, scale))


def slow_clip(model: Model, s: SampleConfig) -> tuple[Tensor, int]:
    """One frame in --stride of the input or test split (B, C, n, H, W), and the whole video's frames."""
    frames = s.frames or (0 if s.input else model.network.config.frames)
    x = source(model, s, (frames - 1) // s.stride + 1 if frames else 0, s.stride)
    return x, frames or (x.shape[2] - 1) * s.stride + 1


def source(model: Model, s: SampleConfig, frames: int, stride: int = 1) -> Tensor:
    """The first frames (0: all) of --input, or of clips of the test split at stride; (B, C, frames, H, W)."""
    if not s.input:
        data = dataclasses.replace(model.data, split="test", frames=frames, num_images=0,
                                   frame_stride=(min(model.data.frame_stride) * stride,))
        return inside(model, next(batches(data, s.num, s.seed))[0])
    x = load_video(s.input, model.data.size, model.data.channels)
    if x.shape[1] < frames:
        raise ValueError(f"--input {s.input} has {x.shape[1]} frames, {frames} are needed")
    return inside(model, x[None, :, :frames or None].expand(s.num, -1, -1, -1, -1))


def inside(model: Model, x: Tensor) -> Tensor:
    """The frames as the network knows them: its autoencoder's latents, if it draws those."""
    return model.autoencoder.latents(x.to(model.device)) if model.autoencoder else x.to(model.device)


# ---- the program -----------------------------------------------------------------------------------------


def check(model: Model, s: SampleConfig) -> None:
    """Raises ValueError, in one sentence, for settings that do not fit the model or each other."""
    length, size, k = model.network.config.frames, model.network.config.size, overlap(model, s)
    small = s.mode in SMALL
    wrong = {
        f"--overlap {k} must be less than the model's {length} frames": k >= length,
        f"--frames {s.frames} must be more than --overlap {k}": s.mode == "predict" and 0 < s.frames <= k,
        "--text needs a model trained with captions, and this one is unconditional":
            s.text and not model.text.cond_dim and not (s.mode == "key_frames" and s.base),
        "--mode key_frames needs a model trained with --keys, and a model trained so knows no other mode":
            (s.mode == "key_frames") != model.network.config.keys,
        "--fps is said after a caption: it needs --text": s.fps and not s.text,
        "--w guides towards a caption: it needs --text and a model trained with captions": s.w and not s.text,
        f"--delta and --gamma belong to --sampler ancestral, not {s.sampler}":
            (s.delta or s.gamma) and s.sampler != "ancestral",
        f"--scale {s.scale} does not divide the model's {size} pixels": small and size % s.scale,
        f"--method replacement replaces whole frames, and --mode {s.mode} is given small ones":
            s.method == "replacement" and small,
        f"--mode predict needs a model of two frames or more, and this one has {length}":
            s.mode == "predict" and k == 0,
        f"--mode {s.mode} is given small frames, and this model draws latents": small and model.autoencoder,
        f"--base belongs to --mode cascade and key_frames, not {s.mode}":
            s.base and s.mode not in ("cascade", "key_frames"),
        "--input is for modes that are given frames: not generate, nor with --base":
            s.input and (s.mode == "generate" or s.base),
    }
    for sentence, holds in wrong.items():
        if holds:
            raise ValueError(sentence)


def main() -> None:
    """Loads, draws, writes."""
    s, = config.parse(SampleConfig)
    machine, path = start(s.device, s.precision, s.threads), find(s.checkpoint)
    model, trained = load_model(path, machine.device)
    s, = config.parse(SampleConfig, defaults=lambda given: papers_numbers(trained.get("preset"), given))
    check(model, s)
    print(f"{path}: {model.data.dataset}, {model.network.config.frames} frames of {model.data.size} px")
    mode = {"generate": generate, "predict": predict, "extend": extend, "interpolate": interpolate,
            "super_resolve": super_resolve, "cascade": cascade, "key_frames": key_frames}[s.mode]
    with machine.autocast():
        given = mode(model, s)
        Path(s.out).mkdir(parents=True, exist_ok=True)  # a bad --out ends here, not after all the work
        video = fill(model, s, given)
    marks = given.known if given.low is None else given.known | given.low_known
    if s.mode == "key_frames":
        video = joined(video, s.num)
        marks = torch.arange(video.shape[2]) % (len(marks) - 1) == 0
    for written in save_video(video, free_name(Path(s.out), s.mode), known=marks):
        print(written)


def papers_numbers(preset: str, given: dict[str, Any]) -> dict[str, Any]:
    """The paper's flags for a preset: its sampler's unless another is given, w_r where frames are whole."""
    drop = {"w_r"} if given.get("mode") in SMALL else set()
    if given.get("sampler", "ancestral") != "ancestral":
        drop |= {"sampler", "steps", "gamma", "delta"}
    return {name: value for name, value in config.SAMPLING.get(preset, {}).items() if name not in drop}


def free_name(folder: Path, mode: str) -> Path:
    """folder/mode_001, or the first number that is not taken: no sample is overwritten."""
    number = 1
    while (folder / f"{mode}_{number:03d}.gif").exists():
        number += 1
    return folder / f"{mode}_{number:03d}"


if __name__ == "__main__":
    config.run(main)
