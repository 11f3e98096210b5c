"""What is kept of runs beside a table: enough for `dctc compare`, and to go on with its sweep elsewhere.

An archive holds MLflow's database, its curves at every hundredth round, and of each run the files that say it is
finished. Weights, pictures and what MLflow stores of them stay where the runs were made.
"""

from __future__ import annotations

import lzma
import shutil
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

FILES = ("report.json", "config.yaml", "mlflow.json")  # of a finished run's folder
STORE = "mlflow.db"
STEP = 100  # rounds


def keep(work: Path, archive: Path) -> int:
    """Write the runs of ``work`` into ``archive``, a .tar.xz, whole or not at all; returns how many are finished."""
    folders = sorted(path.parent for path in (work / "runs").glob("*/*/report.json"))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{archive.name}-", dir=archive.parent) as folder:
        store, draft = Path(folder) / STORE, Path(folder) / archive.name
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
    """Take up the runs of ``archive``, if there is one, in ``work``, where none has been made yet; whether it did.

    Raises:
        ValueError: the archive is damaged, or holds runs that ``work`` lacks, which :func:`keep` would drop.
    """
    if not archive.exists():
        return False
    try:
        with tarfile.open(archive) as tar:
            if (work / STORE).exists():
                lacking = sorted(name for name in tar.getnames() if not (work / name).exists())
                if lacking:
                    raise ValueError(f"{archive}: {work} has other runs and lacks {lacking[0]}: choose another --work")
                return False
            work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".kept-", dir=work) as folder:
                tar.extractall(folder, filter="data")
                shutil.copytree(Path(folder) / "runs", work / "runs", dirs_exist_ok=True)
                (Path(folder) / STORE).replace(work / STORE)  # last: it says that all is there
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{archive}: a damaged archive of runs ({error}): remove it, or get it anew") from None
    return True


def thin(source: Path, target: Path) -> None:
    """Copy MLflow's database, also one that is being written, with every hundredth round of the curves."""
    with (
        closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as whole,
        closing(sqlite3.connect(target, isolation_level=None)) as copy,
    ):
        whole.backup(copy)
        copy.execute("DELETE FROM metrics WHERE step % ? != 0", (STEP,))
        copy.execute("VACUUM")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Nothing of who packed it, or when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
