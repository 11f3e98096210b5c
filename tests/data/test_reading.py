from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import webdataset
from PIL import Image

from shards.errors import InputError
from shards.index import COLUMNS, Index, rebuild, tile_name
from shards.pack import Packed, pack
from shards.splits import key_hashes
from shards.summary import contact_sheet, summarize, tables
from shards.tar import members
from shards.tiles import read_tile
from tests.data import layouts
from tests.data.own import generic

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_webdataset_reads_every_tile_once(packed: Packed) -> None:
    index = Index.open(packed)
    names = [tile_name(packed, index, row) for row in range(len(index))]
    urls = [str(packed.root / shard.name) for shard in packed.manifest.shards]
    seen = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        seen[sample["__key__"]] = sample
    assert sorted(seen) == names
    for row, name in enumerate(names):
        tile = read_tile(packed, index, row)
        assert json.loads(seen[name]["meta.json"]) == tile.meta
        assert ("label.tif" in seen[name]) == (tile.label is not None)
        assert "/" not in name
        assert "." not in name


def test_a_member_saved_from_the_tar_opens_in_gdal(packed: Packed, tmp_path: Path) -> None:
    with tarfile.open(packed.root / "shards/test-000000.tar") as archive:
        name = archive.getnames()[0]
        archive.extract(name, tmp_path, filter="data")
    with rasterio.open(tmp_path / name) as source:
        assert (source.count, source.shape, str(source.compression)) == (3, (64, 64), "Compression.zstd")


def test_tarfile_agrees_with_the_header_walk_and_the_index(packed: Packed) -> None:
    index = Index.open(packed)
    offsets: dict[str, tuple[int, int, int]] = {}
    for number, shard in enumerate(packed.manifest.shards):
        path = packed.root / shard.name
        with tarfile.open(path) as archive:
            infos = archive.getmembers()
        assert [(m.name, m.offset, m.size) for m in members(path)] == [(i.name, i.offset_data, i.size) for i in infos]
        assert {(i.mtime, i.uid, i.gid, i.mode, i.uname, i.type) for i in infos} == {(0, 0, 0, 0o644, "", b"0")}
        assert path.read_bytes()[257:265] == b"ustar\x0000"
        assert (path.stat().st_size % 10240, path.stat().st_size) == (0, shard.bytes)
        offsets |= {i.name: (number, i.offset_data, i.size) for i in infos}
    for row in range(len(index)):
        name = tile_name(packed, index, row)
        for what, suffix in (("image", "image.tif"), ("label", "label.tif"), ("meta", "meta.json")):
            found = offsets.get(f"{name}.{suffix}", (int(index.shard[row]), 0, 0))
            assert found == (
                index.shard[row],
                getattr(index, f"{what}_offset")[row],
                getattr(index, f"{what}_size")[row],
            )


def test_rows_are_sorted_by_key(packed: Packed) -> None:
    index = Index.open(packed)
    names = [tile_name(packed, index, row) for row in range(len(index))]
    assert names == sorted(names)
    assert np.array_equal(key_hashes(names), index.key_hash)
    with pytest.raises(InputError, match="split 'trian' is not known"):
        index.rows("trian")


def test_the_index_is_memory_mapped_and_compact(packed: Packed) -> None:
    index = Index.open(packed)
    assert isinstance(index.image_offset.base, np.memmap)
    assert sum(np.dtype(dtype).itemsize for dtype in COLUMNS.values()) <= 96


def test_a_rebuilt_index_equals_the_written_one(packed: Packed, tmp_path: Path) -> None:
    index = Index.open(packed)
    columns = rebuild(packed)
    assert columns.keys() == COLUMNS.keys()
    for name, column in columns.items():
        assert column.dtype == getattr(index, name).dtype
        assert np.array_equal(column, getattr(index, name)), name


def test_rebuilding_names_a_damaged_header(packed: Packed, tmp_path: Path) -> None:
    import shutil

    root = Path(shutil.copytree(packed.root, tmp_path / "copy"))
    path = root / packed.manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="no sound member header at byte 0"):
        list(members(path))


def test_summary_is_plain_and_complete(packed: Packed) -> None:
    summary = json.loads(json.dumps(summarize(packed)))
    assert summary["tiles"] == 112
    assert summary["splits"]["train"]["labelled"] == 64
    assert summary["labelled"]["shares"]["1/8"] == 8
    assert [c["name"] for c in summary["classes"]][-1] == "clutter"
    for split in ("train", "val", "test"):
        assert sum(c["share"][split] for c in summary["classes"]) == pytest.approx(1)
    assert summary["bands"][0]["percentiles"].keys() == {"1", "2", "50", "98", "99"}


def test_tables_say_the_counts(packed: Packed) -> None:
    from rich.console import Console

    printed = io.StringIO()
    console = Console(file=printed, width=140)
    for table in tables(packed):
        console.print(table)
    text = printed.getvalue()
    for part in ("potsdam: 64 px tiles", "low_vegetation", "labelled shares", "80", "1/8", "padding"):
        assert part in text


def test_contact_sheet_shows_tiles_beside_their_labels(packed: Packed, tmp_path: Path) -> None:
    contact_sheet(packed, tmp_path / "sheet.png", tiles=6, columns=2, width=64)
    contact_sheet(packed, tmp_path / "again.png", tiles=6, columns=2, width=64)
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    # The third tile is the first of the validation split: left a photograph, right nothing but the palette.
    shown = picture[8 + 88 + 16 : 8 + 88 + 16 + 64, 8 + 64 : 8 + 128].reshape(-1, 3)
    palette = {tuple(color) for color in [*layouts.ISPRS.tolist(), [64, 64, 64]]}
    assert {tuple(color) for color in shown.tolist()} <= palette
    assert len({tuple(color) for color in shown.tolist()}) > 3
    legend = picture[-7 * 18 :, 8:20].reshape(-1, 3).tolist()
    assert palette <= {tuple(color) for color in legend}
    with pytest.raises(InputError, match=r"sheet\.png: cannot be written"):
        contact_sheet(packed, tmp_path / "none" / "sheet.png")


def test_contact_sheet_of_unlabelled_float_bands() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layouts.write_tiff(root / "in/images/x.tif", layouts.random_image(1, 64, 64, 0, "float32"))
        packed = pack(generic(bands={"names": ["elevation"]}, label=None, classes=[]), root / "in", root / "set")
        contact_sheet(packed, root / "sheet.png", width=32)
        assert Image.open(root / "sheet.png").size[0] > 64
