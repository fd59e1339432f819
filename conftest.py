"""Flags of the tests: python -m pytest test_faults.py --kills 50 --fuzz 60."""


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often a run is killed (default: 3)")
    parser.addoption("--fuzz", type=float, default=4, help="seconds for each kind of file (default: 4)")
