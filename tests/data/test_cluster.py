"""Packing on Dask: a scheduler and two worker processes over TCP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import Client

import shards.cluster
from shards.errors import InputError
from shards.pack import Packed, pack
from shards.progress import State
from tests.data.cluster import REPOSITORY, DaskCluster, running_cluster, wait_until
from tests.data.test_interruption import digests, same_recipe

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def await_workers(cluster: DaskCluster, count: int) -> None:
    with Client(cluster.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]  # not typed
        client.wait_for_workers(count, timeout=60)


@pytest.mark.parametrize("moment", ["stage", "assemble"])
def test_a_killed_worker_changes_no_byte(packed: Packed, towns: Path, tmp_path: Path, moment: str) -> None:
    states: list[State] = []
    with running_cluster(tmp_path) as cluster:
        cluster.add_worker()
        cluster.add_worker()
        await_workers(cluster, 2)

        def progress(state: State) -> None:
            if (state.step, state.done) == (moment, 3):
                cluster.kill_worker()
            states.append(state)

        done = pack(same_recipe(), towns, tmp_path / "set", dask=cluster.address, progress=progress)
        assert cluster.workers[0].poll() is not None
        assert cluster.workers[1].poll() is None
    assert digests(done.root) == digests(packed.root)
    assert [state.done for state in states if state.step == "stage"] == list(range(8))
    assert not (tmp_path / "set/.staging").exists()


def test_a_worker_must_have_the_same_code_and_see_the_folders(towns: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for package in ("shards", "dctc"):
        shutil.copytree(REPOSITORY / package, other / package)
    (other / "shards/errors.py").write_text((other / "shards/errors.py").read_text() + "# newer\n")
    with running_cluster(tmp_path) as cluster:
        cluster.add_worker(code=other)
        await_workers(cluster, 1)
        with pytest.raises(InputError, match=r"worker tcp://127\.0\.0\.1:\d+ has code .*install the same versions"):
            pack(same_recipe(), towns, tmp_path / "set", dask=cluster.address)
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs "{tmp_path}/set" && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount in a namespace of its own, to be a machine that shares no folder")
    (tmp_path / "second").mkdir()
    with running_cluster(tmp_path / "second") as cluster:
        cluster.add_worker(prefix=apart)
        await_workers(cluster, 1)
        with pytest.raises(
            InputError, match=r"does not see .*/set/\.staging/token-.*OUT and ROOT must be on a file sys"
        ):
            pack(same_recipe(), towns, tmp_path / "set", dask=cluster.address)
        # One that comes later and shares the folder does the work; one that does not is never asked twice.
        cluster.kill_worker()
        cluster.add_worker()
        wait_until(lambda: cluster.workers[1].poll() is None, "the second worker")
        await_workers(cluster, 1)
        assert pack(same_recipe(), towns, tmp_path / "set", dask=cluster.address).report.scenes == 7


def test_no_scheduler(towns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.cluster, "PATIENCE", 0.5)
    with pytest.raises(InputError, match=r"--dask tcp://127\.0\.0\.1:9: no Dask scheduler answers there"):
        pack(same_recipe(), towns, tmp_path / "set", dask="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match=r"--dask nonsense://x: no Dask scheduler answers there"):
        pack(same_recipe(), towns, tmp_path / "set", dask="nonsense://x")


def test_no_workers(towns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_cluster(tmp_path) as cluster:
        monkeypatch.setattr(shards.cluster, "PATIENCE", 3)
        with pytest.raises(InputError, match=r"no worker took a task within 3 s; start workers \(dask worker tcp://"):
            pack(same_recipe(), towns, tmp_path / "set", dask=cluster.address)


def refused(arguments: list[str], hide: str = "") -> str:
    """What `dctc shard` prints when it refuses; ``hide`` is a package that cannot be imported."""
    start = f"import sys; sys.modules.update({{n: None for n in {hide!r}.split()}}); from dctc.cli import main; main()"
    command = [sys.executable, "-c", start, "shard", str(REPOSITORY / "configs/data/potsdam.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_dask_not_installed(towns: Path, tmp_path: Path) -> None:
    message = refused([str(tmp_path / "set"), "--root", str(towns), "--dask", "tcp://h:1"], hide="distributed")
    assert message == "error: --dask needs the package distributed: pip install 'dctc[dask]'\n"


def test_workers_and_dask_exclude_each_other(towns: Path, tmp_path: Path) -> None:
    message = refused([str(tmp_path / "set"), "--root", str(towns), "--dask", "tcp://h:1", "--workers", "2"])
    assert "--workers and --dask exclude each other" in message
    assert not (tmp_path / "set").exists()
