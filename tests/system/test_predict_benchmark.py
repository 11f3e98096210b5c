"""The benchmark of whole scenes still runs, on a size that says nothing of speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT


@pytest.mark.matrix  # five processes import torch
@pytest.mark.timeout(200)
def test_it_makes_the_same_map_each_way_and_prints_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/predict.py", "--size", "100", "90", "--tile", "32", "--width", "4"]
    more = ["--repeats", "1", "--device", "cpu", "--out", str(tmp_path / "table.txt")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode in (0, 1), done.stderr  # 1: the limit is missed, which means nothing here
    assert "Traceback" not in done.stderr, done.stderr
    table = (tmp_path / "table.txt").read_text()
    assert table == done.stdout
    for title in ("the net alone", "dctc predict", "rasterio loop, no overlap", "rasterio loop, same windows"):
        assert re.search(rf"^{title}.* \d+\.\d+ x ", table, re.MULTILINE), table
    assert table.rstrip().endswith(("the limit holds", "THE LIMIT IS MISSED"))
    assert (done.returncode == 0) == table.rstrip().endswith("the limit holds")
    # one net, one scene: the maps differ where a window's rim sees less, and shifted ones would not agree like this
    agreeing = [float(share) for share in re.findall(r"([\d.]+) % of pixels as in dctc's map", table)]
    assert len(agreeing) == 2
    assert min(agreeing) > 60
