"""The network of section 3 against loops over frames and pixels, and which frames must not hear of which."""
import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from unet3d import (Attention, Block, Embedding, Norm, ResBlock, SpatialMix, TemporalMix, UNet3D, UNetConfig,
                    isolate, per_frame)

VIDEO, IMAGES = 3, 2  # frames of the usual clip: 0 1 2 are video, 3 4 are images


def small(kind: type = UNetConfig, **changes) -> UNetConfig:
    values = dict(channels=2, frames=4, size=8, dim=64, dim_mults=(1, 1), blocks=1,
                  attention_resolutions=(8,), head_dim=16, emb_dim=16, emb_layers=2, cond_dim=6)
    return kind(**values | changes)


def wild(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter random, zero-initialised ones too, or nothing could leak through."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.numel():
            std = 1.0 if "table" in name else 0.5 if p.dim() == 1 else p[0].numel() ** -0.5
            nn.init.normal_(p, std=std, generator=generator)
    return module.eval().requires_grad_(False)


def network(**changes) -> UNet3D:
    return wild(UNet3D(small(**changes)))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2, frames: int = VIDEO + IMAGES,
           captions: int = 1 + IMAGES) -> tuple[Tensor, Tensor, Tensor]:
    """z, logsnr and the captions' tokens, everything different everywhere."""
    logsnr = torch.linspace(-3, 2, batch).view(-1, 1, 1, 1, 1)
    return noise(batch, 2, frames, 8, 8), logsnr, noise(batch, captions, 5, 6, seed=2)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def changed(a: Tensor, b: Tensor) -> list[int]:
    """The frames in which two videos differ in any bit."""
    return [i for i in range(a.shape[2]) if not torch.equal(a[:, :, i], b[:, :, i])]


# ---- attention, against loops ------------------------------------------------------------------------------


def attend_by_loops(q: Tensor, k: Tensor, v: Tensor, sees, key_term, value_term) -> Tensor:
    """One head over tokens (n, d), the sums of Shaw et al. written out; the terms are functions of (i, j)."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if sees(i, j)]
        scores = [float(q[i] @ (k[j] + key_term(i, j))) / math.sqrt(q.shape[1]) for j in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        for j, weight in zip(seen, weights):
            out[i] += weight / sum(weights) * (v[j] + value_term(i, j))
    return out


def sees(frames: int, num_images: int):
    video = frames - num_images
    return lambda i, j: i == j or (i < video and j < video)


def shaw_term(table: Tensor, frames: int):
    reach = frames - 1
    return lambda i, j: table[max(-reach, min(reach, j - i)) + reach]


def nothing(i: int, j: int) -> float:
    return 0.0


@pytest.mark.parametrize("trained, frames, num_images", [
    (4, 4, 0), (4, 3, 0), (4, 6, 2), (3, 7, 0), (2, 6, 2), (1, 3, 1)])
def test_temporal_attention_is_shaws_sum_over_the_frames_that_are_seen(trained, frames, num_images):
    b, pixels, heads, d = 2, 2, 2, 3
    mix = wild(TemporalMix(small(frames=trained, head_dim=d)))
    q, k, v = (noise(b * frames, pixels, heads, d, seed=s) for s in range(3))
    out = mix(q, k, v, isolate(frames, num_images, q.device))
    assert mix.key_table.shape == mix.value_table.shape == (2 * trained - 1, d)
    for clip in range(b):
        for pixel in range(pixels):
            for head in range(heads):
                one = (slice(clip * frames, (clip + 1) * frames), pixel, head)
                expected = attend_by_loops(q[one], k[one], v[one], sees(frames, num_images),
                                           shaw_term(mix.key_table, trained),
                                           shaw_term(mix.value_table, trained))
                assert close(out[one], expected)


def test_spatial_attention_is_the_sum_over_the_pixels_of_one_frame():
    q, k, v = (noise(3, 5, 2, 4, seed=s) for s in range(3))
    out = SpatialMix()(q, k, v, isolate(3, 0, q.device))
    for frame in range(3):
        for head in range(2):
            one = (frame, slice(None), head)
            assert close(out[one],
                         attend_by_loops(q[one], k[one], v[one], lambda i, j: True, nothing, nothing))


@pytest.mark.parametrize("mix", [SpatialMix, TemporalMix])
def test_an_attention_block_is_norm_heads_loop_projection_and_residual(mix):
    frames, d = 3, 4
    mixes = {SpatialMix: SpatialMix(), TemporalMix: TemporalMix(small(head_dim=d, frames=frames))}
    layer = wild(Attention(8, d, mixes[mix]))
    x = noise(2 * frames, 8, 2, 3)  # not square: rows and columns must not be confused
    h = layer.norm(x).flatten(2)
    q, k, v = (torch.einsum("o c, f c n -> f n o", conv.weight[:, :, 0, 0], h)
               for conv in (layer.q, layer.k, layer.v))
    mixed, table = torch.zeros_like(v), layer.mix.key_table if mix is TemporalMix else None
    key = nothing if table is None else shaw_term(layer.mix.key_table, frames)
    value = nothing if table is None else shaw_term(layer.mix.value_table, frames)
    clips = [slice(0, frames), slice(frames, 2 * frames)]
    groups = [(c, n) for c in clips for n in range(6)]  # at each pixel, over frames
    if table is None:
        groups = [(f, slice(None)) for f in range(2 * frames)]  # in each frame, over pixels
    for group in groups:
        for channels in (slice(0, d), slice(d, 2 * d)):  # two heads
            one = (*group, channels)
            mixed[one] = attend_by_loops(q[one], k[one], v[one], lambda i, j: True, key, value)
    out = torch.einsum("o c, f n c -> f o n", layer.out.weight[:, :, 0, 0], mixed) + layer.out.bias[:, None]
    assert close(layer(x, isolate(frames, 0, x.device)), x + out.view_as(x))


@pytest.mark.parametrize("frames, num_images", [(1, 0), (5, 0), (5, 2), (5, 4)])
def test_the_mask_shows_video_frames_each_other_and_an_image_frame_itself(frames, num_images):
    mask, may = isolate(frames, num_images, torch.device("cpu")), sees(frames, num_images)
    assert mask.tolist() == [[may(i, j) for j in range(frames)] for i in range(frames)]


# ---- joint training on images: who hears of whom -----------------------------------------------------------


@pytest.mark.parametrize("scale_shift", [False, True])
def test_an_image_frame_cannot_change_anything_else(scale_shift):
    model, (z, logsnr, cond) = network(scale_shift=scale_shift), inputs()
    before = model(z, logsnr, cond, IMAGES)
    for image in range(VIDEO, VIDEO + IMAGES):
        other = z.clone()
        other[:, :, image] = 30 * noise(*z[:, :, image].shape, seed=7) + 5
        assert changed(before, model(other, logsnr, cond, IMAGES)) == [image]


def test_a_video_frame_changes_every_video_frame_and_no_image():
    model, (z, logsnr, cond) = network(), inputs()
    before = model(z, logsnr, cond, IMAGES)
    for frame in range(VIDEO):
        other = z.clone()
        other[:, :, frame] = noise(*z[:, :, frame].shape, seed=7)
        assert changed(before, model(other, logsnr, cond, IMAGES)) == list(range(VIDEO))


def test_an_image_frame_equals_itself_as_a_video_of_one_frame():
    model, (z, logsnr, cond) = network(), inputs()
    together = model(z, logsnr, cond, IMAGES)
    for k in range(IMAGES):
        frame = slice(VIDEO + k, VIDEO + k + 1)
        assert close(together[:, :, frame], model(z[:, :, frame], logsnr, cond[:, 1 + k]))


def test_the_video_frames_equal_the_video_without_image_frames():
    model, (z, logsnr, cond) = network(), inputs()
    assert close(model(z, logsnr, cond, IMAGES)[:, :, :VIDEO], model(z[:, :, :VIDEO], logsnr, cond[:, 0]))


def test_each_caption_changes_its_own_frames_alone():
    model, (z, logsnr, cond) = network(), inputs()
    before = model(z, logsnr, cond, IMAGES)
    for caption, frames in enumerate([[0, 1, 2], [3], [4]]):
        other = cond.clone()
        other[:, caption] = noise(2, 5, 6, seed=9)
        after = model(z, logsnr, other, IMAGES)
        assert changed(before, after) == frames
        assert (before - after)[:, :, frames].abs().amax((0, 1, 3, 4)).min() > 1e-2  # heard, not only rounded


def test_one_caption_holds_for_all_frames():
    model, (z, logsnr, cond) = network(), inputs(captions=1)
    assert close(model(z, logsnr, cond[:, 0], IMAGES), model(z, logsnr, cond.expand(-1, 3, -1, -1), IMAGES))
    assert close(model(z, logsnr, cond[:, 0]), model(z, logsnr, cond))


def test_captions_that_do_not_match_the_image_frames_are_refused():
    model, (z, logsnr, cond) = network(), inputs()
    for num_images in (0, 1, 3):
        with pytest.raises(AssertionError):
            model(z, logsnr, cond, num_images)  # three captions: the clip's and two images'


@pytest.mark.parametrize("num_images", [3, 4])
def test_a_clip_without_a_video_frame_is_refused(num_images):
    with pytest.raises(AssertionError):
        network()(noise(1, 2, 3, 8, 8), torch.tensor(0.0), None, num_images)


# ---- clips and frames --------------------------------------------------------------------------------------


def test_permuting_the_clips_permutes_the_output():
    model, (z, logsnr, cond), order = network(), inputs(batch=3), [2, 0, 1]
    assert close(model(z, logsnr, cond, IMAGES)[order], model(z[order], logsnr[order], cond[order], IMAGES))


def test_a_clip_does_not_depend_on_the_others():
    model, (z, logsnr, cond) = network(), inputs()
    before = model(z, logsnr, cond, IMAGES)
    z[1], logsnr[1], cond[1] = 10 * noise(*z[1].shape, seed=7), 5.0, noise(*cond[1].shape, seed=8)
    after = model(z, logsnr, cond, IMAGES)
    assert torch.equal(before[0], after[0]) and not close(before[1], after[1])


@pytest.mark.parametrize("dim", [8, 64, 96])
def test_each_frame_is_normalised_alone(dim):
    norm, x = wild(Norm(dim)), noise(3, dim, 4, 4) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1) + 2
    out = norm(x)
    for frame in range(3):
        for part in torch.arange(dim).chunk(norm.num_groups):
            group = x[frame, part]
            expected = (group - group.mean()) / (group.var(unbiased=False) + 1e-5).sqrt()
            expected = expected * norm.weight[part, None, None] + norm.bias[part, None, None]
            assert torch.allclose(out[frame, part], expected, rtol=1e-3, atol=1e-3)


def test_without_temporal_attention_no_layer_spans_time():
    model, (z, logsnr, cond) = network(), inputs(captions=1)
    for layer in model.modules():
        if isinstance(layer, Attention) and isinstance(layer.mix, TemporalMix):
            nn.init.zeros_(layer.out.weight)
    other = z.clone()
    other[:, :, 1] = 30 * noise(*z[:, :, 1].shape, seed=7)
    assert changed(model(z, logsnr, cond), model(other, logsnr, cond)) == [1]


def test_the_order_of_the_frames_is_known_through_the_tables_alone():
    model, (z, logsnr, cond) = network(), inputs(captions=1)
    backwards = [4, 3, 2, 1, 0]
    assert not close(model(z[:, :, backwards], logsnr, cond), model(z, logsnr, cond)[:, :, backwards])
    for name, p in model.named_parameters():
        if "table" in name:
            nn.init.zeros_(p)
    assert close(model(z[:, :, backwards], logsnr, cond), model(z, logsnr, cond)[:, :, backwards])


def same_far_away(module: nn.Module) -> nn.Module:
    """The module with one table row for "far before" and "far after": only near offsets tell frames apart."""
    for name, p in module.named_parameters():
        if "table" in name:
            p[-1] = p[0]
    return module


def shifted(still: Tensor, event: Tensor, at: int, length: int) -> Tensor:
    """A clip (length, ...) that stands still but for an event."""
    clip = still.repeat(length, *(1,) * (still.dim() - 1))
    clip[at:at + len(event)] = event
    return clip


def test_temporal_attention_knows_no_absolute_time():
    mix, length, mask = (same_far_away(wild(TemporalMix(small(frames=3, head_dim=4)))), 14,
                         torch.ones(14, 14).bool())
    early, late = ([shifted(noise(1, 2, 1, 4, seed=s), noise(2, 2, 1, 4, seed=s + 3), at, length)
                    for s in range(3)] for at in (4, 7))
    before, after = mix(*early, mask), mix(*late, mask)
    assert close(before[2:-5], after[5:-2])  # two frames from the ends all offsets occur
    assert not close(before[2:-5], after[2:-5])


def test_the_network_knows_no_absolute_time():
    # Three temporal layers of reach 2: the clip's ends are felt 6 frames inwards, the event 6 outwards.
    model, length = same_far_away(network(frames=3, dim_mults=(1,))), 29
    still, event = noise(1, 2, 8, 8), noise(2, 2, 8, 8, seed=2)
    early, late = (shifted(still, event, at, length).transpose(0, 1)[None] for at in (12, 15))
    before, after = model(early, torch.tensor(1.0)), model(late, torch.tensor(1.0))
    assert close(before[:, :, 6:-9], after[:, :, 9:-6])
    assert not close(before[:, :, 6:-9], after[:, :, 6:-9])


@pytest.mark.parametrize("frames", [1, 2, 4, 9])
def test_any_number_of_frames_can_be_sampled(frames):
    out = network()(noise(1, 2, frames, 8, 8), torch.tensor(0.0))
    assert out.shape == (1, 2, frames, 8, 8) and out.isfinite().all()


@pytest.mark.parametrize("height, width", [(4, 4), (8, 24), (16, 16)])
def test_any_multiple_of_the_smallest_map_can_be_sampled(height, width):
    out = network()(noise(1, 2, 2, height, width), torch.tensor(0.0))
    assert out.shape == (1, 2, 2, height, width) and out.isfinite().all()


# ---- condition and log-SNR ---------------------------------------------------------------------------------


def test_no_condition_is_exactly_c_equal_to_zero():
    model, (z, logsnr, cond) = network(), inputs()
    none = model(z, logsnr, None, IMAGES)
    assert torch.equal(none, model(z, logsnr, torch.zeros(2, 5, 6), IMAGES))
    assert close(none, model(z, logsnr, torch.zeros_like(cond), IMAGES))
    assert torch.equal(model.embedding.pool(torch.zeros(2, 1, 5, 6)), torch.zeros(2, 1, 16))
    assert not close(none, model(z, logsnr, cond, IMAGES))


def test_a_dropped_caption_drops_that_frames_condition_alone():
    model, (z, logsnr, cond) = network(), inputs()
    cond[:, 1] = 0
    out = model(z, logsnr, cond, IMAGES)
    assert close(out[:, :, 3:4], model(z[:, :, 3:4], logsnr))
    assert close(out[:, :, 4:5], model(z[:, :, 4:5], logsnr, cond[:, 2]))


def test_padding_does_not_matter():
    pool, tokens = network().embedding.pool, noise(2, 3, 5, 6)
    padded = torch.cat([tokens[:, :, :2], torch.zeros(2, 3, 4, 6), tokens[:, :, 2:]], 2)
    assert torch.allclose(pool(tokens), pool(padded), atol=1e-6)


def test_attention_pooling_is_a_weighted_mean_for_each_query():
    embedding, tokens = network().embedding, noise(1, 1, 5, 6)
    tokens[0, 0, 4] = 0
    means = []
    for query in embedding.query:
        weights = [math.exp(float(query @ token)) for token in tokens[0, 0, :4]]
        means.append(sum(weight * token for weight, token in zip(weights, tokens[0, 0])) / sum(weights))
    assert close(embedding.pool(tokens)[0, 0], embedding.value.weight @ torch.cat(means))


def test_a_log_snr_without_dimensions_holds_for_every_clip():
    model, (z, _, cond) = network(), inputs()
    out = model(z, torch.tensor(1.5), cond, IMAGES)
    assert torch.equal(out, model(z, torch.full((2, 1, 1, 1, 1), 1.5), cond, IMAGES))
    # samplers keep their log-SNR in float64
    assert close(out, model(z, torch.tensor(1.5, dtype=torch.float64), cond, IMAGES))


def test_each_frame_may_have_a_noise_level_of_its_own():
    model, (z, _, cond) = network(), inputs()
    levels = torch.linspace(-3, 3, 2 * z.shape[2]).view(2, 1, -1, 1, 1)
    same = levels[:, :, :1].expand_as(levels)
    assert torch.equal(model(z, same, cond, IMAGES), model(z, levels[:, :, :1], cond, IMAGES))
    emb = model.embedding(levels, 2, cond[:, None] if cond.dim() == 3 else cond)
    for f in range(z.shape[2]):
        alone = model.embedding(levels[:, :, f:f + 1], 2, cond[:, None] if cond.dim() == 3 else cond)
        alone = per_frame(alone, z.shape[2])
        assert close(emb[:, f], alone[:, f])


@pytest.mark.parametrize("logsnr, u", [
    (0.0, 0.5), (20.0, 2.89024e-5), (-20.0, 0.9999711), (-2 * math.log(math.tan(0.3)), 0.3 / (math.pi / 2))])
def test_the_log_snr_enters_as_sines_and_cosines_of_1000_u(logsnr, u):
    embedding = Embedding(small(emb_dim=10))
    embedding.mlp = nn.Identity()
    waves = [1000 * u * 10 ** (-4 * i / 4) for i in range(5)]  # from 1 to 1/10000 radian
    expected = torch.tensor([math.sin(a) for a in waves] + [math.cos(a) for a in waves])
    assert torch.allclose(embedding(torch.tensor(logsnr), 1, None)[0, 0], expected, atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_embedding_mlp_has_the_asked_number_of_layers(layers):
    mlp = Embedding(small(emb_layers=layers)).mlp
    assert [type(layer) for layer in mlp] == ([nn.Linear, nn.SiLU] * layers)[:-1]


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("dim", [8, 32, 64])
def test_every_residual_block_hears_the_embedding(dim, scale_shift):
    # Added before a norm whose groups hold one channel each, it would be subtracted again with their means.
    block = wild(ResBlock(dim, dim, small(scale_shift=scale_shift)))
    x = noise(2, dim, 8, 8)
    one, two = block(x, noise(1, 2, 16, seed=2)), block(x, noise(1, 2, 16, seed=3))
    assert (one - two).std() > 0.02 * one.std()


def test_the_embedding_is_added_after_the_first_convolution():
    block, x, emb = wild(ResBlock(64, 64, small())), noise(2, 64, 8, 8), noise(1, 16).expand(1, 2, 16)
    expected = block(x, emb)
    block.conv1.bias += block.emb(emb[0, 0])
    nn.init.zeros_(block.emb.weight), nn.init.zeros_(block.emb.bias)
    assert close(block(x, emb), expected)


def test_scale_shift_lets_the_embedding_scale_and_shift_the_norm():
    block, x, emb = wild(ResBlock(8, 8, small(scale_shift=True))), noise(2, 8, 8, 8), noise(1, 2, 16)
    nn.init.zeros_(block.emb.weight)
    scale, shift = noise(8, seed=2), noise(8, seed=3)
    block.emb.bias.copy_(torch.cat([scale, shift]))
    expected = block(x, emb)
    nn.init.zeros_(block.emb.bias)
    block.norm2.bias.copy_(block.norm2.bias * (1 + scale) + shift)
    block.norm2.weight *= 1 + scale
    assert close(block(x, emb), expected)


# ---- architecture ------------------------------------------------------------------------------------------


def maps(config: UNetConfig, kind: type[nn.Module], num_images: int = 0) -> list[tuple]:
    """(module, shape of its output) of all modules of a kind in the order they run, without memory."""
    with torch.device("meta"):
        model, seen = UNet3D(config), []
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_hook(lambda module, _, out: seen.append((module, tuple(out.shape))))
        model(torch.empty(1, config.channels, 2, config.size, config.size), torch.empty(()))
    return seen


@pytest.mark.parametrize("config, heights", [
    (UNetConfig(), [32] * 2 + [16] * 2 + [8] * 2 + [8] + [8] * 2 + [16] * 2 + [32] * 2),  # the paper's, 64 px
    (UNetConfig(size=128, dim_mults=(1, 2, 4, 8, 16)),
     [32] * 2 + [16] * 2 + [8] * 2 + [8] + [8] * 2 + [16] * 2 + [32] * 2),
    (UNetConfig(size=32, dim_mults=(1, 1, 1), blocks=1, attention_resolutions=(16,)), [16, 8, 16]),
    (UNetConfig(size=32, dim_mults=(1, 2), blocks=1, attention_resolutions=()), [16]),
    (UNetConfig(size=32, dim_mults=(1, 1), blocks=1, attention_resolutions=(16,), patch=2), [16, 8, 16])])
def test_attention_sits_at_the_attention_resolutions_and_in_the_middle(config, heights):
    found = [(type(layer.mix), shape[2]) for layer, shape in maps(config, Attention)]
    assert found == [(mix, height) for height in heights for mix in (SpatialMix, TemporalMix)]


def test_the_levels_have_the_papers_channels_and_halve_height_and_width():
    levels = [(128, 64)] * 2 + [(256, 32)] * 2 + [(512, 16)] * 2 + [(1024, 8)] * 2
    expected = [(2, dim, size, size) for dim, size in levels + [(1024, 8)] * 2 + levels[::-1]]
    assert [shape for _, shape in maps(UNetConfig(), ResBlock)] == expected


def test_between_levels_four_pixels_become_their_mean_and_one_pixel_becomes_four():
    model, seen = network(), {}
    for name in ("down.0.0", "down.1.0", "up.1.0", "up.0.0"):
        block = model.get_submodule(name)
        block.register_forward_hook(lambda block, given, out, name=name: seen.update({name: (given[0], out)}))
    model(*inputs(captions=1))
    squares = seen["down.0.0"][1].unflatten(3, (4, 2)).unflatten(2, (4, 2))
    assert close(seen["down.1.0"][0], squares.mean((3, 5)))
    small = model.narrow[0](seen["up.1.0"][1])
    assert close(seen["up.0.0"][0][:, :64], small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_every_skip_connection_is_concatenated_to_its_mirror_image():
    model = network(blocks=2)
    down, up = [], []
    for level in range(2):
        for block in model.down[level]:
            block.register_forward_hook(lambda block, _, out: down.append(out))
        for block in model.up[level]:
            block.register_forward_pre_hook(lambda block, args: up.append(args[0][:, 64:]))
    model(*inputs(captions=1))
    assert len(down) == len(up) == 4 and all(torch.equal(a, b) for a, b in zip(down, reversed(up)))


def test_every_convolution_is_one_by_three_by_three_or_one_by_one():
    convolutions = [m for m in UNet3D(small()).modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert {(type(m), m.kernel_size, m.stride) for m in convolutions} == {(nn.Conv2d, (3, 3), (1, 1)),
                                                                          (nn.Conv2d, (1, 1), (1, 1))}


def test_a_fresh_network_returns_zeros():
    z, logsnr, cond = inputs()
    assert torch.equal(UNet3D(small())(z, logsnr, cond, IMAGES), torch.zeros_like(z))


def test_a_fresh_block_without_change_of_width_changes_nothing():
    x = noise(2, 64, 8, 8)
    assert torch.equal(Block(64, 64, True, small())(x, noise(1, 2, 16), isolate(2, 0, x.device)), x)


def test_space_to_depth_keeps_every_pixel_and_is_undone():
    model, z, inside = network(patch=2, attention_resolutions=(4,)), noise(2, 2, 3, 8, 8), []
    model.u_net = lambda x, emb, mask: inside.append(x) or x
    assert torch.equal(model(z, torch.tensor(0.0)), z)
    x, = inside
    assert x.shape == (6, 8, 4, 4)
    for frame in range(6):
        for i in range(4):
            for j in range(4):
                square = z[frame // 3, :, frame % 3, 2 * i:2 * i + 2, 2 * j:2 * j + 2]
                assert torch.equal(x[frame, :, i, j], square.flatten())


@pytest.mark.parametrize("changes", [dict(size=12, dim_mults=(1, 1, 1, 1)), dict(size=9),
                                     dict(size=10, patch=4)])
def test_a_size_that_the_levels_cannot_halve_is_one_sentence(changes):
    with pytest.raises(ValueError, match=r"^--size gives the network frames of \d+ px, which are not "
                                         r"divisible by \d+, as --dim_mults and --patch need$"):
        small(**changes).heights()


def test_attention_resolutions_that_no_level_has_are_one_sentence():
    with pytest.raises(ValueError, match=r"^--attention_resolutions \[7, 9\] names none of the levels' "
                                         r"heights, \[8, 4\]$"):
        small(attention_resolutions=(7, 9), size=8, dim_mults=(1, 1)).heights()


@pytest.mark.parametrize("changes", [dict(dim=9), dict(dim=24, head_dim=20), dict(dim=8, head_dim=64),
                                     dict(emb_dim=9), dict(emb_layers=1), dict(cond_dim=0), dict(cond_dim=1),
                                     dict(frames=1), dict(blocks=2), dict(dim_mults=(1,)),
                                     dict(patch=2, attention_resolutions=(4,)), dict(attention_resolutions=())])
def test_every_allowed_configuration_runs(changes):
    model, z = network(**dict(dim=16) | changes), noise(1, 2, 3, 8, 8)
    cond = noise(1, 4, model.config.cond_dim) if model.config.cond_dim else None
    out = model(z, torch.tensor(0.0), cond, 1)
    assert (out.shape == z.shape and out.isfinite().all()
            and not close(out, model(2 * z, torch.tensor(0.0), cond, 1)))


# ---- numbers, gradients, memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_has_the_type_of_the_video(dtype):
    model, (z, logsnr, cond) = network(), inputs()
    out = model(z.to(dtype), logsnr, cond, IMAGES)
    assert out.dtype == dtype and close(out.float(), model(z, logsnr, cond, IMAGES))


def test_bf16_autocast_agrees_with_float32():
    model, (z, logsnr, cond) = network(), inputs()
    expected = model(z, logsnr, cond, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(z, logsnr, cond, IMAGES)
    assert out.dtype == torch.float32 and (out - expected).norm() < 0.03 * expected.norm()


def test_an_image_frame_cannot_change_anything_else_in_bf16():
    model, (z, logsnr, cond) = network(), inputs()
    other = z.clone()
    other[:, :, 4] = 30 * noise(*z[:, :, 4].shape, seed=7)
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(model(z, logsnr, cond, IMAGES), model(other, logsnr, cond, IMAGES)) == [4]


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code does for CUDA, on the CPU; CUDA's group_norm returns contiguous, as this one does now."""
    honest = nnf.group_norm
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(nnf, "group_norm", lambda x, *more: honest(x.contiguous(), *more))


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_cudas_norm_keeps_type_and_layout(dtype, error, monkeypatch):
    norm = wild(Norm(64))
    x = 3 + noise(2, 64, 4, 4).to(memory_format=torch.channels_last)
    expected = norm(x)
    on_cuda(monkeypatch)
    out = norm(x.to(dtype))
    assert out.dtype == dtype and out.stride() == x.stride()
    assert (out - expected).norm() < error * expected.norm()


def test_on_cuda_attention_reads_contiguous_channels_whatever_the_weights_layout(monkeypatch):
    attention, seen = wild(Attention(64, 16, SpatialMix())), []  # as --shard leaves it, not channels_last
    attention.mix.register_forward_pre_hook(lambda _, args: seen.extend(args[:3]))
    on_cuda(monkeypatch)
    attention(noise(2, 64, 4, 4).to(memory_format=torch.channels_last), None)
    assert [y.stride(-1) for y in seen] == [1, 1, 1]  # or the attention is not the fast kernel's


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_is_one_graph_for_the_compiler(checkpointing):
    model, (z, logsnr, cond) = network(dim=16, checkpointing=checkpointing), inputs()
    model.train().requires_grad_(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(z, logsnr, cond, IMAGES)
        expected = model(z, logsnr, cond, IMAGES)
    out.square().mean().backward()
    assert (out - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_channels_last_agrees_with_contiguous():
    model, (z, logsnr, cond) = network(), inputs()
    expected = model(z, logsnr, cond, IMAGES)
    model.to(memory_format=torch.channels_last)
    assert close(model(z.to(memory_format=torch.channels_last_3d), logsnr, cond, IMAGES), expected)


def test_every_parameter_gets_a_gradient():
    model, (z, logsnr, cond) = network(frames=5, dim_mults=(1, 2)), inputs(captions=1)
    model.requires_grad_(True)(z, logsnr, cond).square().sum().backward()
    without = [name for name, p in model.named_parameters()
               if p.grad is None or not p.grad.abs().max() > 1e-4]
    assert without == []


def test_an_unconditional_network_has_no_parameter_that_is_never_used():
    model = network(cond_dim=0).requires_grad_(True)  # DistributedDataParallel waits for the gradient of each
    model(noise(1, 2, 4, 8, 8), torch.tensor(0.0)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_with_frozen_parameters_the_gradient_reaches_z_alone():
    model, (z, logsnr, cond) = network(), inputs()  # frozen, as for reconstruction guidance
    z.requires_grad_()
    out = model(z, logsnr, cond, IMAGES)
    grad, = torch.autograd.grad(out[:, :, 0].square().sum(), z, retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    assert [bool(grad[:, :, i].any()) for i in range(5)] == [True] * VIDEO + [False] * IMAGES
    grad, = torch.autograd.grad(out[:, :, 3].square().sum(), z)
    assert [bool(grad[:, :, i].any()) for i in range(5)] == [False, False, False, True, False]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_no_output_and_no_gradient(dropout):
    z, logsnr, cond = inputs()
    results = []
    for checkpointing in (False, True):
        model = network(checkpointing=checkpointing, dropout=dropout).train().requires_grad_(True)
        torch.manual_seed(3)
        out = model(z, logsnr, cond, IMAGES)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(close(a, b) for a, b in zip(*results, strict=True))


def test_checkpointing_runs_the_blocks_again_in_the_backward_pass_and_only_then():
    model, (z, logsnr, cond), runs = network(checkpointing=True), inputs(), []
    model.down[0][0].res.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(z, logsnr, cond, IMAGES)
    assert len(runs) == 1
    out = model(z.requires_grad_(), logsnr, cond, IMAGES)
    assert len(runs) == 2
    out.sum().backward()
    assert len(runs) == 3


def test_dropout_acts_in_training_alone():
    model, (z, logsnr, cond) = network(dropout=0.5), inputs()
    assert torch.equal(model(z, logsnr, cond, IMAGES), model(z, logsnr, cond, IMAGES))
    model.train()
    assert not close(model(z, logsnr, cond, IMAGES), model(z, logsnr, cond, IMAGES))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5] * 6
