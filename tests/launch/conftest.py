"""What the tests of real launches share: one uninterrupted run of two processes, to compare weights with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import launch, write_config
from tests.weights import folder_of


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Path:
    """The folder of a finished run of two processes on this machine."""
    config = write_config(tmp_path_factory.mktemp("whole") / "whole.yaml", tiny_dataset, schedule={"rounds": 12})
    launch(2, config)
    return folder_of(config)
