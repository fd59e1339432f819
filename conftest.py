"""Flags of the tests: python -m pytest test_faults.py --kills 50 --fuzz 60."""
import functools
import inspect
import signal
from collections.abc import Iterator

import pytest

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often a run is killed (default: 3)")
    parser.addoption("--fuzz", type=float, default=4, help="seconds for each kind of file (default: 4)")


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
