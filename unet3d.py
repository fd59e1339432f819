"""Section 3: the 3D U-Net factorized over space and time.

No convolution spans time and time is never down-sampled: every 3x3 convolution is 1x3x3 and runs with the
frames folded into the batch, so tensors inside are ((b f), c, h, w). Only temporal attention looks across
frames, and its mask keeps the independent image frames of joint training (4.3.1) to themselves. Read it from
the bottom up.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class UNetConfig:
    """The architecture of the U-Net (section 3)."""
    channels: int = 1  # [1, 64] channels of a frame: 1 grey, 3 RGB
    frames: int = 16  # [1, 1024] frames of a training clip: the reach of the relative positions
    size: int = 64  # [8, 1024] height and width of a frame in pixels
    dim: int = 128  # [8, 4096] base channels
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)  # [1, 64] multiples of dim, one for each level of the U-Net
    blocks: int = 2  # [1, 16] residual blocks at each level, down and up
    attention_resolutions: tuple[int, ...] = (8, 16, 32)  # [1, 1024] heights of the feature maps that attend
    head_dim: int = 64  # [8, 512] channels of an attention head
    emb_dim: int = 1024  # [8, 8192] width of the embedding of condition and log-SNR
    emb_layers: int = 4  # [1, 8] layers of the MLP that makes it
    cond_dim: int = 64  # [0, 8192] width of a token embedding; 0 makes an unconditional model
    dropout: float = 0.0  # [0, 1) dropout in the residual blocks
    patch: int = 1  # [1, 16] space-to-depth factor at the entry; 1 is the paper
    scale_shift: bool = False  # let the embedding scale and shift the norm instead of being added
    checkpointing: bool = False  # recompute the blocks in the backward pass: less memory, a third more time

    def heights(self) -> list[int]:
        """The height of each level's feature map. Raises ValueError if size does not fit the levels."""
        levels = len(self.dim_mults)
        factor = self.patch * 2 ** (levels - 1)
        if self.size % factor:
            raise ValueError(f"--size gives the network frames of {self.size} px, which are not divisible by "
                             f"{factor}, as --dim_mults and --patch need")
        heights = [self.size // self.patch // 2**level for level in range(levels)]
        given = list(self.attention_resolutions)
        if given and not any(height in given for height in heights):
            raise ValueError(f"--attention_resolutions {given} names none of the levels' heights, {heights}")
        return heights


class Norm(nn.GroupNorm):
    """GroupNorm of each frame alone, ((b f), c, h, w): statistics over frames would leak past the mask."""
    def __init__(self, dim: int):
        # 32 groups where dim is a multiple of 64. Else fewer, so that a group has two channels or more: the
        # norm of a single channel would take the added embedding out again
        groups = max(1, math.gcd(dim, 64) // 2)
        super().__init__(groups, dim)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:  # its sums need float32's digits, what follows does not
            return super().forward(x.float()).to(x.dtype)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda", enabled=False):  # CUDA's kernel sums in float32 whatever it reads
            x = nnf.group_norm(x, self.num_groups, weight, bias, self.eps)
        return x.contiguous(memory_format=torch.channels_last)  # which that kernel does not keep


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters zero, so that what it is added to starts unchanged."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Norm, SiLU, 1x3x3 conv, twice, plus a skip; the embedding enters each frame in between (section 3).

    after1, after2: what to do with the result of each convolution; nothing here, see magicvideo.py.
    """
    def __init__(self, dim_in: int, dim: int, config: UNetConfig):
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm1 = Norm(dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 3, padding=1)
        self.emb = nn.Linear(config.emb_dim, 2 * dim if config.scale_shift else dim)
        self.norm2 = Norm(dim)
        self.conv2 = zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor,
                after1: Callable = nn.Identity(), after2: Callable = nn.Identity()) -> Tensor:
        h = self.conv1(nnf.silu(self.norm1(x)))
        h = after1(h)
        e = rearrange(self.emb(emb), "b f c -> (b f) c 1 1")
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.conv2(self.dropout(nnf.silu(h)))
        return self.skip(x) + after2(h)


class SpatialMix(nn.Module):
    """Softmax attention over the pixels of each frame; q, k, v: ((b f), pixels, heads, d). No frame sees
    another, so mask, which is for TemporalMix, is not needed.
    """
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (rearrange(y, "bf n heads d -> bf heads n d") for y in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            if not q.is_cuda:  # the CPU kernel's bf16 backward pass takes three times as long as float32's
                q, k, v = q.float(), k.float(), v.float()
            out = nnf.scaled_dot_product_attention(q, k, v)
        return rearrange(out, "bf heads n d -> bf n heads d")


class TemporalMix(nn.Module):
    """Softmax attention over frames at each pixel with Shaw et al.'s relative positions on keys and values.

    score_ij = q_i (k_j + a^K_ij) / sqrt(d), out_i = sum_j p_ij (v_j + a^V_ij), a_ij looked up by j - i
    (section 3).
    """
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.reach = config.frames - 1  # no clipping inside the training length; further away it clips
        tables = 0.02 * torch.randn(2, 2 * self.reach + 1, config.head_dim)
        self.key_table = nn.Parameter(tables[0])
        self.value_table = nn.Parameter(tables[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        heads = q.shape[2]
        f = len(mask)
        q, k, v = (rearrange(y, "(b f) n heads d -> b f (n heads) d", f=f) for y in (q, k, v))  # no copies
        frame = torch.arange(f, device=q.device)
        offset = (frame - frame[:, None]).clamp(-self.reach, self.reach)
        row = offset + self.reach  # of a table, for j - i
        scores = torch.einsum("b i n d, b j n d -> b n i j", q, k)
        a = self.key_table[row].to(q.dtype)
        scores = scores + torch.einsum("b i n d, i j d -> b n i j", q, a)
        scores = scores.float() / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~mask, -torch.inf)
        p = scores.softmax(-1).to(v.dtype)
        out = torch.einsum("b n i j, b j n d -> b i n d", p, v)
        a = self.value_table[row].to(v.dtype)
        out = out + torch.einsum("b n i j, i j d -> b i n d", p, a)
        return rearrange(out, "b f (n heads) d -> (b f) n heads d", heads=heads)


class Attention(nn.Module):
    """Norm, q/k/v, mixing over space or time, zero-initialised projection, residual; ((b f), c, h, w)."""
    def __init__(self, dim: int, head_dim: int, mix: nn.Module):
        super().__init__()
        self.heads = max(1, dim // head_dim)
        inner = self.heads * head_dim
        self.norm = Norm(dim)
        self.mix = mix
        self.q = nn.Conv2d(dim, inner, 1, bias=False)
        self.k = nn.Conv2d(dim, inner, 1, bias=False)
        self.v = nn.Conv2d(dim, inner, 1, bias=False)
        self.out = zero(nn.Conv2d(inner, dim, 1))

    def branch(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "bf (heads d) h w -> bf (h w) heads d", heads=self.heads)
                   for layer in (self.q, self.k, self.v))
        h = self.mix(q, k, v, mask)
        h = rearrange(h, "bf (h w) heads d -> bf (heads d) h w", h=x.shape[2])
        return self.out(h)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.branch(x, mask)


class Block(nn.Module):
    """A residual block and, where the level attends, spatial and then temporal attention (section 3)."""
    def __init__(self, dim_in: int, dim: int, attend: bool, config: UNetConfig):
        super().__init__()
        self.checkpointing = config.checkpointing
        self.res = ResBlock(dim_in, dim, config)
        self.attention = nn.ModuleList()
        if attend:
            self.attention.append(Attention(dim, config.head_dim, SpatialMix()))
            self.attention.append(Attention(dim, config.head_dim, TemporalMix(config)))

    def run(self, x: Tensor, emb: Tensor, mask: Tensor) -> Tensor:
        x = self.res(x, emb)
        for attention in self.attention:
            x = attention(x, mask)
        return x

    def forward(self, x: Tensor, *context) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run, x, *context, use_reentrant=False)
        return self.run(x, *context)


class Embedding(nn.Module):
    """Condition and log-SNR as one vector (b, k, emb_dim), for per_frame; k is 1, m or frames.

    log-SNR is 0-d or (b, 1, 1 or frames, 1, 1), tokens are (b, m, l, cond_dim) with m 1 or 1 + num_images.
    Attention pooling of the tokens without any bias, so that c = 0 and no condition are the same thing.
    """
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.emb_dim = config.emb_dim
        queries = 8
        if config.cond_dim:  # no idle parameters without a condition: DistributedDataParallel refuses them
            query = torch.randn(queries, config.cond_dim) * config.cond_dim**-0.5
            self.query = nn.Parameter(query)
            self.value = nn.Linear(queries * config.cond_dim, config.emb_dim, bias=False)
        layers = []
        for _ in range(config.emb_layers):
            layers.append(nn.Linear(config.emb_dim, config.emb_dim))
            layers.append(nn.SiLU())
        self.mlp = nn.Sequential(*layers[:-1])

    def pool(self, tokens: Tensor) -> Tensor:
        scores = torch.einsum("b k l d, n d -> b k n l", tokens, self.query)
        padding = (tokens == 0).all(-1)[:, :, None]
        p = scores.masked_fill(padding, -1e4).softmax(-1)  # finite: c = 0 is all padding
        pooled = torch.einsum("b k n l, b k l d -> b k n d", p, tokens)
        return self.value(pooled.flatten(2))

    def forward(self, logsnr: Tensor, batch: int, tokens: Tensor | None) -> Tensor:
        angle = torch.atan(torch.exp(-logsnr.float() / 2))
        u = angle / (math.pi / 2)  # in [0, 1]
        if u.dim() == 0:
            u = u.reshape(1, 1)
        u = u.flatten(1)  # (1 or b, 1 or frames)
        frequencies = 10 ** torch.linspace(0, -4, (self.emb_dim + 1) // 2, device=u.device)
        angles = 1000 * u[..., None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        h = waves[..., :self.emb_dim].expand(batch, -1, -1)
        if tokens is not None:
            c = self.pool(tokens)
            frames = max(h.shape[1], c.shape[1])
            h = h + per_frame(c, frames)
        return self.mlp(h)


def isolate(frames: int, num_images: int, device: torch.device) -> Tensor:
    """Which frame may see which, (frames, frames): video frames each other, an image only itself (4.3.1)."""
    video = torch.arange(frames, device=device) < frames - num_images
    both_video = video & video[:, None]
    itself = torch.eye(frames, dtype=torch.bool, device=device)
    return both_video | itself


def per_frame(y: Tensor, frames: int) -> Tensor:
    """(b, k, ...), one for the clip and then one for each image frame, as (b, frames, ...). If k is frames,
    each frame has its own already.
    """
    images = y[:, 1:]
    video = y[:, :1].repeat_interleave(frames - images.shape[1], 1)
    return torch.cat([video, images], 1)


class UNet3D(nn.Module):
    """The network of section 3: (z, logsnr, cond, num_images) -> eps or v, shaped like z.

    z: (B, C, F + num_images, H, W); F may differ from config.frames. logsnr: 0-d or (B, 1, 1, 1, 1), or
    (B, 1, F + num_images, 1, 1) where each frame has a noise level of its own. cond: token embeddings (B, L,
    D), or (B, 1 + num_images, L, D) with the clip's caption first and then one for each image frame; None is
    c = 0. block and embedding are what another network exchanges, magicvideo.py.
    """
    def __init__(self, config: UNetConfig, block: type[nn.Module] = Block,
                 embedding: type[nn.Module] = Embedding):
        super().__init__()
        self.config = config
        channels = config.channels * config.patch**2
        dims = [config.dim * mult for mult in config.dim_mults]
        attends = [height in config.attention_resolutions for height in config.heights()]
        self.embedding = embedding(config)
        self.entry = nn.Conv2d(channels, dims[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = dims[0]
        for dim, attend in zip(dims, attends):
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(block(width, dim, attend, config))
                width = dim
            self.down.append(blocks)
        self.middle = nn.ModuleList([block(width, width, True, config),
                                     block(width, width, False, config)])
        self.narrow = nn.ModuleList()
        for dim, below in pairwise(dims):
            self.narrow.append(nn.Conv2d(below, dim, 1))
        self.up = nn.ModuleList()
        for dim, attend in zip(dims, attends):
            blocks = [block(2 * dim, dim, attend, config) for _ in range(config.blocks)]
            self.up.append(nn.ModuleList(blocks))
        last = nn.Conv2d(dims[0], channels, 3, padding=1)
        self.exit = nn.Sequential(Norm(dims[0]), nn.SiLU(), zero(last))

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None,
                num_images: int = 0) -> Tensor:
        b, c, f, h, w = z.shape  # f counts the image frames too
        p = self.config.patch
        assert c * p**2 == self.entry.in_channels, (z.shape, self.entry)
        assert num_images < f, (num_images, z.shape)
        if cond is not None and cond.dim() == 3:
            cond = cond[:, None]  # one caption for all frames
        assert cond is None or cond.shape[1] in (1, 1 + num_images), (cond.shape, num_images)
        context = self.context(z, logsnr, cond, num_images)
        x = rearrange(z.float(), "b c f (h p) (w q) -> (b f) (c p q) h w", p=p, q=p)  # space-to-depth
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.u_net(x, *context).float()
        x = rearrange(x, "(b f) (c p q) h w -> b c f (h p) (w q)", b=b, p=p, q=p)
        return x.to(z.dtype)

    def context(self, z: Tensor, logsnr: Tensor, tokens: Tensor | None, num_images: int) -> tuple:
        """What every block hears beside x: the embedding of each frame, and which frame may see which."""
        frames = z.shape[2]
        logsnr = logsnr.to(z.device, non_blocking=z.is_cuda)  # a sampler's is on the CPU
        emb = self.embedding(logsnr, len(z), tokens)  # b k emb_dim, k = 1, 1 + num_images or f
        emb = nnf.silu(per_frame(emb, frames))
        return emb, isolate(frames, num_images, z.device)

    def u_net(self, x: Tensor, *context) -> Tensor:
        x = self.entry(x)  # (b f) dim h w
        skips = []
        for level, blocks in enumerate(self.down):
            if level > 0:
                x = nnf.avg_pool2d(x, 2)
            for block in blocks:
                x = block(x, *context)
                skips.append(x)
        for block in self.middle:
            x = block(x, *context)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                x = torch.cat([x, skips.pop()], 1)
                x = block(x, *context)
            if level > 0:
                x = self.narrow[level - 1](x)
                with torch.autocast("cuda", enabled=False):  # it and what follows would be in float32
                    x = nnf.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.exit(x)
