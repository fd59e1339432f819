"""Training and sampling on fake CUDA tensors: devices, shapes, dtypes and what waits are real, numbers are not.

No GPU is needed. C++ is told that these tensors lie on "meta", so that nothing asks for a driver, and Python is
told "cuda:0". A tensor that stays on the CPU fails here as it would on a GPU. This goes by PyTorch's internals.
The same with "mps:0" shows that nothing on Apple's GPU, which has no float64, is one; there all is in float32.
And that PyTorch has each operation for it, by the list that comes with PyTorch.
"""
import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pytest import MonkeyPatch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import autoencoder
import data
import infill
import progress
import sample
import state
import text
import train
from machine import Machine
from settings import Settings, read_settings

KNOWN = "2.13"
if not torch.__version__.startswith(KNOWN):
    pytest.skip(f"fake CUDA tensors are made for PyTorch {KNOWN}, this is {torch.__version__}", allow_module_level=True)

HERE = Path(__file__).parent
SITE = Path(torch.__file__).parents[1]  # where PyTorch is installed
CUDA, MPS, META = torch.device("cuda:0"), torch.device("mps:0"), torch.device("meta")
ATEN = torch.ops.aten
ASKED = torch.ops.prim.device.default  # C++ asks Python for a tensor's device
NUMBER = ATEN._local_scalar_dense.default  # Tensor.item()
COPIES = ATEN._to_copy.default, ATEN.copy_.default
# what CUDA's autocast runs in bf16 or fp16, and what in float32 (ATen/autocast_mode.h)
LOWER = "conv2d linear matmul __matmul__ bmm einsum scaled_dot_product_attention".split()
UPPER = "softmax group_norm mse_loss interpolate exp log pow sum prod norm".split()


def kernels() -> tuple[dict[str, set[str]], dict[str, str]]:
    """For which devices PyTorch has each operation, and whose kernels an operation has that has none."""
    listed = (SITE / "torchgen/packaged/ATen/native/native_functions.yaml").read_text()
    found, others = {}, {}
    for entry in listed.split("\n- func: ")[1:]:
        name, _, _ = entry.partition("(")
        lines = re.findall(r"^    ([A-Z][\w, ]*):", entry, re.M)
        found[name] = set(", ".join(lines).split(", "))
        for other in re.findall(r"structured_delegate: (\S+)", entry):
            others[name] = other
    return found, others


KERNELS, DELEGATES = kernels()


def misses_apple(operation: torch._ops.OpOverload) -> bool:
    """Whether an operation has kernels for CPUs, and none for Apple's GPU."""
    name = operation._schema.name.removeprefix("aten::")
    full = f"{name}.{operation._overloadname}".removesuffix(".default")
    own = KERNELS.get(DELEGATES.get(full, full), set())
    if any("Composite" in key for key in own):  # made of others, most often of the one that writes into out
        own = KERNELS.get(f"{name}.out", set()) | own
    return "CPU" in own and "MPS" not in own


def test_the_list_knows_what_apples_gpu_lacks() -> None:
    assert misses_apple(ATEN.logspace.default) and misses_apple(ATEN.linalg_eig.default)
    assert not any(map(misses_apple, (ATEN.linspace.default, ATEN.addmm.default, ATEN._foreach_lerp_.Scalar)))


class Waits(TorchDispatchMode):
    """The lines of the project where the host waits for the GPU. A number that nobody knows is 1."""
    def __init__(self, gpu: torch.device) -> None:
        super().__init__()
        self.gpu = gpu
        self.lines: list[str] = []

    def __torch_dispatch__(self, operation: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation is NUMBER:
            if args[0].device == self.gpu:
                self.note()
            return 1.0 if args[0].is_floating_point() else 1
        result = operation(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == MPS:
                assert not misses_apple(operation), operation
                assert tensor.dtype not in (torch.float64, torch.bfloat16), operation
        if operation in COPIES:
            places = {tensor.device for tensor in tree_leaves((args, result)) if isinstance(tensor, Tensor)}
            if len(places) == 2 and not kwargs.get("non_blocking", args[-1] is True):
                self.note()
        return result

    def note(self) -> None:
        calls = [call for call in traceback.extract_stack()
                 if Path(call.filename).parent == HERE and call.filename != __file__]
        last = calls[-1]
        self.lines.append(f"{Path(last.filename).name}: {last.line}")


def told(tensor: FakeTensor) -> torch.device:
    """What C++ hears of where a tensor lies."""
    if tensor.fake_mode.in_kernel_invocation or tensor.fake_device.type in ("cuda", "mps"):
        return META
    return tensor.fake_device


def autocast(function: Callable, lower: bool) -> Callable:
    """The function with what autocast does to floats on CUDA, which PyTorch does in C++."""
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cuda"):
            return function(*args, **kwargs)
        dtype = torch.get_autocast_dtype("cuda") if lower else torch.float32

        def cast(tensor: Tensor) -> Tensor:
            if tensor.device.type != "cuda" or not tensor.is_floating_point():
                return tensor
            return tensor.to(dtype)
        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return function(*args, **kwargs)
    return call


def moved(module: nn.Module, function: Callable, recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which cannot swap the content of fake parameters."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = function(buffer)
    return module


@contextlib.contextmanager
def fake_gpu(gpu: torch.device = CUDA, has_bf16: bool = True) -> Iterator[Waits]:
    """Inside, all tensors are fake, and the device gpu is there."""
    answer, dispatch = FakeTensor.__torch_dispatch__.__func__, FakeTensorMode.dispatch

    def tensor_dispatch(cls: type, operation: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if operation is ASKED:
            return told(args[0])
        return answer(cls, operation, types, args, kwargs or {})

    def mode_dispatch(mode: FakeTensorMode, operation: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == META:  # C++ makes zeros, say, where it was told
            kwargs = kwargs | {"device": gpu}
        return dispatch(mode, operation, types, args, kwargs)
    patches = [
        (FakeTensor, "__torch_dispatch__", classmethod(tensor_dispatch)), (FakeTensorMode, "dispatch", mode_dispatch),
        (FakeTensorMode, "__deepcopy__", lambda mode, memo: mode), (nn.Module, "_apply", moved),
        (FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda")),
        (text, "_words", text._words.__wrapped__), (text, "_vector", text._vector.__wrapped__),  # or fakes are kept
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)]
    for holder in (torch, Tensor, nn.functional):
        for name in LOWER + UPPER:
            if hasattr(holder, name):
                patches.append((holder, name, autocast(getattr(holder, name), name in LOWER)))
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        handlers = {ASKED: lambda args: told(args[0])}
        stack.enter_context(mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, handlers))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(Waits(gpu))


TINY = ("--device cpu --size 16 --frames 4 --dim 16 --dim_mults 1,2 --blocks 1 --head_dim 8 --emb_dim 16 "
        "--num_images 1 --batch_size 2 --attention_resolutions 8 --accumulate 1").split()
PIXELS = [*TINY, *"--preset pixels --cond_dim 8".split()]
LATENTS = [*TINY, *"--preset cuda --size 32 --dim_mults 1 --attention_resolutions 4".split()]


def built(s: Settings, gpu: torch.device = CUDA) -> state.State:
    """The state of a new run on the fake GPU; an autoencoder's weights are what its numbers are: fake."""
    def coder(s: Settings, device: torch.device) -> autoencoder.Autoencoder:
        return autoencoder.Autoencoder(s.autoencoder).to(device).requires_grad_(False)
    with mock.patch.object(state, "new_coder", coder):
        return state.new_state(s, gpu)


slow = pytest.mark.slow


@pytest.mark.parametrize("flags", [
    [*LATENTS], [*PIXELS, "--precision", "fp16"],
    pytest.param([*PIXELS, "--no-checkpointing", "--precision", "float32"], marks=slow),
    pytest.param([*PIXELS, "--optimizer", "muon"], marks=slow),
    pytest.param([*PIXELS, "--arch", "magicvideo", "--mask", "after"], marks=slow),
    pytest.param([*LATENTS, "--arch", "magicvideo", "--cond_dim", "8"], marks=slow)])
def test_a_training_step_keeps_to_the_gpu_and_waits_once(flags: list[str]) -> None:
    s = read_settings(flags)
    with fake_gpu(has_bf16="fp16" not in flags) as waits:
        machine, made = Machine(CUDA, s.train.precision), built(s)
        stream = data.batches(s.data, s.train.batch_size, 0, device=CUDA)
        waits.lines.clear()
        loss, norm = train.train_step(made.model, made, stream, s, machine)
        assert waits.lines == ["train.py: norm = norm.item()  # the one wait for a GPU"], waits.lines
        assert loss.device == CUDA and made.step == 1
        everything = [*made.model.parameters(), *made.ema.parameters()]
        if s.train.optimizer == "adam":  # whose fused kernel reads step's address, which is no copy
            everything += tree_leaves(list(made.optimizer.state.values()))
        assert {tensor.device for tensor in everything} == {CUDA}


@slow
@pytest.mark.parametrize("flags", [PIXELS, LATENTS])
def test_a_preview_keeps_to_the_gpu(flags: list[str]) -> None:
    s = read_settings(flags)
    with fake_gpu(), mock.patch.object(progress, "save_video") as save:
        progress.preview(built(s), s, Machine(CUDA))
        video, *_ = save.call_args[0]
        assert video.device == CUDA and video.shape == (4, 1, 4, s.data.size, s.data.size)


def test_adams_count_is_resumed_beside_its_parameter(monkeypatch: MonkeyPatch) -> None:
    """Whole and in shards, which are stood for by parameters that say what shards say."""
    monkeypatch.setattr("torch.distributed.tensor.distribute_tensor", lambda whole, mesh, *_, **more: whole.to(mesh))
    saved = {"model": {}, "ema": {}, "step": 3, "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}}}
    for is_shard in (False, True):
        with fake_gpu():
            parameter = nn.Parameter(torch.zeros(2, device=CUDA))
            if is_shard:
                parameter.placements, parameter.device_mesh = (), CUDA
            model = nn.Module()
            optimizer = torch.optim.AdamW([parameter], fused=True)
            made = state.State(model, model, optimizer, torch.amp.GradScaler(enabled=False), autoencoder.Pixels())
            monkeypatch.setattr(model, "parameters", lambda: [parameter], raising=False)
            state.restore(made, saved)
            kept = optimizer.state[parameter]
            assert {kept["step"].device, kept["exp_avg"].device} == {CUDA}


MODES = [*sample.MODES]


@pytest.mark.parametrize("mode, flags, options", [
    ("cascade", PIXELS, {"text": "a 3", "steps": 1}),
    pytest.param("predict", PIXELS, {"text": "a 3", "w": 1.0, "w_t": 1.0, "w_t_from": -40.0, "delta": 0.1}, marks=slow),
    *(pytest.param(mode, flags, {"sampler": "dpm_solver"}, marks=slow) for flags in (PIXELS, LATENTS) for mode in MODES),
    pytest.param("predict", [*PIXELS, "--arch", "magicvideo"], {"w_r": 0.0}, marks=slow),
    pytest.param("generate", PIXELS, {"sampler": "ddim"}, marks=slow)])
def test_sampling_keeps_to_the_gpu(mode: str, flags: list[str], options: dict) -> None:
    s = read_settings(flags)
    with fake_gpu(), Machine(CUDA).autocast():
        made = built(s)
        network = made.ema.eval().requires_grad_(False)
        model = infill.Model(network, s.data, s.diffusion, s.text, CUDA, made.coder)
        frames = 6 if mode == "extend" else 4
        one = infill.SampleConfig(mode=mode, num=1, frames=frames, overlap=2, **{"steps": 2} | options)
        video = infill.fill(model, one, sample.MODES[mode](model, one))
        assert video.device == CUDA and video.shape == (1, 1, frames, s.data.size, s.data.size)


@slow
@pytest.mark.parametrize("flags", [LATENTS, PIXELS])
def test_apples_gpu_gets_no_float64_and_no_bf16(flags: list[str]) -> None:
    s = read_settings(flags)
    with fake_gpu(MPS):
        machine, made = Machine(MPS), built(s, MPS)
        with machine.autocast():
            train.train_step(made.model, made, data.batches(s.data, s.train.batch_size, 0, device=MPS), s, machine)
            network = made.ema.eval().requires_grad_(False)
            model = infill.Model(network, s.data, s.diffusion, s.text, MPS, made.coder)
            one = infill.SampleConfig(mode="predict", num=1, frames=4, overlap=2, steps=2, w_t=1.0, w_t_from=-40.0)
            assert infill.fill(model, one, sample.predict(model, one)).device == MPS
