"""Scores of a prime number of tiles are the same in one process and in several real ones: to the bit, but for means of
floats that are summed in another order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.scoring import score
from tests.tiny import ROOT, run

TILES = 7  # on 3 ranks: 3, 2 and 2, the rest is padding


@pytest.mark.slow
def test_three_processes_score_as_one(tmp_path: Path, tiny_dataset: Path, tiny_model: Path) -> None:
    out = tmp_path / "scores.json"
    run(
        "accelerate", "launch", "--config_file", ROOT / "launch" / "ddp.yaml", "--num_processes", 3,
        ROOT / "tests" / "distributed" / "scoring.py", tiny_model, tiny_dataset, TILES, out,
        ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["world"] == 3
    alone: dict[str, Any] = json.loads(json.dumps(score(tiny_model, tiny_dataset, TILES).as_record()))
    assert found["tiles"] == alone["tiles"] == TILES
    assert found["agreement"] == alone["agreement"]
    assert found["nets"].keys() == alone["nets"].keys() == {"s1", "s2", "mean", "teacher"}
    for name, net in alone["nets"].items():
        assert net["scores"]["pixels"] > 0
        for key in ("entropy", "sharpened_entropy"):
            assert found["nets"][name].pop(key) == pytest.approx(net.pop(key), rel=1e-12)
        assert found["nets"][name] == net
