from __future__ import annotations

from pathlib import Path

import pytest

from shards.pack import Packed, pack
from tests.data import layouts

SCENES = ["2_10", "2_13", "3_10", "4_12", "6_7", "7_7"]


@pytest.fixture(scope="session")
def towns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled Potsdam scenes, one of the test list, and an unlabelled one."""
    root = tmp_path_factory.mktemp("towns")
    layouts.potsdam(root, SCENES, unlabelled=["7_12"])
    return root


@pytest.fixture(scope="session")
def hamlet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled Potsdam scenes, the second of the test list."""
    root = tmp_path_factory.mktemp("hamlet")
    layouts.potsdam(root, ["2_10", "2_13"])
    return root


@pytest.fixture(scope="session")
def packed(towns: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The scenes of ``towns`` in shards of about 8 tiles."""
    recipe = layouts.recipe("potsdam", "shards.megabytes=0.1", 'splits.scene.val=["7_7"]')
    return pack(recipe, towns, tmp_path_factory.mktemp("packed") / "set")
