"""Where a process runs: device and precision, its place among torchrun's processes, the signals it gets."""
import os
import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass
class Machine:
    """The device and precision ("auto", "bf16", "float32") of a process, and its rank of world processes."""
    device: torch.device
    precision: str = "auto"
    rank: int = 0
    world: int = 1

    def bf16(self) -> bool:
        """Whether to compute in bf16: as told, or, for "auto", where the hardware has it."""
        if self.precision != "auto":
            return self.precision == "bf16"
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.device.type == "mps":
            return False
        # emulated, it is slower than float32; PyTorch has no public way to ask, nor this one everywhere
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
        return has_bf16()

    def cores(self) -> int:
        """The CPU cores of this computer for each of the processes on it; torchrun says how many they are."""
        return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def autocast(self) -> torch.autocast:
        """The mixed-precision context that networks run in; it changes nothing in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16())

    def any(self, here: bool) -> bool:
        """Whether it holds on any process; all of them must ask."""
        if self.world == 1:
            return here
        return self.mean(torch.tensor(float(here), device=self.device)) > 0

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
        precision = "bf16" if self.bf16() else "float32"
        return f"{self.world} x {name}, {precision}"


def find_device(name: str) -> torch.device:
    """The device of --device: "auto" is CUDA or Apple's GPU where there is one. Raises ValueError if it is
    not there.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        for kind in there:
            if there[kind]:
                return torch.device(kind)
    kind, _, index = name.partition(":")
    if kind not in there or not index.isdecimal() and index:
        raise ValueError(f"--device {name} is not supported: auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= there[kind]:
        raise ValueError(f"--device {name} was given; PyTorch finds {there[kind]} {kind.upper()} devices")
    return torch.device(name)


def start(device: str, precision: str, threads: int) -> Machine:
    """The Machine of --device, --precision and --threads; joins the process group if torchrun made one."""
    if threads:
        torch.set_num_threads(threads)
    found, parallel = find_device(device), "RANK" in os.environ  # set by torchrun
    if parallel and found.type == "cuda":
        found = find_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if found.index:
        torch.cuda.set_device(found)  # for what asks no further, such as torch.cuda.synchronize()
    if not parallel:
        return Machine(found, precision)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
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
