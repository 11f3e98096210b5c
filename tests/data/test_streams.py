"""Both training streams through real DataLoader workers: the same batches on any layout, however often resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from dctc.data.augment import BoxSpec
from dctc.data.loaders import StreamBatch, TrainingStream
from dctc.data.order import LABELLED, UNLABELLED, BlockOrder, GlobalOrder, Layout, stream_slice
from shards.errors import AccessError, InputError
from shards.index import Index
from shards.manifest import Dataset
from shards.pack import Packed, pack
from tests.data import layouts
from tests.tiny import ROOT, run

CPU = torch.device("cpu")
BATCH = 12
# Ranks, micro-batches, workers; micro-batches are even, for CutMix.
LAYOUTS = [(1, 1, 0), (1, 1, 2), (1, 2, 0), (1, 3, 0), (1, 6, 0), (2, 1, 0), (2, 3, 0), (3, 1, 0), (3, 2, 1), (6, 1, 0)]
Settings = dict[str, Any]
STRONG: Settings = {"augment": "strong", "cutmix": True}


def stream(dataset: Dataset, number: int, layout: Layout, workers: int = 0, **settings: Any) -> TrainingStream:
    """The labelled stream of half of the labels, or the unlabelled one of all training tiles; CutMix mixes labels."""
    index = Index.open(dataset)
    rows = index.rows("train") if number == UNLABELLED else index.rows("train")[::2]
    labelled = number == LABELLED
    cutmix = settings.pop("cutmix", False) and labelled
    augment = settings.pop("augment", "none")
    return TrainingStream(
        dataset, number, rows, BATCH, 3, layout, augment, workers, labelled, mix=2, cutmix=cutmix, **settings
    )


def joined(batches: list[list[StreamBatch]]) -> list[Tensor]:
    """Images, validity, labels, views and boxes of a global batch, given the micro-batches of each rank."""
    micros = [micro for rank in batches for micro in rank]
    single: list[list[Tensor | None]] = [[m.images for m in micros], [m.valid for m in micros]]
    single.append([m.labels for m in micros])
    for number in range(len(micros[0].views)):
        single += [[m.views[number] for m in micros], [m.view_valid[number] for m in micros]]
    single.append([None if m.boxes is None else m.boxes.transpose(0, 1) for m in micros])
    return [torch.cat([t for t in kind if t is not None]) for kind in single if kind[0] is not None]


def rounds_of(
    dataset: Dataset, number: int, shape: tuple[int, int, int], rounds: range, **settings: Any
) -> list[list[Tensor]]:
    """The global batches of some rounds, read on a layout."""
    world, accumulation, workers = shape
    ranks = [
        stream(dataset, number, Layout(world, rank, accumulation), workers, **settings).batches(rounds, CPU)
        for rank in range(world)
    ]
    found = [joined(list(batches)) for batches in zip(*ranks, strict=True)]
    assert len(found) == len(rounds)
    return found


def assert_same(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    assert len(one) == len(other) > 0
    for first, second in zip(one, other, strict=True):
        assert len(first) == len(second) > 1
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (LABELLED, "block"), (UNLABELLED, "global"),
        *(pytest.param(*pair, marks=pytest.mark.matrix) for pair in ((LABELLED, "global"), (UNLABELLED, "block"))),
    ],
)  # fmt: skip
def test_the_same_pixels_on_every_layout(packed: Packed, number: int, order: str) -> None:
    """Order, weak and strong augmentation and CutMix included, over the end of an epoch."""
    rounds = range(3, 7)
    one = rounds_of(packed, number, LAYOUTS[0], rounds, order=order, **STRONG)
    for shape in LAYOUTS[1:]:
        assert_same(one, rounds_of(packed, number, shape, rounds, order=order, **STRONG))
    assert not torch.equal(one[0][0], rounds_of(packed, number, LAYOUTS[0], rounds, order=order)[0][0])


@pytest.mark.parametrize("order", ["global", "block"])
def test_resumed_at_every_round_on_other_layouts_twice_in_a_row(packed: Packed, order: str) -> None:
    whole, last = rounds_of(packed, UNLABELLED, (1, 1, 0), range(7), order=order, augment="flips"), 7
    shapes = [(1, 2, 0), (2, 1, 0), (3, 2, 0), (1, 1, 0)]
    for first in range(1, last - 1):
        for second in (first + 1, last - 1):
            parts: list[list[Tensor]] = []
            for place, part in enumerate((range(first), range(first, second), range(second, last))):
                if len(part):
                    shape = shapes[(first + second + place) % len(shapes)]
                    parts += rounds_of(packed, UNLABELLED, shape, part, order=order, augment="flips")
            assert_same(whole, parts)


def test_views_and_boxes_are_the_same_on_every_layout(packed: Packed) -> None:
    """What methods ask of the unlabelled stream, in the geometry of a weak view."""
    settings: Settings = {"augment": "weak", "views": 2, "boxes": BoxSpec(3, 0.25, 0.5)}
    one = rounds_of(packed, UNLABELLED, LAYOUTS[0], range(2), **settings)
    shape_of = one[0][0].shape
    assert [tensor.shape for tensor in one[0][2::2]] == [shape_of, shape_of, (BATCH, 2, *shape_of[2:])]
    for shape in LAYOUTS[1:]:
        assert_same(one, rounds_of(packed, UNLABELLED, shape, range(2), **settings))
    images, _, first, seen, second, _, boxes = one[0]
    assert not torch.equal(first, second)
    assert not torch.equal(boxes[:, 0], boxes[:, 1]), "each view has boxes of its own"
    brightness = [tensor.mean(dim=1)[seen] for tensor in (images, first)]
    assert torch.corrcoef(torch.stack(brightness))[0, 1] > 0.5, "a view lies pixel by pixel on the image"


def test_boxes_need_pairs(packed: Packed) -> None:
    with pytest.raises(InputError, match=r"pairs the tiles .* and 3 is odd: make data\.batch_unlabelled"):
        stream(packed, UNLABELLED, Layout(4, 0, 1), boxes=BoxSpec(3, 0.25, 0.5))


def test_a_stream_may_be_read_again_with_workers(packed: Packed) -> None:
    """As validation between two stretches of training does: a later call knows nothing of an earlier one."""
    again = stream(packed, LABELLED, Layout(1, 0, 2), workers=1)
    first = [joined([batches]) for batches in again.batches(range(2, 4), CPU)]
    begun = again.batches(range(9), CPU)
    next(begun)  # left in the middle
    assert_same(first, [joined([batches]) for batches in again.batches(range(2, 4), CPU)])


def test_fewer_shards_than_ranks_and_workers(hamlet: Path, tmp_path: Path) -> None:
    dataset = pack(layouts.recipe("potsdam"), hamlet, tmp_path / "set")
    assert sum(shard.split == "train" for shard in dataset.manifest.shards) == 1
    one = rounds_of(dataset, UNLABELLED, (1, 1, 0), range(4))
    assert_same(one, rounds_of(dataset, UNLABELLED, (2, 1, 2), range(4)))


# ---- damage


def damaged(packed: Packed, tmp_path: Path, how: str) -> tuple[Dataset, set[int]]:
    """A copy of a dataset with a flipped byte in one tile, or a shard cut short or deleted; the rows that are lost."""
    root = Path(shutil.copytree(packed.root, tmp_path / how))
    index = Index.open(packed)
    row = int(index.rows("train")[5])
    path = root / packed.manifest.shards[int(index.shard[row])].name
    shard = set(np.flatnonzero(index.shard == index.shard[row]).tolist())
    if how == "deleted":
        path.unlink()
        return Dataset.open(root), shard
    data = bytearray(path.read_bytes())
    start = int(index.image_offset[row])
    if how == "cut":
        path.write_bytes(data[:start])
        return Dataset.open(root), {other for other in shard if int(index.image_offset[other]) >= start}
    data[start + 200] ^= 1
    path.write_bytes(data)
    return Dataset.open(root), {row}


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_stand_ins_keep_the_order_on_every_layout(
    packed: Packed, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, lost = damaged(packed, tmp_path, how)
    rows = Index.open(packed).rows("train")
    rounds = range(3)
    found = rounds_of(bad, UNLABELLED, (1, 1, 0), rounds, substitute=True)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    sound = rounds_of(packed, UNLABELLED, (1, 1, 0), rounds)
    places = stream_slice(GlobalOrder(len(rows), 3, UNLABELLED), 0, 3 * BATCH)
    expected = [rows[place] for place in places]
    met = {int(row) for row in expected} & lost
    assert met
    assert len(warnings) == len(met), "each is said once"
    images, others = (torch.cat([batch[0] for batch in batches]) for batches in (found, sound))
    for slot, row in enumerate(expected):
        if row in lost:
            after = np.roll(rows, -int(np.flatnonzero(rows == row)[0]))
            stand_in = next(int(other) for other in after if other not in lost)
            assert torch.equal(images[slot], tile(packed, stand_in))
        else:
            assert torch.equal(images[slot], others[slot])
    for shape in [(1, 1, 2), *LAYOUTS[2:5]]:
        assert_same(found, rounds_of(bad, UNLABELLED, shape, rounds, substitute=True))


def tile(packed: Packed, row: int) -> Tensor:
    """A tile as the network sees it."""
    only = TrainingStream(packed, UNLABELLED, np.array([row]), 1, 0, Layout(), "none", 0, False)
    return next(only.batches(range(1), CPU))[0][0][0]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_damage_is_named_with_shard_offset_and_key(packed: Packed, tmp_path: Path, how: str, workers: int) -> None:
    bad, lost = damaged(packed, tmp_path, how)
    index = Index.open(packed)
    with pytest.raises(InputError) as error:
        for _ in stream(bad, UNLABELLED, Layout(), workers).batches(range(9), CPU):
            pass
    assert not [child for child in multiprocessing.active_children() if child.daemon], "workers end with the error"
    message = error.value.message
    shard = packed.manifest.shards[int(index.shard[min(lost)])].name
    assert message.startswith(f"{bad.root / shard}: ")
    if how != "deleted":
        offsets = {int(index.image_offset[row]) for row in lost}
        assert any(f"at offset {offset}" in message for offset in offsets)
        assert "tile" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_reached_is_no_damage(packed: Packed, tmp_path: Path, workers: int) -> None:
    """Or processes with other limits would read other tiles."""
    root = Path(shutil.copytree(packed.root, tmp_path / "copy"))
    index = Index.open(packed)
    path = root / packed.manifest.shards[int(index.shard[index.rows("train")[0]])].name
    path.unlink()
    path.symlink_to(path.name)  # a loop: any user meets ELOOP
    with pytest.raises(AccessError) as error:
        rounds_of(Dataset.open(root), UNLABELLED, (1, 1, workers), range(9), substitute=True)
    assert error.value.message == f"{path}: cannot be opened (Too many levels of symbolic links)"


ABANDONED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from tests.data.test_streams import Dataset, Layout, stream

def main():
    batches = stream(Dataset.open(sys.argv[2]), 1, Layout(), 2).batches(range(90), torch.device("cpu"))
    next(batches)
    sys.kept = batches
    raise SystemExit(3)

if __name__ == "__main__":
    main()
"""


def test_a_process_ends_with_batches_still_open(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "abandon.py").write_text(ABANDONED)
    command = [sys.executable, "-W", "ignore", str(tmp_path / "abandon.py"), str(ROOT), str(packed.root)]
    process = subprocess.Popen(command)
    family: set[psutil.Process] = set()
    while process.poll() is None:
        family.update(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.02)
    assert process.returncode == 3
    assert len(family) >= 4, "the fork server, multiprocessing's tracker of resources, two workers"
    assert not psutil.wait_procs(family, timeout=20)[1]


# ---- real ranks, memory, variety

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from dctc.data.loaders import _loader
from dctc.data.order import GlobalOrder, Layout, RankBatchSampler
from dctc.data.tiles import TileDataset
from shards.index import Index
from shards.manifest import Dataset

def main():
    accelerator = Accelerator()
    dataset = Dataset.open(sys.argv[2])
    rows = Index.open(dataset).rows("train")
    layout = Layout(accelerator.num_processes, accelerator.process_index, 2)
    read = []
    for number in (0, 1):
        sampler = RankBatchSampler(rows, GlobalOrder(len(rows), 3, number), 12, range(20), layout)
        for batch in _loader(TileDataset(dataset, number == 0), sampler, 2, 2, False):
            read.append([number, batch["positions"].tolist(), batch["rows"].tolist()])
    Path(sys.argv[3], f"{layout.rank}.json").write_text(json.dumps([layout.world, read]))
    accelerator.end_training()

if __name__ == "__main__":  # a loader's worker imports it too
    main()
"""


def test_two_real_ranks_read_each_tile_once(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "read.py").write_text(SCRIPT)
    pair = ROOT / "launch" / "cpu_pair.yaml"
    run(
        "accelerate", "launch", "--config_file", pair, tmp_path / "read.py", ROOT, packed.root, tmp_path,
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [world for world, _ in told] == [2, 2]
    rows = Index.open(packed).rows("train")
    for number in (LABELLED, UNLABELLED):
        pairs = [
            (position, row)
            for _, read in told
            for which, positions, found in read
            if which == number
            for position, row in zip(positions, found, strict=True)
        ]
        expected = rows[stream_slice(GlobalOrder(len(rows), 3, number), 0, 20 * 12)]
        assert sorted(pairs) == list(enumerate(expected.tolist()))
    sizes = [[len(read), *{len(positions) for _, positions, _ in read}] for _, read in told]
    assert sizes[0] == sizes[1]


MEMORY = """
import os, sys
from pathlib import Path
import psutil, torch
sys.path.insert(0, sys.argv[1])
from dctc.data.loaders import TrainingStream
from dctc.data.order import Layout
from shards.index import Index
from shards.manifest import Dataset
dataset = Dataset.open(sys.argv[2])
rows = Index.open(dataset).rows("train")
stream = TrainingStream(dataset, 0, rows, 4, 0, Layout(), "strong", 0, True, cutmix=True)
epoch, me = len(rows) // 4, psutil.Process()
for number in range(8):  # each epoch begun anew, as what is validated is, so that nothing of an earlier one may stay
    for _ in stream.batches(range(number * epoch, (number + 1) * epoch), torch.device("cpu")):
        pass
    print(me.memory_info().rss, me.num_fds(), flush=True)
"""


def test_memory_and_open_files_stay_flat_over_epochs(packed: Packed) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(ROOT), str(packed.root)],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    told = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(told) == 8
    assert told[-1][1] == told[1][1]
    assert told[-1][0] - told[1][0] < 8 * 2**20, [resident // 2**20 for resident, _ in told]


def test_a_batch_mixes_as_many_scenes_and_shards_as_chance_would() -> None:
    """Distinct values in a batch of 64, against what independent draws give: n (1 - (1 - 1/n)^64)."""
    scenes, tiles = 400, 100
    scene_of = np.repeat(np.arange(scenes), tiles)
    shard_of = np.random.default_rng(0).permutation(scenes * tiles) // 100  # tiles lie where their key's hash put them
    ideal = scenes * (1 - (1 - 1 / scenes) ** 64)
    elements = stream_slice(GlobalOrder(len(scene_of), 0, 1), 0, 64 * 300).reshape(-1, 64)
    assert distinct(scene_of[elements]) >= 0.95 * ideal
    assert distinct(shard_of[elements]) >= 0.95 * ideal
    blocks = BlockOrder(shard_of.astype(np.uint32), 0, 1, 64)
    elements = stream_slice(blocks, 0, 64 * 300).reshape(-1, 64)
    assert distinct(scene_of[elements]) >= 0.95 * ideal, "a shard holds tiles of many scenes"
    assert distinct(shard_of[elements]) >= 26


def distinct(values: np.ndarray[Any, Any]) -> float:
    return float(np.mean([len(set(batch.tolist())) for batch in values]))
