"""The image can't be built in the tests. What can be checked of its recipe without an engine is checked here."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def dockerfile(repository: Path) -> str:
    """The Dockerfile with continued lines joined."""
    return re.sub(r"\\\n\s*", "", (repository / "Dockerfile").read_text())


def instructions(dockerfile: str, name: str) -> list[str]:
    return re.findall(rf"^{name} (.*)$", dockerfile, re.MULTILINE)


def test_the_linter_finds_nothing(scripts: Path, repository: Path) -> None:
    hadolint = scripts / "hadolint"
    if not hadolint.exists():
        pytest.fail("hadolint is missing: pip install -c constraints.txt -e .[dev]")
    run = subprocess.run([hadolint, repository / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "")


def test_all_that_is_copied_exists_and_is_not_ignored(dockerfile: str, repository: Path) -> None:
    kept = [line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in instructions(dockerfile, "COPY"):
        for source in (word.rstrip("/") for word in line.split()[:-1]):
            assert (repository / source).exists(), source
            assert any(fnmatch.fnmatch(source, pattern) for pattern in kept), f"{source} is in .dockerignore"


def test_dependencies_are_installed_before_the_code_is_copied(dockerfile: str) -> None:
    install = dockerfile.index("pip install -c constraints.txt")
    assert dockerfile.index("COPY constraints.txt pyproject.toml") < install < dockerfile.index("COPY dctc/")


def test_it_runs_dctc_itself_and_not_as_root(dockerfile: str) -> None:
    assert instructions(dockerfile, "ENTRYPOINT") == ['["tini", "--", "dctc"]']
    (user,) = instructions(dockerfile, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_the_base_image_is_a_pinned_cuda_runtime(dockerfile: str) -> None:
    (base,) = instructions(dockerfile, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)
