"""What is kept of runs beside a table: enough for `dctc compare`, and to go on with its sweep elsewhere.

An archive holds MLflow's database, its curves at every hundredth round, and of each run the files that say it is
finished. Weights, pictures and what MLflow stores of them stay where the runs were made.
"""

from __future__ import annotations

import sqlite3
import tarfile
import tempfile
from pathlib import Path

FILES = ("report.json", "config.yaml", "mlflow.json")  # of a finished run's folder
STORE = "mlflow.db"
STEP = 100  # rounds


def keep(work: Path, archive: Path) -> int:
    """Write the runs of ``work`` into ``archive``, a .tar.xz, whole or not at all; returns how many are finished."""
    folders = sorted(path.parent for path in (work / "runs").glob("*/*/report.json"))
    draft = archive.with_name(f".{archive.name}.part")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / STORE
        thin(work / STORE, store)
        with tarfile.open(draft, "w:xz") as tar:
            tar.add(store, STORE, filter=anonymous)
            for run in folders:
                for file in FILES:
                    if (run / file).exists():
                        tar.add(run / file, f"{run.relative_to(work)}/{file}", filter=anonymous)
    draft.replace(archive)
    return len(folders)


def restore(archive: Path, work: Path) -> bool:
    """Take up the runs of ``archive`` in ``work``, where no run has been made yet; whether that was so."""
    if (work / STORE).exists() or not archive.exists():
        return False
    work.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    return True


def thin(source: Path, target: Path) -> None:
    """Copy MLflow's database, also one that is being written, with every hundredth round of the curves."""
    with sqlite3.connect(f"file:{source}?mode=ro", uri=True) as whole, sqlite3.connect(target) as copy:
        whole.backup(copy)
    copy = sqlite3.connect(target, isolation_level=None)
    copy.execute("DELETE FROM metrics WHERE step % ? != 0", (STEP,))
    copy.execute("VACUUM")
    copy.close()


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who packed it, or when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
