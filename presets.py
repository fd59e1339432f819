"""The values of --preset: one recipe of our own, and the models of the paper's appendix.

PRESETS holds flags of train.py, SAMPLING the flags of sample.py that a checkpoint of each preset carries.
"""
from typing import Any

Flags = dict[str, Any]

# ---- ours: one recipe, in the latents of frames; cpu for two CPU cores, cuda for one GPU ----------------

CPU: Flags = dict(
    # data: one digit, seen as latents, with captions that are dropped in half of the clips
    size=32, digits=1, num_images=4, latent="pretrained/autoencoder_32_8.pt",
    cond_dim=64, cond_dropout=0.5, short_captions=0.3,
    # network
    dim=40, dim_mults=(1, 2, 4), blocks=2, attention_resolutions=(2, 4), head_dim=32,
    emb_dim=128, emb_layers=2, scale_shift=True,
    # process and training
    noise_shift=3.0, frame_noise=0.5, optimizer="muon", lr=1.6e-3, warmup=100, decay="linear",
    batch_size=16, ema=0.999, steps=10_000,
    precision="float32")  # on two cores faster than bf16, since layers are small

CUDA: Flags = CPU | dict(
    size=64, digits=2, latent="pretrained/autoencoder_64.pt",
    dim=128, attention_resolutions=(2, 4, 8), head_dim=64, emb_dim=512,
    batch_size=32, ema=0.9995, warmup=500, steps=40_000, precision="auto")

# ---- ours: the same network without latents --------------------------------------------------------------

FILMS: Flags = CPU | dict(  # for your own clips on a CPU
    latent="", patch=2, attention_resolutions=(4, 8), steps=4_000, precision="auto")

PIXELS: Flags = dict(  # the paper's own way, Adam and a constant rate, at the size of Moving MNIST: one GPU
    size=64, digits=2, num_images=4,
    dim=64, dim_mults=(1, 2, 4, 8), blocks=2, attention_resolutions=(8, 16, 32), head_dim=64,
    emb_dim=512, emb_layers=2, checkpointing=True,
    lr=3e-4, warmup=1000, decay="constant", batch_size=16, accumulate=2, ema=0.9995, steps=40_000)

AUTOENCODER: Flags = dict(  # makes the latents of cpu, of single frames
    arch="autoencoder", size=32, digits=1, frames=1, num_images=0, factor=8, latent_channels=16, width=16,
    lr=2e-3, warmup=100, batch_size=64, steps=6_000)

# ---- the paper's appendix: what its models share, then each model ----------------------------------------

PAPER: Flags = dict(
    dataset="video_folder", size=64, frames=16, channels=3, num_images=8,
    dim=256, dim_mults=(1, 2, 4, 8), blocks=2, attention_resolutions=(8, 16, 32), head_dim=64,
    emb_dim=1024, emb_layers=4, cond_dim=0, patch=1, dropout=0.0,
    prediction="eps", noise_shift=1.0, lr=3e-4, beta2=0.99, weight_decay=0.0, warmup=1000,
    decay="constant", batch_size=128, ema=0.9999)

UCF101: Flags = PAPER | dict(dropout=0.1, steps=60_000)

BAIR: Flags = PAPER | dict(
    dim=128, dim_mults=(1, 2, 3, 4), blocks=3, emb_layers=2, prediction="v", dropout=0.1, flip=True,
    lr=2e-4, beta2=0.999, weight_decay=0.01, ema=0.999, steps=660_000)

KINETICS600: Flags = PAPER | dict(
    emb_layers=2, prediction="v", dropout=0.1, lr=2e-4, batch_size=256, steps=220_000)

TEXT: Flags = PAPER | dict(encoder="bert", cond_dim=1024, tokens=64)
TEXT_SMALL: Flags = TEXT | dict(dim=128, steps=200_000)
TEXT_LARGE: Flags = TEXT | dict(steps=700_000)
TEXT_9X128: Flags = TEXT | dict(
    frames=9, size=128, num_images=7,
    dim=128, dim_mults=(1, 2, 4, 8, 16), head_dim=128,
    lr=2e-4, steps=800_000)

PRESETS: dict[str, Flags] = {
    "cpu": CPU,
    "cuda": CUDA,
    "films": FILMS,
    "pixels": PIXELS,
    "autoencoder": AUTOENCODER,
    "ucf101": UCF101,
    "bair": BAIR,
    "kinetics600": KINETICS600,
    "text_small": TEXT_SMALL,
    "text_large": TEXT_LARGE,
    "text_9x128": TEXT_9X128}

# ---- what fits on a GPU: GiB of its memory that must be free, clips in a micro-batch, --checkpointing -----

FITS: dict[str, list[tuple[float, int, bool]]] = {  # peaks counted on fake tensors, a fifth more, and 1 GiB
    "cuda": [(5.0, 32, False), (0.0, 32, True)],
    "pixels": [
        (45.0, 32, False),
        (24.0, 16, False),
        (13.0, 32, True),
        (8.0, 16, True),
        (0.0, 8, True)]}

# ---- how their checkpoints are sampled: for all modes, then what a mode has of its own -------------------

SMALL_FRAMES: Flags = dict(steps=33, delta=0.6, w_t=0.0, w_r=1.5, w_r_power=-0.5)

DIGITS: dict[str, Flags] = {
    "all": dict(steps=50, w_t=1.0, w_t_from=-3.0, w_r=3.0),
    "generate": dict(delta=0.3),
    "predict": dict(w_r=10.0),
    "super_resolve": SMALL_FRAMES,
    "cascade": SMALL_FRAMES}

BAIR_W_R, KINETICS_W_R = dict(w_r=50.0), dict(w_r=9.0)  # for whole frames, not for small ones

SAMPLING: dict[str, dict[str, Flags]] = {
    "cpu": DIGITS,
    "cuda": DIGITS,
    "films": {"all": dict(steps=50)},
    "pixels": {"all": dict(steps=50)},
    "autoencoder": {},
    "ucf101": {"all": dict(steps=256, gamma=0.1)},
    "bair": {"all": dict(steps=256, delta=0.1, overlap=1),
             "predict": BAIR_W_R, "extend": BAIR_W_R, "interpolate": BAIR_W_R},
    "kinetics600": {"all": dict(steps=128, delta=0.1, overlap=5),
                    "predict": KINETICS_W_R, "extend": KINETICS_W_R, "interpolate": KINETICS_W_R},
    "text_small": {"all": dict(steps=256, gamma=0.3)},
    "text_large": {"all": dict(steps=256, gamma=0.3)},
    "text_9x128": {"all": dict(steps=256, gamma=0.3)}}
