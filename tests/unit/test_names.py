"""No module of dctc has the name of another module.

``accelerate launch dctc/train.py`` makes ``dctc/`` the first place that Python looks for top-level modules. A file
``dctc/signal.py`` would then be imported wherever the standard library says ``import signal``. train.py takes the
folder out of the path, but another script in that folder would not, so the names stay clear as well.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

DCTC = Path(__file__).resolve().parents[2] / "dctc"
OURS = {"dctc", "shards"}


def module_names(folder: Path) -> set[str]:
    """What ``import NAME`` could find in a folder: modules and folders that an import statement can name."""
    names = {path.name.split(".")[0] for path in folder.iterdir() if path.is_dir() or path.suffix in (".py", ".so")}
    return {name for name in names if name.isidentifier() and not name.startswith("__")}


def shadowed(folder: Path, installed: set[str]) -> list[str]:
    """Names of modules in ``folder`` that the standard library or an installed distribution has too."""
    return sorted(module_names(folder) & (set(sys.stdlib_module_names) | installed))


def installed_names() -> set[str]:
    """Top-level names of all installed distributions but our own."""
    return {name for name, owners in packages_distributions().items() if set(owners) != {"dctc"}} - OURS


def test_dctc_shadows_no_installed_module() -> None:
    assert shadowed(DCTC, installed_names()) == []


def test_the_installed_names_are_known() -> None:
    assert {"torch", "accelerate", "mlflow", "yaml", "pytest"} <= installed_names()


def test_a_shadowing_name_is_found(tmp_path: Path) -> None:
    for file in ("signal.py", "mlflow.py", "trainer.py", "__init__.py", "py.typed"):
        (tmp_path / file).touch()
    (tmp_path / "profile").mkdir()
    (tmp_path / "__pycache__").mkdir()
    assert shadowed(tmp_path, installed_names()) == ["mlflow", "profile", "signal"]


def test_train_as_a_script_sees_the_real_modules(tmp_path: Path) -> None:
    """The path guard of train.py, in a copy of dctc with traps laid beside it."""
    copy = shutil.copytree(DCTC, tmp_path / "dctc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("logging", "signal", "statistics", "yaml", "torch"):
        (copy / f"{name}.py").write_text("raise SystemExit('shadowed by ' + __file__)\n")
    run = subprocess.run([sys.executable, copy / "train.py", "--help"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "train.py CONFIG" in run.stdout
