"""Imports go one way. The rules are written here as the house draws them; a back edge is named and fails."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# room -> the rooms of dctc that it may import, or single modules of one; a room is a top-level file or folder of dctc/.
MAY_IMPORT: dict[str, set[str]] = {
    "networks": set(),
    "methods": {"networks"},
    "data": set(),
    "bundle": {"methods", "networks"},
    # Pictures, and whole files; the rest of tracking knows MLflow.
    "evaluation": {"bundle", "data", "methods", "tracking.figures", "tracking.journal"},
    "mapping": {"bundle", "methods"},
    "whole_scenes": {"bundle", "evaluation", "mapping", "tracking.figures"},
    "suggest": {"bundle", "data", "evaluation", "methods"},
    "scoring_commands": {"arguments", "bundle", "evaluation", "suggest", "terminal", "whole_scenes"},
    "engine": {"bundle", "config", "data", "evaluation", "methods", "networks"},
    "batch_size": {"config", "methods", "networks"},
    "config": set(),
    "machine": set(),
    "arguments": {"bundle", "engine", "tracking"},
    "exporting": {"arguments", "bundle", "terminal", "tracking"},
    "serving": {"bundle", "mapping"},
    "maps": {"arguments", "bundle", "mapping", "terminal"},
    "terminal": set(),
    "sweep": {"config", "engine", "tracking"},
    "tracking": {"config", "methods"},
    "train": {"bundle", "config", "data", "engine", "evaluation", "methods", "networks", "tracking"},
}
LAST = "cli"  # the user's door: may import every room, and is imported by none

SHARDS_FOR_DCTC = {"codec", "errors", "index", "lifetime", "manifest", "remote", "stopping"}
SHARDS_FOR_ROOM = {
    "config": {"errors", "manifest", "remote", "schema"},
    "tracking": {"errors", "manifest"},
    "arguments": {"errors"},
    "terminal": {"manifest", "summary"},
    "whole_scenes": SHARDS_FOR_DCTC | {"inputs", "labels", "reading", "recipe", "report", "scenes"},
    "suggest": SHARDS_FOR_DCTC | {"tiles"},
    "networks": set(),
    "methods": set(),
}
TORCH_ALONE = {"networks", "methods"}  # beside the standard library and each other
EXTRAS = {("dctc/networks/timm_unet.py", "timm")}  # optional
ONLY_IN = {"mlflow": "tracking", "deepspeed": "engine/zero.py"}
NOT_IN_SHARDS = {"accelerate", "dctc", "kornia", "mlflow", "torch"}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full dotted name, and where it is imported."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file: at its top, inside functions, for type checking only, and by ``importlib.import_module``.

    ``from a import b`` counts as ``a.b``, because ``b`` may be a module.
    """
    file = path.relative_to(root)
    package = ".".join(file.with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        for module in _modules(node, package):
            yield Import(file.as_posix(), getattr(node, "lineno", 0), module)


def _modules(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
        source = ".".join(part for part in (base, node.module) if part)
        return [f"{source}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def back_edges(root: Path) -> list[str]:
    """Every import in ``root/dctc`` and ``root/shards`` that the rules forbid, as a sentence."""
    found = []
    for path in sorted([*root.glob("dctc/**/*.py"), *root.glob("shards/**/*.py")]):
        found += [f"{item}: {why}" for item in imports_of(path, root) if (why := _forbidden(item))]
    return found


def _forbidden(item: Import) -> str | None:
    top, *rest = item.module.split(".")
    if top in ONLY_IN and not item.file.startswith(f"dctc/{ONLY_IN[top]}"):
        return f"only dctc/{ONLY_IN[top]} may"
    if item.file.startswith("shards/"):
        return "shards knows nothing of training" if top in NOT_IN_SHARDS else None
    room = _room(item.file)
    if top == "dctc":
        return _forbidden_room(room, rest) if rest else None
    if top == "shards":
        return _forbidden_shards(room, rest[0] if rest else "")
    if (item.file, top) in EXTRAS:
        return None
    if room in TORCH_ALONE and top != "torch" and top not in sys.stdlib_module_names:
        return f"{room} import torch alone"
    return None


def _room(file: str) -> str:
    return Path(file).parts[1].removesuffix(".py")


def _forbidden_room(room: str, target: list[str]) -> str | None:
    if room in (target[0], LAST, "__init__"):
        return None if room != "__init__" else "the package itself imports no room"
    if room not in MAY_IMPORT:
        return f"{room} is a new room: give it its place in tests/unit/test_imports.py"
    allowed = {target[0], ".".join(target[:2])} & MAY_IMPORT[room]
    return None if allowed else f"{room} may import of dctc: {sorted(MAY_IMPORT[room]) or 'nothing'}"


def _forbidden_shards(room: str, target: str) -> str | None:
    if room == LAST:
        return None
    allowed = SHARDS_FOR_ROOM.get(room, SHARDS_FOR_DCTC)
    return None if target in allowed else f"{room} may import of shards: {sorted(allowed) or 'nothing'}"


def test_imports_go_one_way() -> None:
    assert back_edges(ROOT) == []


def test_the_rules_themselves_have_no_cycle() -> None:
    left = dict(MAY_IMPORT)
    while ground := [room for room, below in left.items() if not {name.split(".")[0] for name in below} & left.keys()]:
        for room in ground:
            del left[room]
    assert left == {}


def test_every_room_of_the_rules_exists() -> None:
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "dctc").iterdir() if path.suffix in ("", ".py")}
    assert set(MAY_IMPORT) | {LAST} == rooms - {"__init__", "__pycache__"}


@pytest.mark.parametrize(
    ("file", "source", "named"),
    [
        ("dctc/networks/unet.py", "from dctc.methods import base", "dctc.methods.base"),
        ("dctc/networks/unet.py", "import numpy as np", "torch alone"),
        ("dctc/networks/unet.py", "import timm", "torch alone"),
        ("dctc/methods/x.py", "def f():\n    from dctc.engine.update import step", "x.py:2"),
        ("dctc/methods/x.py", "from ..engine import update", "dctc.engine.update"),
        ("dctc/methods/x.py", "from shards.manifest import IGNORE", "shards: nothing"),
        ("dctc/data/x.py", "from shards.pack import pack", "shards.pack"),
        ("dctc/data/x.py", "from shards import pack", "shards.pack"),
        ("dctc/data/x.py", "import dctc.engine", "may import of dctc: nothing"),
        ("dctc/tracking/x.py", "from shards.index import Index", "shards.index"),
        ("dctc/engine/x.py", "import importlib\nimportlib.import_module('mlflow.pyfunc')", "only dctc/tracking"),
        ("dctc/engine/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mlflow", "x.py:3"),
        ("dctc/engine/trainer.py", "import deepspeed", "only dctc/engine/zero.py"),
        ("dctc/engine/x.py", "from dctc import cli", "dctc.cli"),
        ("dctc/evaluation/x.py", "from dctc.tracking.run import open_tracker", "dctc.tracking.run"),
        ("dctc/extra.py", "from dctc.data import order", "new room"),
        ("dctc/__init__.py", "from dctc.networks import unet", "imports no room"),
        ("shards/x.py", "import torch", "nothing of training"),
        ("shards/synth/x.py", "def f():\n    import dctc.config", "x.py:2"),
    ],
)
def test_a_back_edge_is_reported(tmp_path: Path, file: str, source: str, named: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    (edge,) = back_edges(tmp_path)
    assert named in edge


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    allowed = {
        "dctc/networks/unet.py": "import math\nimport torch.nn as nn\nfrom dctc.networks import channel_attention",
        "dctc/methods/dctc.py": "from . import losses\nfrom dctc.networks.unet import UNet\nfrom torch import Tensor",
        "dctc/data/tiles.py": "import numpy\nfrom shards.index import Index\nfrom shards import codec",
        "dctc/tracking/run.py": "import mlflow\nfrom dctc.config import Config\nfrom shards.errors import InputError",
        "dctc/engine/zero.py": "import deepspeed\nimport accelerate",
        "dctc/cli.py": "from shards.pack import pack\nfrom dctc import train\nimport dctc",
        "shards/pack.py": "import rasterio\nfrom shards.codec import encode_image",
    }
    for file, source in allowed.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(source)
    assert back_edges(tmp_path) == []
