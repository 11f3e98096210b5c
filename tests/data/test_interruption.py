from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import InputError
from shards.index import Index
from shards.manifest import Dataset
from shards.pack import Packed, pack
from shards.progress import Report, State
from shards.recipe import Recipe
from shards.tiles import read_tile
from shards.verify import verify
from tests.data import layouts

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SCRIPT = """
import sys
from pathlib import Path
from shards.pack import pack
from tests.data import layouts

if __name__ == "__main__":
    recipe = layouts.recipe("potsdam", "shards.megabytes=0.1", 'splits.scene.val=["7_7"]')
    report = lambda state: print(state.step, state.done, state.total, flush=True)
    pack(recipe, Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]), progress=report)
"""


def same_recipe() -> Recipe:
    """The recipe of the fixture ``packed``."""
    return layouts.recipe("potsdam", "shards.megabytes=0.1", 'splits.scene.val=["7_7"]')


def digests(root: Path) -> dict[str, str]:
    """sha256 of every file of a dataset."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_worker_count_changes_no_byte(packed: Packed, towns: Path, tmp_path: Path) -> None:
    assert digests(pack(same_recipe(), towns, tmp_path / "set", workers=3).root) == digests(packed.root)


def test_copied_scenes_change_no_byte(packed: Packed, towns: Path, tmp_path: Path) -> None:
    shutil.copytree(towns, tmp_path / "elsewhere")
    assert digests(pack(same_recipe(), tmp_path / "elsewhere", tmp_path / "set").root) == digests(packed.root)


@pytest.mark.parametrize("moment", ["stage 3 7", "assemble 4 "])
def test_killed_and_resumed_gives_the_same_bytes(packed: Packed, towns: Path, tmp_path: Path, moment: str) -> None:
    script, out = tmp_path / "run.py", tmp_path / "set"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(towns), str(out), "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(InputError, match="no manifest"):
        Dataset.open(out)
    deadline = time.monotonic() + 20
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid), "workers outlive their parent"
    states: list[State] = []
    pack(same_recipe(), towns, out, progress=states.append)
    kept = {state.step: state.done for state in reversed(states)}
    assert kept["stage"] >= (3 if moment.startswith("stage") else 7)
    assert kept["assemble"] >= (0 if moment.startswith("stage") else 4)
    assert digests(out) == digests(packed.root)


def alive(session: int) -> bool:
    """Whether a process of a session still runs."""
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields and int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def copied(packed: Packed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed.root, tmp_path / "copy"))


def test_a_finished_dataset_is_left_as_it_is(packed: Packed, towns: Path, tmp_path: Path) -> None:
    root = copied(packed, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    for check in (False, True):
        assert pack(same_recipe(), towns, root, verify=check).digest == packed.digest
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_a_finished_dataset_that_lacks_a_shard_is_no_finished_dataset(
    packed: Packed, towns: Path, tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    root = copied(packed, tmp_path)
    harm(root / packed.manifest.shards[1].name)
    with pytest.raises(InputError, match=rf"{packed.manifest.shards[1].name} is .*; --fresh packs it again"):
        pack(same_recipe(), towns, root)
    assert pack(same_recipe(), towns, root, resume=False).digest == packed.digest


def test_a_finished_dataset_is_not_overwritten_by_another(packed: Packed, towns: Path, tmp_path: Path) -> None:
    root = copied(packed, tmp_path)
    with pytest.raises(InputError, match="another recipe made it; --fresh replaces it"):
        pack(layouts.recipe("potsdam"), towns, root)
    shutil.copytree(towns, tmp_path / "in")
    image = tmp_path / "in/2_Ortho_RGB/top_potsdam_2_10_RGB.tif"
    image.write_bytes(image.read_bytes()[:-1] + b"7")
    with pytest.raises(InputError, match=r"top_potsdam_2_10_RGB\.tif is not as it was"):
        pack(same_recipe(), tmp_path / "in", root)
    assert digests(root) == digests(packed.root)
    fresh = pack(layouts.recipe("potsdam"), towns, root, resume=False)
    assert digests(root) == digests(pack(layouts.recipe("potsdam"), towns, tmp_path / "clean").root)
    assert fresh.digest != packed.digest


@pytest.mark.parametrize("changed", ["tif", "tfw", "no tfw"])
def test_a_changed_scene_is_staged_again(packed: Packed, towns: Path, tmp_path: Path, changed: str) -> None:
    root, out = tmp_path / "in", tmp_path / "set"
    shutil.copytree(towns, root)
    image = root / f"2_Ortho_RGB/top_potsdam_2_10_RGB.{changed[-3:]}"
    whole = image.read_bytes()
    image.write_bytes(whole[:-3] + b"7" + whole[-2:])
    if changed == "no tfw":
        image.unlink()
    with pytest.raises(KeyboardInterrupt):
        pack(same_recipe(), root, out, progress=stop_at("assemble", 2))
    image.write_bytes(whole)
    assert digests(pack(same_recipe(), root, out).root) == digests(packed.root)


def stop_at(step: str, done: int) -> Report:
    def progress(state: State) -> None:
        if (state.step, state.done) == (step, done):
            raise KeyboardInterrupt

    return progress


def test_verified_resume_finds_damage_in_what_is_kept(packed: Packed, towns: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        pack(same_recipe(), towns, out, progress=stop_at("assemble", 3))
    flip(out / "shards/train-000000.tar", 5000)
    flip(out / ".staging/3_10.tiles", 700)
    assert digests(pack(same_recipe(), towns, out, verify=True).root) == digests(packed.root)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_two_writers_do_not_mix(towns: Path, tmp_path: Path) -> None:
    def second(state: State) -> None:
        if (state.step, state.done) == ("stage", 1):
            with pytest.raises(InputError, match="another `dctc shard` is at work there"):
                pack(same_recipe(), towns, tmp_path / "set")

    pack(same_recipe(), towns, tmp_path / "set", progress=second)


def test_a_sound_dataset_has_no_damage(packed: Packed) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(packed.root, lambda *step: seen.append(step)) == []
    assert seen[-1] == (len(packed.manifest.shards),) * 2


@pytest.mark.parametrize("member", ["image", "label", "meta", "header"])
def test_a_flipped_bit_is_found_and_named(packed: Packed, tmp_path: Path, member: str) -> None:
    root = copied(packed, tmp_path)
    dataset = Dataset.open(root)
    index = Index.open(dataset)
    row = int(index.rows("train")[7])
    shard = packed.manifest.shards[int(index.shard[row])].name
    offset = (
        int(index.image_offset[row]) - 400 if member == "header" else int(getattr(index, f"{member}_offset")[row]) + 9
    )
    tile = read_tile(dataset, index, row)
    key = f"{tile.meta['scene']}_r{tile.meta['window']['row']:05d}_c{tile.meta['window']['col']:05d}"
    flip(root / shard, offset)
    (damage,) = verify(root)
    assert shard in damage
    assert (f"{key} ({member})" in damage) == (member in ("image", "label"))
    if member in ("image", "label"):
        with pytest.raises(InputError, match=f"{member} of tile {key} at byte"):
            read_tile(dataset, index, row)


def test_every_damaged_file_is_named(packed: Packed, tmp_path: Path) -> None:
    root = copied(packed, tmp_path)
    (root / "shards/val-000000.tar").unlink()
    with (root / "shards/train-000001.tar").open("r+b") as file:
        file.truncate(3000)
    flip(root / "index/shard.npy", 200)
    flip(root / "plan.json", 40)
    damages = verify(root)
    assert len(damages) == 4
    for name, what in [
        ("shards/val-000000.tar", "is missing"),
        ("shards/train-000001.tar", "3000 bytes instead of"),
        ("index/shard.npy", "sha256"),
        ("plan.json", "sha256"),
    ]:
        assert any(name in damage and what in damage for damage in damages)
    with pytest.raises(InputError, match=r"shard\.npy"):
        Index.open(Dataset.open(root))


@pytest.mark.parametrize("spoil", ["missing", "cut", "empty"])
def test_a_damaged_index_does_not_open(packed: Packed, tmp_path: Path, spoil: str) -> None:
    root = copied(packed, tmp_path)
    path = root / "index/image_offset.npy"
    if spoil == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if spoil == "empty" else -8])
    with pytest.raises(InputError, match=r"image_offset\.npy"):
        Index.open(Dataset.open(root))
    assert any("image_offset.npy" in damage for damage in verify(root))
