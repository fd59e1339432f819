"""MagicVideo (Zhou et al. 2022): the network of unet3d.py with another block and another embedding.

Convolutions are 2D and shared by all frames; the adaptor, a scale and a shift for each, tells them apart.
In a block space and time are two branches beside each other, and a frame sees none that comes after it.
Captions enter by cross-attention, the speed by an embedding. Read it from the bottom up.
"""
import dataclasses
import functools
from typing import Literal

import torch
import torch.nn.functional as nnf
from einops import rearrange, repeat
from torch import Tensor, nn

from unet3d import Attention, Block, Embedding, Norm, SpatialMix, UNet3D, UNetConfig, per_frame, zero


@dataclasses.dataclass
class MagicVideoConfig(UNetConfig):
    """What MagicVideo adds to the architecture."""
    mask: Literal["before", "after"] = "before"  # of magicvideo: before the softmax, or after it as in the paper


class Adaptor(nn.Module):
    """The distribution adaptor z^i = S^i * z^i + B^i of frame i, at first S = 1, B = 0; ((b f), c, h, w).

    The last num_images frames pass as they are; a clip shorter than config.frames takes the first rows.
    """
    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(config.frames, dim))
        self.shift = nn.Parameter(torch.zeros(config.frames, dim))

    def forward(self, x: Tensor, frames: int, num_images: int) -> Tensor:
        def rows(table, image):
            video = table[:frames - num_images]
            table = nnf.pad(video, (0, 0, 0, num_images), value=image)
            return repeat(table, "f c -> (b f) c 1 1", b=len(x) // frames).to(x.dtype)
        return rows(self.scale, 1.0) * x + rows(self.shift, 0.0)


class DirectedMix(nn.Module):
    """Attention over frames at each pixel, M * softmax(q k / sqrt(d)): frame p sees frames q <= p alone.

    q, k, v: ((b f), pixels, heads, d). With order "before" M also acts inside the softmax; with "after" it
    does not, so that rows do not sum to 1 and later frames, though never seen, share the normalisation.
    """
    def __init__(self, order: Literal["before", "after"]):
        super().__init__()
        self.order = order

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        f = len(mask)
        heads = q.shape[2]
        q, k, v = (rearrange(y, "(b f) n heads d -> b f (n heads) d", f=f) for y in (q, k, v))
        scores = torch.einsum("b i n d, b j n d -> b n i j", q, k)
        scores = scores.float() / q.shape[-1] ** 0.5
        seen = mask.tril()  # an image frame: itself, in both cases
        if self.order == "before":
            mask = seen
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1) * seen
        out = torch.einsum("b n i j, b j n d -> b i n d", p.to(v.dtype), v)
        return rearrange(out, "b f (n heads) d -> (b f) n heads d", heads=heads)


class CrossAttention(nn.Module):
    """Softmax attention of the pixels ((b f), c, h, w) to their frame's tokens ((b f), l, cond_dim).

    Padding, tokens that are all zero, is left out, and no layer behind the tokens has a bias: c = 0 adds 0.
    """
    def __init__(self, dim: int, config: UNetConfig):
        super().__init__()
        self.heads = max(1, dim // config.head_dim)
        inner = self.heads * config.head_dim
        self.norm = Norm(dim)
        self.q = nn.Conv2d(dim, inner, 1, bias=False)
        self.k = nn.Linear(config.cond_dim, inner, bias=False)
        self.v = nn.Linear(config.cond_dim, inner, bias=False)
        self.out = zero(nn.Conv2d(inner, dim, 1, bias=False))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        q = self.q(self.norm(x))
        q = rearrange(q, "bf (heads d) h w -> bf heads (h w) d", heads=self.heads)
        k = rearrange(self.k(tokens), "bf l (heads d) -> bf heads l d", heads=self.heads)
        v = rearrange(self.v(tokens), "bf l (heads d) -> bf heads l d", heads=self.heads)
        scores = (q @ k.mT).float() / q.shape[-1] ** 0.5
        padding = (tokens == 0).all(-1)
        scores = scores.masked_fill(padding[:, None, None], -1e4)  # finite: c = 0 is all padding
        p = scores.softmax(-1).to(v.dtype)
        out = rearrange(p @ v, "bf heads (h w) d -> bf (heads d) h w", h=x.shape[2])
        return self.out(out)


class MagicBlock(Block):
    """A residual block with adaptors and, where the level attends, space and time as parallel branches."""
    def __init__(self, dim_in: int, dim: int, attend: bool, config: MagicVideoConfig):
        super().__init__(dim_in, dim, False, config)  # not its attention, one after the other
        self.attend = attend
        self.adaptors = nn.ModuleList([Adaptor(dim, config), Adaptor(dim, config)])
        if attend:
            self.adaptors.append(Adaptor(dim, config))
            self.space = Attention(dim, config.head_dim, SpatialMix())
            self.time = Attention(dim, config.head_dim, DirectedMix(config.mask))
            if config.cond_dim:
                self.cross = CrossAttention(dim, config)

    def run(self, x: Tensor, emb: Tensor, mask: Tensor, tokens: Tensor | None,
            num_images: int) -> Tensor:
        adapt = [functools.partial(adaptor, frames=len(mask), num_images=num_images)
                 for adaptor in self.adaptors]
        x = self.res(x, emb, adapt[0], adapt[1])
        if not self.attend:
            return x
        spatial = self.space.branch(x, mask)
        spatial = adapt[2](spatial)
        if tokens is not None:
            spatial = spatial + self.cross(x + spatial, tokens)
        return x + spatial + self.time.branch(x, mask)


class SpeedEmbedding(Embedding):
    """Frames per second and log-SNR as one vector; captions are not pooled, cross-attention hears them.

    Linear(SiLU(Linear)) of the last token, where text.embed puts the speed; all zero, it adds nothing.
    """
    def __init__(self, config: UNetConfig):
        super().__init__(dataclasses.replace(config, cond_dim=0))  # without the layers of the pooling
        if config.cond_dim:
            first = nn.Linear(config.cond_dim, config.emb_dim)
            second = nn.Linear(config.emb_dim, config.emb_dim)
            self.speed = nn.Sequential(first, nn.SiLU(), second)

    def pool(self, tokens: Tensor) -> Tensor:
        speed = tokens[:, :, -1]  # b k cond_dim
        said = (speed != 0).any(-1, keepdim=True)
        return self.speed(speed) * said


class MagicVideo(UNet3D):
    """UNet3D's call and topology with MagicVideo's blocks: (z, logsnr, cond, num_images) -> like z.

    The last token of cond is the speed, the others are the caption. Raises ValueError for a clip of more
    frames than config.frames: the adaptors have no row for them.
    """
    def __init__(self, config: MagicVideoConfig):
        super().__init__(config, MagicBlock, SpeedEmbedding)

    def context(self, z: Tensor, logsnr: Tensor, tokens: Tensor | None, num_images: int) -> tuple:
        """UNet3D's, then each frame's caption ((b f), l - 1, cond_dim) and the number of image frames."""
        frames = z.shape[2]
        video = frames - num_images
        known = self.config.frames
        if video > known:
            raise ValueError(f"a clip of {video} frames was given, the adaptors know {known}")
        emb, mask = super().context(z, logsnr, tokens, num_images)
        if tokens is not None:
            captions = tokens[:, :, :-1]
            tokens = per_frame(captions, frames).flatten(0, 1)
        return emb, mask, tokens, num_images


def build_network(arch: str, config: MagicVideoConfig) -> UNet3D:
    """The network of --arch."""
    if arch == "magicvideo":
        return MagicVideo(config)
    return UNet3D(config)
