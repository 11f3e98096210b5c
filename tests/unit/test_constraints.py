"""constraints.txt pins all that dctc and its tests need, and the tests run with just those versions."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in LINES)}
LEFT_OUT = {"dctc", "timm"}  # dctc itself; timm needs torchvision, whose wheels are CUDA builds


def test_every_line_is_an_exact_public_version() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_every_requirement_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for extra in project["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name not in LEFT_OUT:
            assert PINS[name] in requirement.specifier, requirement


def test_the_tests_run_with_the_pinned_versions() -> None:
    other = {}
    for name, pin in PINS.items():
        try:
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            continue  # of another platform, or of an extra that is not installed here
        if found != pin:
            other[name] = (found, pin)
    assert other == {}
