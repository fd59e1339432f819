"""machine.py: the device that is meant becomes the current one, precision follows the hardware."""
import pytest
import torch

import machine
from machine import Machine, find_device, start
from presets import FITS, PRESETS
from settings import read_settings


@pytest.mark.parametrize("name, sentence", [("gpu", "is not supported"), ("cuda:x", "is not supported"), ("meta", "is not supported"), ("auto:0", "is not supported"),
                                            ("cuda:99", "PyTorch finds")])
def test_a_device_that_is_not_there_is_named_with_what_is_allowed(name, sentence):
    with pytest.raises(ValueError, match=f"--device {name} .*{sentence}"):
        find_device(name)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are so many GPUs, on which kernels run."""
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch, "ones", lambda n, device: torch.zeros(n))
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    return pretend


@pytest.mark.parametrize("name, rank, current", [("cuda", None, None), ("cuda:0", None, None), ("auto", "2", 2),
                                                 ("cuda:1", None, 1), ("cuda", "2", 2), ("cpu", "2", None)])
def test_what_asks_for_the_current_gpu_gets_the_one_that_is_meant(name, rank, current, monkeypatch, gpus):
    gpus(3)
    seen, joined = [], {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device.index))
    monkeypatch.setattr(machine.dist, "init_process_group", lambda backend, timeout: joined.update({backend: timeout}))
    for function, value in (("get_rank", 2), ("get_world_size", 3)):
        monkeypatch.setattr(machine.dist, function, lambda value=value: value)
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(key, rank) if rank else monkeypatch.delenv(key, raising=False)
    found = start(name, "auto", 0)
    assert seen == [current] * bool(current)
    assert (found.rank, found.world) == ((2, 3) if rank else (0, 1))
    assert all(timeout.total_seconds() > 3600 for timeout in joined.values()) and len(joined) == bool(rank)


def test_more_processes_than_gpus_are_one_sentence(monkeypatch, gpus):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs here: start 2, or give --device cpu"):
        find_device("auto")
    assert find_device("cpu") == torch.device("cpu")


def test_apples_gpu_is_taken_where_there_is_no_cuda_and_computes_in_float32(monkeypatch, gpus):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    gpus(0)
    assert find_device("auto") == find_device("mps") == torch.device("mps")
    assert Machine(torch.device("mps")).chosen() == "float32"
    gpus(1)
    assert find_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("reason", ["The NVIDIA driver on your system is too old",
                                    "CUDA error: no kernel image is available for execution on the device"])
def test_a_gpu_that_cannot_be_used_is_left_with_one_sentence_that_is_the_error_when_it_is_named(
        reason, monkeypatch, gpus, capsys):
    def ones(n, device):
        if device != "cpu":
            raise RuntimeError(f"{reason}\nand more lines")
        return torch.zeros(n)
    gpus(1)
    monkeypatch.setattr(torch, "ones", ones)
    assert start("auto", "auto", 0).device == torch.device("cpu")
    assert capsys.readouterr().out == f"there is a GPU, but PyTorch cannot use it: {reason}\n"
    with pytest.raises(ValueError, match=f"--device cuda was given; PyTorch cannot use it: {reason}$"):
        find_device("cuda")


@pytest.mark.parametrize("has_bf16, chosen", [(True, "bf16"), (False, "fp16")])
def test_cards_without_bf16_compute_in_fp16_and_products_in_tf32(has_bf16, chosen, monkeypatch, gpus):
    gpus(1)
    said = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    found = start("auto", "auto", 0)
    assert found.chosen() == chosen and str(found) == f"1 x a GPU, {chosen}" and said == ["high"]
    start("cpu", "auto", 0)
    assert said == ["high"]  # slower on a CPU


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)])
def test_networks_run_in_the_precision_that_was_asked_for(precision, dtype):
    with Machine(torch.device("cpu"), precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_alone_a_process_is_all_processes():
    here = Machine(torch.device("cpu"))
    assert here.any(True) and not here.any(False) and here.mean(torch.tensor(3.0)) == 3.0


@pytest.mark.parametrize("preset", FITS)
def test_a_preset_for_gpus_takes_what_fits_and_the_same_clips_a_step(preset, monkeypatch, gpus):
    gpus(1)
    seen = []
    for free in (0, 4, 7, 11, 15, 23, 38, 78):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * 2**30, 80 * 2**30))
        s = read_settings(["--preset", preset])
        assert s.train.batch_size * s.train.accumulate == 32
        assert (s.train.batch_size, s.unet.checkpointing) in [(clips, again) for _, clips, again in FITS[preset]]
        seen.append((s.train.batch_size, not s.unet.checkpointing))
    assert len(set(seen)) == len(FITS[preset])
    needed = [row[0] for row in FITS[preset]]
    assert needed == sorted(needed, reverse=True) and needed[-1] == 0
    by_hand = read_settings(["--preset", preset, "--batch_size", "3", "--checkpointing"])
    assert (by_hand.train.batch_size, by_hand.unet.checkpointing) == (3, True)
    assert read_settings(["--preset", preset, "--no-checkpointing"]).unet.checkpointing is False
    unlike = read_settings(["--preset", preset, "--device", "cpu"])
    assert unlike.train.batch_size == PRESETS[preset]["batch_size"]
