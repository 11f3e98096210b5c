"""The node's cache when things go wrong: servers that hang, copies that rot, manifests that lie, many readers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dctc.data import ahead
from dctc.data.loaders import TrainingStream
from dctc.data.order import Layout
from dctc.data.tiles import TileDataset
from shards import remote
from shards.errors import InputError
from shards.files import file_sha256
from shards.index import Index
from shards.manifest import MANIFEST, Dataset
from shards.pack import Packed
from shards.remote import CacheSettings
from shards.report import PLAN, read_plan
from shards.tiles import read_tile
from shards.verify import rebuild_index, verify
from tests.data.served import Served, http
from tests.data.test_faults import small_disk
from tests.data.test_interruption import copied
from tests.tiny import ROOT, run

CPU = torch.device("cpu")


@pytest.fixture
def served(packed: Packed) -> Iterator[Served]:
    with http(packed.root) as server:
        yield server


@pytest.fixture
def silent() -> Iterator[str]:
    """The URL of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_hangs_holds_up_nobody_else(
    packed: Packed, served: Served, silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALLED_SECONDS", 4)
    monkeypatch.setattr(remote, "GIVE_UP", 5.0)
    healthy = Dataset.open(served.url, CacheSettings(tmp_path))
    assert healthy.store is not None
    hanging = Dataset(healthy.root, healthy.manifest, healthy.digest, store=remote.Store(silent, *_cache(healthy)))
    failed: list[str] = []

    def wait_for_the_silent() -> None:
        with pytest.raises(InputError) as error:
            hanging.open_shard(0)
        failed.append(error.value.message)

    waiting, started = threading.Thread(target=wait_for_the_silent), time.monotonic()
    waiting.start()
    while not list(tmp_path.glob("locks/*train-000000.tar.lock")):
        time.sleep(0.01)
    Dataset.open(served.url, CacheSettings(tmp_path)).open_shard(1).close()
    assert waiting.is_alive()
    assert time.monotonic() - started < 3
    waiting.join(30)
    assert f"{silent}/shards/train-000000.tar: cannot be fetched, 2 attempts failed" in failed[0]
    assert time.monotonic() - started < 12


def _cache(dataset: Dataset) -> tuple[Path, Path, int]:
    assert dataset.store is not None
    return dataset.store.cache, dataset.store.folder, dataset.store.limit


def damaged_copy(cache: Path, how: str) -> Path:
    path = min(cache.glob("*/shards/train-*.tar"))
    data = bytearray(path.read_bytes())
    for place in range(2048, len(data), 1024) if how == "flipped" else ():
        data[place] ^= 1
    path.write_bytes(data[:0] if how == "emptied" else data)
    return path


@pytest.mark.parametrize("how", ["flipped", "emptied"])
@pytest.mark.parametrize("substitute", [False, True])
def test_a_rotten_copy_is_fetched_again(
    packed: Packed, served: Served, tmp_path: Path, how: str, substitute: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's bytes are sound, so no tile is damaged: all nodes must go on reading the same tiles."""
    dataset = Dataset.open(served.url, CacheSettings(tmp_path))
    for number in range(len(dataset.manifest.shards)):
        dataset.open_shard(number).close()
    path = damaged_copy(tmp_path, how)
    rows = Index.open(dataset).rows("train")
    one, other = (
        TileDataset(source, True, rows if substitute else None).__getitems__(list(enumerate(rows.tolist())))
        for source in (dataset, packed)
    )
    for key in ("images", "valid", "labels", "rows", "damaged"):
        assert torch.equal(one[key], other[key])
    assert served.shards[path.name] == 2
    assert sum(served.shards.values()) == len(dataset.manifest.shards) + 1


def test_damage_on_the_server_is_damage(packed: Packed, tmp_path: Path) -> None:
    """A dataset with an index of other bytes: fetching its shards again helps nobody, and is not tried."""
    root = copied(packed, tmp_path)
    column = np.load(root / "index/image_crc32.npy")
    np.save(root / "index/image_crc32.npy", column ^ np.uint32(1))
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["index"]["image_crc32"] = file_sha256(root / "index/image_crc32.npy")
    (root / MANIFEST).write_text(json.dumps(manifest))
    with http(root) as server:
        dataset = Dataset.open(server.url, CacheSettings(tmp_path / "cache"))
        with pytest.raises(InputError, match=rf"{server.url}/shards/.*is damaged.*pack it again"):
            TileDataset(dataset, False)[(0, 0)]
        assert list(server.shards.values()) == [1]


@pytest.mark.parametrize("key", ["index", "shards"])
def test_a_manifest_cannot_lead_out_of_the_cache(packed: Packed, tmp_path: Path, key: str) -> None:
    root = copied(packed, tmp_path)
    manifest = json.loads((root / MANIFEST).read_text())
    if key == "index":
        manifest["index"]["../../../escaped"] = "0" * 64
    else:
        manifest["shards"][0]["name"] = "../../escaped.tar"
    (root / MANIFEST).write_text(json.dumps(manifest))
    with http(root) as server, pytest.raises(InputError, match=rf"manifest\.json: key {key}.*should match pattern"):
        Dataset.open(server.url, CacheSettings(tmp_path / "cache"))
    assert not list(tmp_path.rglob("escaped*"))


def test_rotten_copies_of_plan_and_manifest_are_fetched_again(served: Served, tmp_path: Path) -> None:
    dataset = Dataset.open(served.url, CacheSettings(tmp_path))
    plan = read_plan(dataset)
    (dataset.root / PLAN).write_text(json.dumps(plan | {"dropped": 9}))
    (dataset.root / MANIFEST).write_text("nonsense")
    again = Dataset.open(served.url, CacheSettings(tmp_path))
    assert read_plan(again) == plan
    assert Dataset.open(again.root).digest == dataset.digest


def test_the_cache_may_be_removed_while_it_is_used(packed: Packed, served: Served, tmp_path: Path) -> None:
    import shutil

    dataset = Dataset.open(served.url, CacheSettings(tmp_path / "cache"))
    dataset.open_shard(0).close()
    shutil.rmtree(tmp_path / "cache")
    with dataset.open_shard(0) as file:
        assert file.read() == (packed.root / packed.manifest.shards[0].name).read_bytes()


@pytest.mark.parametrize("bound", ["files", "bytes of one rank", "bytes of four ranks"])
def test_a_look_ahead_pins_few_shards(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """In the global order every batch wants other shards; they must not crowd out those of the node's other readers."""
    dataset = Dataset.open(served.url, CacheSettings(tmp_path))
    largest = max(shard.bytes for shard in dataset.manifest.shards)
    if bound == "files":
        monkeypatch.setattr(ahead, "MOST_PINS", 3)
    else:
        ranks = 4 if "four" in bound else 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        dataset = Dataset.open(served.url, CacheSettings(tmp_path, 3 * largest * 4 * ranks))
    rows = Index.open(dataset).rows("train")
    stream, most = TrainingStream(dataset, 1, rows, 2, 0, Layout(), "none", 0, False), 0.0
    for _ in stream.batches(range(20), CPU):
        time.sleep(0.02)
        links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
        pinned = [link for link in links if str(tmp_path) in link and link.endswith(".tar")]
        most = max(most, len(pinned) if bound == "files" else sum(_size(Path(link)) for link in pinned) / largest)
    assert 2 < most <= 3


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_the_disk_may_be_smaller_than_the_limit(packed: Packed, served: Served, tmp_path: Path) -> None:
    """The default limit is 64 GiB; what nobody uses goes when the disk is full before."""
    largest = max(shard.bytes for shard in packed.manifest.shards)
    with small_disk(tmp_path / "disk", 5 * largest + 2**17):
        dataset = Dataset.open(served.url, CacheSettings(tmp_path / "disk"))
        held = dataset.open_shard(0)
        for number in range(1, len(packed.manifest.shards)):
            with dataset.open_shard(number) as file:
                assert file.read() == (packed.root / packed.manifest.shards[number].name).read_bytes()
        assert held.read() == (packed.root / packed.manifest.shards[0].name).read_bytes()
        held.close()
        assert sum(served.shards.values()) == len(packed.manifest.shards)
        assert len(list((tmp_path / "disk").glob("*/shards/*.tar"))) < len(packed.manifest.shards)


# ---- verify and its like


def test_verify_hashes_what_lies_on_the_server(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCTC_CACHE", str(tmp_path / "cache"))
    root = copied(packed, tmp_path)
    with http(root) as server:
        assert verify(server.url) == []
        Dataset.open(server.url).open_shard(0).close()  # a sound copy in the cache hides nothing
        shard = root / packed.manifest.shards[0].name
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        (root / PLAN).unlink()
        told: list[tuple[int, int]] = []
        assert verify(server.url, lambda *done: told.append(done)) == [
            f"{server.url}/plan.json: is missing",
            f"{server.url}/{packed.manifest.shards[0].name}: its sha256 is not that of the manifest",
        ]
        assert told[-1] == (len(packed.manifest.shards),) * 2
        done = run("dctc", "verify", server.url, check=False)
        assert (done.returncode, "2 damaged" in done.stdout) == (1, True)
        with pytest.raises(InputError, match="give that folder"):
            rebuild_index(server.url)
        gone = server.url
    assert not list((tmp_path / "cache").rglob("*.part"))
    done = run("dctc", "verify", gone, check=False)
    assert done.returncode == 2, "a server that is away is no damage"
    assert "cannot be read" in done.stderr


def test_what_a_killed_verify_leaves_goes(packed: Packed, served: Served, tmp_path: Path) -> None:
    served.slow = 0.02
    process = subprocess.Popen(
        [sys.executable, "-m", "dctc.cli", "verify", served.url],
        cwd=ROOT,
        env=os.environ | {"DCTC_CACHE": str(tmp_path)},
    )
    while not list(tmp_path.glob("*/verified/*.part")):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert list(tmp_path.glob("*/verified/*.part"))
    served.slow = 0.0
    Dataset.open(served.url, CacheSettings(tmp_path)).open_shard(0).close()
    assert not list(tmp_path.rglob("*.part"))


def test_a_url_with_a_query_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set\?token=1: files are named after the URL, which must have no query"):
        Dataset.open("https://example.org/set?token=1", CacheSettings(tmp_path))


def test_damaged_metadata_is_named(packed: Packed, tmp_path: Path) -> None:
    root = copied(packed, tmp_path)
    index = Index.open(packed)
    path = root / packed.manifest.shards[int(index.shard[0])].name
    data = bytearray(path.read_bytes())
    data[int(index.meta_offset[0])] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"{path}: meta of tile \S+ is damaged"):
        read_tile(Dataset.open(root), index, 0)


@pytest.mark.parametrize("command", [("shard", ROOT / "configs/data/synthetic.yaml"), ("synth",)])
def test_urls_are_no_folders_to_write_to(tmp_path: Path, command: tuple[object, ...]) -> None:
    done = run("dctc", *command, "s3://bucket/set", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: s3://bucket/set: is a URL; write to a folder")
    assert not (ROOT / "s3:").exists()


@pytest.mark.parametrize("damage", ["metadata", "another dataset's shard", "another member"])
def test_an_index_is_not_made_of_damaged_shards(packed: Packed, tmp_path: Path, damage: str) -> None:
    root = copied(packed, tmp_path)
    index, path = Index.open(packed), root / packed.manifest.shards[0].name
    row, data = int(np.flatnonzero(index.shard == 0)[0]), bytearray(path.read_bytes())
    place = int(index.meta_offset[row])
    if damage == "metadata":
        data[place] ^= 1
    elif damage == "another dataset's shard":
        length = int(index.meta_size[row])
        text = bytes(data[place : place + length])
        scene = json.loads(text)["scene"].encode()
        data[place : place + length] = text.replace(b'"scene": "' + scene, b'"scene": "' + b"z" * len(scene))
    else:
        place = int(index.image_offset[row]) - 512
        header = data[place : place + 512].replace(b".image.tif", b".iMage.tif")
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
        data[place : place + 512] = header
    path.write_bytes(data)
    (root / "index/scene.npy").unlink()
    done = run("dctc", "verify", root, "--rebuild-index", check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {path}: is damaged or no shard of this dataset; `dctc verify` says more, pack the dataset again"
    )
