"""Flags of the tests: pytest --slow runs all; pytest test_faults.py --slow --kills 50 --fuzz 60, more."""
import functools
import inspect
import signal
from collections.abc import Iterator

import pytest
import torch

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take long, too")
    parser.addoption("--kills", type=int, default=3, help="how often a run is killed (default: 3)")
    parser.addoption("--fuzz", type=float, default=1, help="seconds for each kind of file (default: 1)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")
    torch.set_num_threads(1)  # the networks are tiny: on a busy machine two threads wait for each other


def pytest_collection_modifyitems(config, items):
    for item in items if not config.getoption("--slow") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes long; runs with --slow"))


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run takes over Ctrl-C; it is given back."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def sources_read_once() -> Iterator[None]:
    """inspect.getsource parses a whole file, for each dataclass of each command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield
