"""What every test stands on: small thread pools, and an order in which the quick tests speak first."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch or GDAL is imported, and inherited by every process that a test starts: the tests use tensors so small
# that more threads only get in each other's way.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# A shell starts its background jobs with Ctrl-C ignored, and so would be every command that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
_ORDER = ("unit", "golden", "data", "launch", "distributed", "system")


def _turn(item: pytest.Item) -> tuple[int, int]:
    folder = item.path.relative_to(ROOT / "tests").parts[0]
    place = _ORDER.index(folder) if folder in _ORDER else len(_ORDER)
    if item.get_closest_marker("replay") is not None and os.environ.get("DCTC_REPLAY_IMAGE") == "1":
        return -1, place  # minutes of one worker: at the end the others would wait for it
    return int(item.get_closest_marker("slow") is not None), place


class _AtOnce:
    """Tells what failed when it fails, and not at the end alone: a run that is stopped by its limit has no end."""

    def __init__(self, config: pytest.Config) -> None:
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._plugins.get_plugin("terminalreporter")  # absent in xdist's workers
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"failed in {report.when}, {report.duration:.0f} s: {report.nodeid}")
            terminal.write_line(report.longreprtext[-2000:])


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--part K/N``: one of N parts of equal size."""
    parser.addoption(
        "--part", metavar="K/N", default="1/1", help="run every Nth test of those chosen, from the Kth (1 to N) on"
    )


def pytest_configure(config: pytest.Config) -> None:
    """See ``_AtOnce``."""
    config.pluginmanager.register(_AtOnce(config))


def part_of(items: list[pytest.Item], part: str) -> list[pytest.Item]:
    """Every Nth of ``items`` from the Kth on; ``part`` is ``K/N``, K from 1 to N."""
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise pytest.UsageError(f"--part {part}: write K/N with 1 <= K <= N, such as 1/4")
    return items[int(number) - 1 :: int(parts)]


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run slow tests last, and within both halves the folders from the quickest kind to the slowest."""
    items.sort(key=_turn)
    kept = part_of(items, config.getoption("--part"))
    config.hook.pytest_deselected(items=sorted(set(items).difference(kept), key=items.index))
    items[:] = kept


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


settings.register_profile("shared", deadline=None)  # a busy machine is no failure
settings.load_profile("shared")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def scripts() -> Path:
    """The folder of the environment's commands (`dctc`, `accelerate`), whether or not it is activated."""
    return Path(sys.executable).parent


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic towns packed by the real commands: 32 px tiles, 6 classes."""
    from tests.tiny import make_dataset

    return make_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """``model.safetensors`` of a dctc run of a few rounds on the tiny dataset."""
    from tests.tiny import run, write_config

    config = write_config(tmp_path_factory.mktemp("model") / "tiny.yaml", tiny_dataset)
    run("dctc", "train", config)
    return config.parent / "runs" / "synthetic-scene" / "tiny" / "model.safetensors"
