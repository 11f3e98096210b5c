"""Datasets behind real servers: the same batches, each shard fetched once a node, within bounds, whatever breaks."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from dctc.data.loaders import Normaliser, TrainingStream, evaluation_batches
from dctc.data.order import Layout
from shards.errors import InputError
from shards.index import Index
from shards.manifest import Dataset
from shards.pack import Packed
from shards.remote import CacheSettings
from tests.data.served import Served, http, s3
from tests.tiny import ROOT, run, write_config

CPU = torch.device("cpu")
Order = Literal["global", "block"]


@pytest.fixture
def served(packed: Packed) -> Iterator[Served]:
    with http(packed.root) as server:
        yield server


def opened(url: str, cache: Path, limit: int = 2**40) -> Dataset:
    return Dataset.open(url, CacheSettings(cache, limit))


def streams(dataset: Dataset, workers: int = 0, order: Order = "block", rounds: int = 12) -> list[torch.Tensor]:
    """Images and labels of the rounds of both streams, on one process."""
    index = Index.open(dataset)
    tensors = []
    for number, rows in enumerate((index.rows("train")[::2], index.rows("train"))):
        stream = TrainingStream(
            dataset, number, rows, 8, 3, Layout(1, 0, 2), "flips", workers, not number, order, 2
        )  # fmt: skip
        for batches in stream.batches(range(rounds), CPU):
            tensors += [tensor for batch in batches for tensor in batch if isinstance(tensor, torch.Tensor)]
    return tensors


def cached(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shards/*.tar"))


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("order", ["global", "block"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_over_http_are_the_local_ones(
    packed: Packed, served: Served, tmp_path: Path, workers: int, order: Order
) -> None:
    remote = opened(served.url, tmp_path)
    assert remote.digest == packed.digest
    assert_equal(streams(remote, workers, order), streams(packed, 0, order))
    train = {Path(shard.name).name for shard in packed.manifest.shards if shard.split == "train"}
    assert served.shards == dict.fromkeys(train, 1), "look-ahead, workers and both streams share one download"


def test_batches_over_s3_are_the_local_ones(packed: Packed, tmp_path: Path) -> None:
    with s3(packed.root) as url:
        assert_equal(streams(opened(url, tmp_path)), streams(packed))


def test_evaluation_reads_each_tile_once_from_afar(packed: Packed, served: Served, tmp_path: Path) -> None:
    remote = opened(served.url, tmp_path)
    rows = Index.open(remote).rows("train")
    normaliser = Normaliser.of(remote.manifest, CPU)
    largest = max(shard.bytes for shard in packed.manifest.shards)
    remote = opened(served.url, tmp_path, 3 * largest)
    read = [raw["rows"] for _, raw in evaluation_batches(remote, rows, 4, Layout(), normaliser, 2)]
    seen = torch.cat(read)
    assert sorted(seen[seen >= 0].tolist()) == rows.tolist()
    assert set(served.shards.values()) == {1}, "shard by shard, so that even a small cache fetches each one once"


def test_the_limit_holds_and_the_batches_stay_the_same(
    packed: Packed, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    largest = max(shard.bytes for shard in packed.manifest.shards)
    remote = opened(served.url, tmp_path, 5 * largest)
    most, rows = 0, Index.open(remote).rows("train")
    stream = TrainingStream(remote, 1, rows, 4, 0, Layout(), "none", 0, False, "block", 2)
    local = TrainingStream(packed, 1, rows, 4, 0, Layout(), "none", 0, False, "block", 2)
    rounds = range(3 * len(rows) // 4)
    for one, other in zip(stream.batches(rounds, CPU), local.batches(rounds, CPU), strict=True):
        assert torch.equal(one[0][0], other[0][0])
        most = max(most, sum(path.stat().st_size for path in cached(tmp_path) if path.exists()))
    assert 0 < most <= 5 * largest
    assert not caplog.records
    epochs = 3
    assert max(served.shards.values()) <= epochs, "order block needs a shard in one stretch of an epoch"


def test_a_limit_below_one_batch_is_exceeded_and_said_not_waited_for(
    packed: Packed, served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = opened(served.url, tmp_path, 1)
    assert_equal(streams(remote, rounds=2), streams(packed, rounds=2))
    assert any("more than data.cache_bytes (1)" in record.getMessage() for record in caplog.records)


def test_the_least_recently_used_goes_first_and_never_one_in_use(
    packed: Packed, served: Served, tmp_path: Path
) -> None:
    sizes = [shard.bytes for shard in packed.manifest.shards]
    remote = opened(served.url, tmp_path, sum(sizes[:3]))
    held = remote.open_shard(0)
    remote.open_shard(1).close()
    remote.open_shard(2).close()
    remote.open_shard(1).close()  # used again: now 2 is the older one
    remote.open_shard(3).close()
    kept = {path.name for path in cached(tmp_path)}
    names = [Path(shard.name).name for shard in packed.manifest.shards]
    assert names[0] in kept, "in use"
    assert names[2] not in kept
    assert {names[1], names[3]} <= kept
    content = held.read()
    assert content is not None
    assert hashlib.sha256(content).hexdigest() == packed.manifest.shards[0].sha256


READER = """
import sys
from pathlib import Path
from shards.manifest import Dataset
from shards.remote import CacheSettings
dataset = Dataset.open(sys.argv[1], CacheSettings(Path(sys.argv[2])))
print("opened", flush=True)
for number in range(len(dataset.manifest.shards)):
    dataset.open_shard(number).close()
"""


def reader(url: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, url, str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_each_shard_once(packed: Packed, served: Served, tmp_path: Path) -> None:
    served.slow = 0.0005
    readers = [reader(served.url, tmp_path) for _ in range(2)]
    assert [process.wait(60) for process in readers] == [0, 0]
    assert served.shards == {Path(shard.name).name: 1 for shard in packed.manifest.shards}
    assert max(served.gets[f"{column}.npy"] for column in packed.manifest.index) == 1


def test_killed_while_fetching_and_started_again(packed: Packed, served: Served, tmp_path: Path) -> None:
    process = reader(served.url, tmp_path)
    assert process.stdout is not None
    served.slow = 0.02
    while not (parts := list(tmp_path.glob("*/shards/*.part"))):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts[0].exists(), "the kill was in the middle of a download"
    assert parts[0].with_suffix("") not in cached(tmp_path)
    served.slow = 0.0
    remote = opened(served.url, tmp_path)
    for number, shard in enumerate(packed.manifest.shards):
        with remote.open_shard(number) as file:
            content = file.read()
        assert content is not None
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert not list(tmp_path.glob("*/*/*.part"))


def test_a_damaged_download_is_fetched_again(packed: Packed, served: Served, tmp_path: Path) -> None:
    remote = opened(served.url, tmp_path)
    served.spoil = 2
    remote.open_shard(0).close()
    assert list(served.shards.values()) == [3]
    served.spoil = 100
    with pytest.raises(InputError, match=rf"{served.url}/shards/.*\.tar: cannot be fetched.*not those that the manif"):
        remote.open_shard(1)
    assert [path.name for path in cached(tmp_path)] == [Path(packed.manifest.shards[0].name).name]


def test_a_damaged_cached_index_is_fetched_again(served: Served, tmp_path: Path) -> None:
    remote = opened(served.url, tmp_path)
    (remote.root / "index" / "shard.npy").write_bytes(b"nonsense")
    Index.open(opened(served.url, tmp_path))
    assert served.gets["shard.npy"] == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_goes_away_is_named_in_seconds(packed: Packed, tmp_path: Path, workers: int) -> None:
    with http(packed.root) as server:
        remote = opened(server.url, tmp_path)
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        streams(remote, workers)
    assert f"{server.url}/shards/" in error.value.message
    assert "cannot be fetched" in error.value.message
    with pytest.raises(InputError, match=rf"{server.url}/manifest\.json: cannot be read"):
        opened(server.url, tmp_path)
    assert time.monotonic() - started < 20


def test_an_s3_server_that_is_away_is_named_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"s3://nowhere/set/manifest\.json: cannot be read"):
        opened("s3://nowhere/set", tmp_path)
    assert time.monotonic() - started < 20


def test_what_is_not_there_is_said_at_once(served: Served, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/nothing/manifest\.json: no such file, so there is no complete dataset"):
        opened(f"{served.url}/nothing", tmp_path)
    with pytest.raises(InputError, match=r"nonsense://x/manifest\.json"):
        opened("nonsense://x", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"set data\.cache or DCTC_CACHE"):
        opened(served.url, tmp_path / "file")


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"extra `remote`: pip install 'dctc\[remote\]'"):
        opened("https://example.org/set", tmp_path)


@pytest.mark.matrix
@pytest.mark.slow
def test_train_evaluate_and_inspect_from_afar(tiny_dataset: Path, tmp_path: Path) -> None:
    local = write_config(tmp_path / "local.yaml", tiny_dataset, data={"order": "block"})
    run("dctc", "train", local)
    weights = [tmp_path / "runs" / "synthetic-scene" / name / "model.safetensors" for name in ("local", "afar")]
    with http(tiny_dataset) as server:
        cache = tmp_path / "cache"
        afar = write_config(tmp_path / "afar.yaml", tiny_dataset, data={"dataset": server.url, "workers": 1})
        run("dctc", "train", afar, DCTC_CACHE=str(cache))
        shown = run("dctc", "inspect", server.url, "--picture", tmp_path / "sheet.png", DCTC_CACHE=str(cache))
        assert server.url in shown.stdout.replace("\n", "")
        run("dctc", "evaluate", weights[1], server.url, "--out", tmp_path / "scores", DCTC_CACHE=str(cache))
        assert set(server.shards.values()) == {1}
    assert (tmp_path / "sheet.png").exists()
    from safetensors.torch import load_file

    one, other = (load_file(path) for path in weights)
    assert all(np.array_equal(one[key], other[key]) for key in one)
