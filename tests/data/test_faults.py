"""Killed, stopped, out of room, under other settings: what comes out is the same dataset, or a clear refusal."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from shards.manifest import MANIFEST
from shards.pack import Packed, pack
from shards.verify import verify
from tests.data import layouts
from tests.data.cluster import REPOSITORY, wait_until
from tests.data.test_interruption import alive, digests

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

RECIPE = REPOSITORY / "configs/data/potsdam.yaml"
SETTINGS = ["tile.size=64", "shards.megabytes=0.1", 'splits.scene.val=["7_7"]']  # those of the fixture `packed`
DISTRICT = [*SETTINGS[1:], 'splits.scene.train=["*"]']
KILLS = 20


@pytest.fixture(scope="module")
def district(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen labelled Potsdam scenes: enough work to be stopped in the middle of."""
    root = tmp_path_factory.mktemp("district")
    layouts.potsdam(root, [f"{row}_{col}" for row in (2, 3, 4) for col in range(8, 16)], 256, 256)
    return root


@pytest.fixture(scope="module")
def district_packed(district: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of the files of ``district`` packed by one worker without a pause."""
    return digests(pack(layouts.recipe("potsdam", *DISTRICT), district, tmp_path_factory.mktemp("whole") / "set").root)


def shard(
    root: Path,
    out: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> subprocess.Popen[str]:
    """`dctc shard` in a session of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "dctc.cli", "shard", str(RECIPE), str(out), "--root", str(root)]
    return subprocess.Popen(
        [*command, *SETTINGS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | (environment or {}),
        start_new_session=True,
        preexec_fn=prepare,
    )


def without_preview(root: Path) -> dict[str, str]:
    found = digests(root)
    assert found.pop("preview.png")
    return found


def temporaries(out: Path) -> list[Path]:
    return [path for path in out.rglob("*.tmp") if path.is_file()]


def await_end(session: int) -> None:
    wait_until(lambda: not alive(session), "the workers to end with their parent")


@pytest.mark.slow
@pytest.mark.parametrize("times", [KILLS // 4, pytest.param(KILLS, marks=pytest.mark.matrix)])
def test_killed_at_random_moments(district: Path, district_packed: dict[str, str], tmp_path: Path, times: int) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")  # shown when the test fails
    chance = random.Random(seed)
    start = time.monotonic()
    process = shard(district, tmp_path / "first", "--workers", "2", *DISTRICT)
    begun(tmp_path / "first", process)
    before = time.monotonic() - start
    process.communicate()
    span = time.monotonic() - start - before
    kills, resumed, chain = 0, 0, 0
    while kills < times:
        chain += 1
        out, finished = tmp_path / f"set{chain}", False
        # Most chains are killed again and again, the last one at least is let go.
        while not finished:
            process = shard(
                district, out, "--workers", "2", *DISTRICT, *(["--verify"] if chance.random() < 0.3 else [])
            )
            begun(out, process)
            if kills < times:
                try:
                    process.wait(chance.uniform(0, span))
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
                    resumed += 1
            _, errors = process.communicate()
            await_end(process.pid)
            finished = process.returncode == 0
            assert finished or process.returncode == -signal.SIGKILL, errors
            assert not (out / MANIFEST).exists() or verify(out) == []
        assert without_preview(out) == district_packed
    assert resumed == times


def begun(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the process has begun to work in its folder (or has finished again)."""
    since = time.time()
    lock = out / ".staging/lock"
    wait_until(
        lambda: process.poll() is not None or (lock.exists() and lock.stat().st_mtime >= since - 0.05) or finished(out),
        "the packer to begin",
    )


def finished(out: Path) -> bool:
    return (out / MANIFEST).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_by_a_signal(
    district: Path, district_packed: dict[str, str], tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    out = tmp_path / "set"
    process = shard(district, out, "--workers", str(workers), *DISTRICT)
    wait_until(lambda: len(list(out.glob(".staging/*.json"))) > 2, "three scenes")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal tells all processes
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75, errors
    assert errors.strip() == f"stopped: {out} keeps what is finished; run the same command again to go on"
    assert "Traceback" not in errors
    await_end(process.pid)
    assert temporaries(out) == []
    assert not (out / MANIFEST).exists()
    kept = len(list(out.glob(".staging/*.json")))
    process = shard(district, out, "--workers", "2", *DISTRICT)
    lines, _ = process.communicate()
    assert f"reading scenes: {kept} of 24 scenes" in lines
    assert without_preview(out) == district_packed


def test_a_worker_that_is_killed(district: Path, district_packed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "set"
    process = shard(district, out, "--workers", "2", *DISTRICT)
    wait_until(lambda: len(list(out.glob(".staging/*.json"))) > 2, "three scenes")
    packer = psutil.Process(process.pid)
    # workers are children of the fork server, which is one of the packer
    worker = next(child for child in packer.children(recursive=True) if child.parent() != packer)
    worker.kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2, errors
    assert "error: a worker process ended in the middle, perhaps killed for its memory" in errors
    assert "Traceback" not in errors
    await_end(process.pid)
    assert shard(district, out, "--workers", "2", *DISTRICT).wait() == 0
    assert without_preview(out) == district_packed


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], int]]:
    """A real file system of that size; what is given changes the size. Skips where mounting is not allowed."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield lambda more: subprocess.check_call(["mount", "-o", f"remount,size={more}", folder])
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def refused(process: subprocess.Popen[str], out: Path) -> str:
    """The error of a run that has ended with exit code 2, and left nothing half-written."""
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    await_end(process.pid)
    assert temporaries(out) == []
    assert not (out / MANIFEST).exists()
    return errors.strip()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk(packed: Packed, towns: Path, tmp_path: Path, workers: str) -> None:
    out = tmp_path / "disk/set"
    size = sum(shard.bytes for shard in packed.manifest.shards)
    with small_disk(tmp_path / "disk", size // 2) as resize:
        message = refused(shard(towns, out, "--workers", workers), out)
        assert message.startswith(f"error: {out}: no more can be written (No space left on device, 0.")
        assert "MiB free on its disk)" in message
        assert "make room and run the same command again" in message
        staged = list(out.glob(".staging/*.json"))
        assert 0 < len(staged) < 7
        resize(size * 3 // 2)
        message = refused(shard(towns, out, "--workers", workers), out)
        assert message.startswith(
            f"error: {out}: no room for the shards, which need {size / 2**20:.1f} MiB while its disk has 0."
        )
        assert len(list(out.glob(".staging/*.json"))) == 7
        resize(size * 8)
        process = shard(towns, out, "--workers", workers)
        lines, _ = process.communicate()
        assert "reading scenes: 7 of 7 scenes, 0 tiles" in lines
        assert without_preview(out) == digests(packed.root)
        assert verify(out) == []


@pytest.mark.parametrize("options", [[], ["--verify"], ["--fresh"]])
def test_a_limit_on_file_sizes(packed: Packed, towns: Path, tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "set"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    message = refused(shard(towns, out, "--workers", "2", prepare=limited), out)
    assert f"{out}: no more can be written (File too large" in message
    assert shard(towns, out, *options).wait() == 0
    assert without_preview(out) == digests(packed.root)


def test_killed_while_the_contact_sheet_is_drawn(packed: Packed, towns: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert shard(towns, out).wait() == 0
    (out / ".preview.png.0123456789ab.tmp").write_bytes(b"half")  # as files.atomic_file leaves it
    (out / "preview.png").unlink()
    assert shard(towns, out).wait() == 0
    assert without_preview(out) == digests(packed.root)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONUTF8": "0"},
        {"PYTHONHASHSEED": "4294967295", "LC_ALL": "C.UTF-8", "TZ": "America/St_Johns", "OMP_NUM_THREADS": "3"},
    ],
)
def test_surroundings_change_no_byte(packed: Packed, towns: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    process = shard(towns, tmp_path / "set", "--workers", "2", environment=environment)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert without_preview(tmp_path / "set") == digests(packed.root)
