"""machine.py: the device that is meant becomes the current one, precision follows the hardware."""
import pytest
import torch

import machine
from machine import Machine, find_device, start


@pytest.mark.parametrize("name, sentence", [("gpu", "is not supported"), ("cuda:x", "is not supported"), ("meta", "is not supported"),
                                            ("cuda:99", "PyTorch finds")])
def test_a_device_that_is_not_there_is_named_with_what_is_allowed(name, sentence):
    with pytest.raises(ValueError, match=f"--device {name} .*{sentence}"):
        find_device(name)


@pytest.mark.parametrize("name, rank, current", [("cuda", None, None), ("cuda:0", None, None),
                                                 ("cuda:1", None, 1), ("cuda", "2", 2), ("cpu", "2", None)])
def test_what_asks_for_the_current_gpu_gets_the_one_that_is_meant(name, rank, current, monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "find_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device.index))
    for function, value in (("init_process_group", None), ("get_rank", 2), ("get_world_size", 3)):
        monkeypatch.setattr(machine.dist, function, lambda *backend, value=value: value)
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(key, rank) if rank else monkeypatch.delenv(key, raising=False)
    found = start(name, "auto", 0)
    assert seen == [current] * (current is not None)
    assert (found.rank, found.world) == ((2, 3) if rank else (0, 1))


def test_apples_gpu_is_taken_where_there_is_no_cuda_and_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto") == find_device("mps") == torch.device("mps")
    assert not Machine(torch.device("mps")).bf16()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_networks_run_in_the_precision_that_was_asked_for(precision, dtype):
    with Machine(torch.device("cpu"), precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_alone_a_process_is_all_processes():
    here = Machine(torch.device("cpu"))
    assert here.any(True) and not here.any(False) and here.mean(torch.tensor(3.0)) == 3.0
