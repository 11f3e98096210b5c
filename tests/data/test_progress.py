"""What packing says while it works and when it is done."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from shards.pack import pack
from shards.progress import Meter, State, Work, shown
from tests.data import layouts
from tests.data.cluster import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def test_states_add_up(towns: Path, tmp_path: Path) -> None:
    states: list[State] = []
    dataset = pack(layouts.recipe("potsdam", "shards.megabytes=0.1"), towns, tmp_path / "set", progress=states.append)
    for step, total in (("stage", 7), ("assemble", len(dataset.manifest.shards))):
        mine = [state for state in states if state.step == step]
        assert [(state.done, state.total) for state in mine] == [(n, total) for n in range(total + 1)]
        assert [state.tiles for state in mine] == sorted(state.tiles for state in mine)
        assert mine[-1].tiles == dataset.report.tiles
        assert mine[0].left is None
        assert mine[-1].left == 0
    assert states[-1].bytes == dataset.report.bytes
    assert f"writing shards: {states[-1].total} of {states[-1].total} shards, 112 tiles, " in states[-1].line


def test_time_left_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    states: list[State] = []
    meter = Meter("stage", 5, 2, 400.0, states.append)
    now[0] += 30
    meter.add(Work(tiles=90, bytes=60_000_000), 100.0)
    assert states[-1] == State("stage", 3, 5, 90, 60_000_000, 30.0, 90.0)
    assert states[-1].line == "reading scenes: 3 of 5 scenes, 90 tiles, 3.0 tiles/s, 2.0 MB/s, 1:30 left"
    now[0] += 30 * 239
    meter.add(Work(1, 1), 100.0)
    assert states[-1].line.endswith(", 2:00:00 left")


def test_plain_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    text = io.StringIO()
    with shown(Console(file=text)) as report:
        for done in range(101):
            report(State("stage", done, 100, done, 0, now[0], None))
            now[0] += 1
    lines = text.getvalue().splitlines()
    assert [int(line.split()[2]) for line in lines] == [*range(0, 100, 10), 100]


def test_a_terminal_gets_a_bar() -> None:
    text = io.StringIO()
    with shown(Console(file=text, force_terminal=True, width=120)) as report:
        report(State("stage", 3, 4, 30, 5_000_000, 2.0, 1.0))
    assert "reading scenes" in text.getvalue()
    assert "3/4 scenes, 30 tiles, 15.0 tiles/s, 2.5 MB/s, 0:01 left" in text.getvalue()


def shard(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "dctc.cli", "shard", str(REPOSITORY / "configs/data/potsdam.yaml")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    options = [str(argument) for argument in arguments]
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=True)


def test_one_json_document_for_scripts(hamlet: Path, tmp_path: Path) -> None:
    done = shard(tmp_path / "set", "--root", hamlet, "--json", "tile.size=64", "--picture", tmp_path / "sheet.png")
    record = json.loads(done.stdout)
    assert record["tiles"] == 32
    assert record["report"]["scenes"] == 2
    assert record["report"]["unmatched"] == []
    assert done.stderr.splitlines()[-1].startswith("writing shards: 2 of 2 shards, 32 tiles, ")
    assert Image.open(tmp_path / "sheet.png").size[0] > 512
    assert not (tmp_path / "set/preview.png").exists()


def test_a_summary_and_a_picture(hamlet: Path, tmp_path: Path) -> None:
    done = shard(tmp_path / "set", "--root", hamlet, "tile.size=64")
    assert "potsdam: 64 px tiles of uint8, geotiff images, 2 scenes" in done.stdout
    assert "32 tiles of 2 scenes (0 without label) in 2 shards" in done.stdout
    assert f"contact sheet {tmp_path}/set/preview.png" in done.stdout
    assert Image.open(tmp_path / "set/preview.png").size[0] > 512


def test_a_finished_dataset_is_not_written_to(hamlet: Path, tmp_path: Path) -> None:
    """It may lie in a folder that can be read alone; a picture elsewhere is drawn, and a lost one drawn again."""
    shard(tmp_path / "set", "--root", hamlet, "tile.size=64")

    def states() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [tmp_path / "set", *(tmp_path / "set").rglob("*")]}

    before = states()
    again = shard(tmp_path / "set", "--root", hamlet, "tile.size=64")
    assert f"contact sheet {tmp_path}/set/preview.png" in again.stdout
    shard(tmp_path / "set", "--root", hamlet, "tile.size=64", "--picture", tmp_path / "sheet.png")
    assert states() == before
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "set/preview.png").read_bytes()
    (tmp_path / "set/preview.png").unlink()
    shard(tmp_path / "set", "--root", hamlet, "tile.size=64")
    assert (tmp_path / "sheet.png").read_bytes() == (tmp_path / "set/preview.png").read_bytes()
