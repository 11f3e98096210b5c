"""A database for the tests of tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.stored import Store


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables made, which takes seconds, to be copied and never written to."""
    path = tmp_path_factory.mktemp("compare") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def shared(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of all tests that have an experiment each."""
    return Path(shutil.copy(empty, tmp_path_factory.mktemp("shared")))


@pytest.fixture
def store(shared: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = f"sqlite:///{shared}"
    return Store(MlflowClient(uri), uri, str(request.node.name), tmp_path / "files")
