"""Where a process runs: device and precision, its place among torchrun's processes, the signals it gets."""
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


@dataclass
class Machine:
    """The device and precision ("auto" or one of DTYPES) of a process, and its rank of world processes."""
    device: torch.device
    precision: str = "auto"
    rank: int = 0
    world: int = 1

    def chosen(self) -> str:
        """The precision to compute in: as told, or, for "auto", the fastest that the hardware has."""
        if self.precision != "auto":
            return self.precision
        if self.device.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            return "bf16" if has_bf16 else "fp16"
        if self.device.type == "mps":
            return "float32"
        # emulated, it is slower than float32; PyTorch has no public way to ask, nor this one everywhere
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return "bf16" if has_bf16() else "float32"

    def cores(self) -> int:
        """The CPU cores of this computer for each of the processes on it; torchrun says how many they are."""
        count = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # Linux: a cluster may allow fewer
            count = len(os.sched_getaffinity(0))
        return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def autocast(self) -> torch.autocast:
        """The mixed-precision context that networks run in; it changes nothing in float32."""
        precision = self.chosen()
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "float32")

    def any(self, here: bool) -> bool:
        """Whether it holds on any process; all of them must ask."""
        if self.world == 1:
            return here
        return self.mean(torch.tensor(float(here))) > 0  # on the CPU: nobody waits for a GPU

    def mean(self, here: torch.Tensor) -> float:
        """The mean of a number over all processes; all of them must ask."""
        if self.world > 1:
            dist.all_reduce(here)
        return here.item() / self.world

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif self.device.type == "mps":
            name = "Apple's GPU"
        else:
            name = f"CPU with {torch.get_num_threads()} threads"
        return f"{self.world} x {name}, {self.chosen()}"


def find_device(name: str) -> torch.device:
    """The device of --device: "auto" is CUDA or Apple's GPU where it can be used; each process of torchrun
    has a GPU of its own. Raises ValueError if it cannot be used.
    """
    kind, _, index = name.partition(":")
    numbered = index.isdecimal() and kind != "auto"
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and not numbered):
        raise ValueError(f"--device {name} is not supported: auto, cpu, cuda, cuda:N or mps")
    cuda = "cuda"
    if "LOCAL_RANK" in os.environ:  # set by torchrun
        cuda = f"cuda:{os.environ['LOCAL_RANK']}"
        count = torch.cuda.device_count()
        if name == "auto" and 0 < count <= int(os.environ["LOCAL_RANK"]):
            raise ValueError(f"torchrun started more processes than the {count} GPUs here: start {count}, or give "
                             "--device cpu")
    if name == "auto":
        for candidate in (cuda, "mps", "cpu"):
            if not fault(candidate):
                return torch.device(candidate)
    if kind == "cuda" and not index:
        name = cuda
    if fault(name):
        raise ValueError(f"--device {name} was given; {fault(name)}")
    return torch.device(name)


def fault(name: str) -> str:
    """Why a device cannot be used, by a small kernel that is tried; "" if it can."""
    kind, _, index = name.partition(":")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if int(index or 0) >= there[kind]:
        return f"PyTorch finds {there[kind]} {kind.upper()} devices"
    try:
        torch.ones(1, device=name).add(1).item()
    except RuntimeError as error:  # an old driver, or a card that this build of PyTorch has no kernels for
        return f"PyTorch cannot use it: {str(error).splitlines()[0]}"
    return ""


def start(device: str, precision: str, threads: int) -> Machine:
    """The Machine of --device, --precision and --threads; joins the process group if torchrun made one."""
    if threads:
        torch.set_num_threads(threads)
    found = find_device(device)
    if device == "auto" and found.type != "cuda" and torch.cuda.device_count():
        print(f"there is a GPU, but {fault('cuda')}")
    backend = "gloo"
    if found.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.set_float32_matmul_precision("high")  # TF32, as convolutions have it; on a CPU it is slower
    if found.index:
        torch.cuda.set_device(found)  # for what asks no further, such as torch.cuda.synchronize()
    if "RANK" not in os.environ:
        return Machine(found, precision)
    # the others wait as long as the first one looks at clips
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return Machine(found, precision, dist.get_rank(), dist.get_world_size())


def stop_signals() -> list[int]:
    """A list Ctrl-C or SIGTERM appends its number to, so that the step can finish; a second ends at once."""
    received = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, remember)
    return received
