"""Runs a sweep: each run in a process of its own, so that one that crashes takes nothing else along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import psutil
import yaml

from dctc.config import load_config
from dctc.engine.build import resolve
from dctc.engine.faults import LAUNCHER
from dctc.engine.preempt import EXIT_PREEMPTED, SIGNALS
from dctc.sweep.plan import PlannedRun, Sweep
from dctc.tracking.parent import PARENT_TAG, ParentRun
from dctc.tracking.run import resolve_uri
from shards.errors import InputError

LOG = "train.log"
POLL = 0.2  # seconds
TOLD = 12  # lines of a failed run's log that are shown at the end


@dataclass
class _Child:
    number: int
    run: PlannedRun
    slot: int
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


class SweepRunner:
    """Goes through the runs of a sweep, ``jobs`` at once.

    Args:
        command: what starts the trainer; configuration and overrides follow.
        gpus: give each run a GPU of its own.
        show: shows a line.
    """

    def __init__(
        self, sweep: Sweep, command: Sequence[str], show: Callable[[str], None], jobs: int = 1, gpus: bool = False
    ) -> None:
        self.sweep, self.command, self.show, self.jobs, self.gpus = sweep, command, show, jobs, gpus
        self.failed: list[PlannedRun] = []
        self._children: list[_Child] = []
        self._stopping = False  # no further run begins
        self._asked = False  # by Ctrl-C
        self._parent: ParentRun | None = None

    def __call__(self) -> int:
        """Run what is not finished; returns the exit code: 0, 1 when some failed, 75 when it was asked to stop.

        Raises:
            InputError: its folder cannot be made, or ``tracking.uri`` names no server; nothing has run then.
        """
        before = {number: signal.signal(number, self._stop) for number in SIGNALS}
        try:
            self._open_parent()
            waiting = deque(enumerate(self.sweep.chosen, 1))
            while (waiting and not self._stopping) or self._children:
                while waiting and not self._stopping and len(self._children) < self.jobs:
                    self._begin(*waiting.popleft())
                self._reap()
                time.sleep(POLL if self._children else 0)
            return self._end()
        finally:
            self._signal(signal.SIGTERM)  # after an error of this process: they save and end
            for number, handler in before.items():
                signal.signal(number, handler)

    def _open_parent(self) -> None:
        sweep, first = self.sweep, self.sweep.runs[0].config
        try:
            sweep.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{sweep.folder}: cannot make the sweep's folder ({error.strerror})") from None
        if not first.tracking.enabled:
            return
        params = {
            "rows": _unique([run.row for run in sweep.runs]),
            "shares": _unique([str(run.config.data.labelled_share) for run in sweep.runs]),
            "seeds": _unique([str(run.config.run.seed) for run in sweep.runs]),
            "runs": len(sweep.runs),
            "overrides": " ".join(sweep.overrides),
        }
        uri = resolve_uri(first.tracking.uri, first.run.output)
        self._parent = ParentRun(sweep.folder, uri, (sweep.experiment, sweep.name), params, sweep.file)

    def _begin(self, number: int, run: PlannedRun) -> None:
        if is_done(run):
            if self._parent is not None:
                self._parent.adopt(run.folder)
            self._tell(number, f"{run.title}: {_score(run)} (was finished)")
            return
        slot = next(slot for slot in range(self.jobs) if slot not in {child.slot for child in self._children})
        tags = dict(run.config.tracking.tags)
        if self._parent is not None and self._parent.run_id is not None:
            tags[PARENT_TAG] = self._parent.run_id
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self.command, str(run.file), *run.overrides, f"tracking.tags={json.dumps(tags)}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(slot),
                start_new_session=True,  # Ctrl-C comes to it through this process, once
            )
        self._tell(number, f"{run.title}: begins, see {run.folder / LOG}")
        self._children.append(_Child(number, run, slot, process))
        if self._stopping:  # the signal came before it could be told
            self._signal(signal.SIGTERM)

    def _environment(self, slot: int) -> dict[str, str]:
        environment = os.environ | {LAUNCHER: str(os.getpid())}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible()[slot]
        if self.jobs > 1:  # each would take all cores
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        return environment

    def _reap(self) -> None:
        for child in list(self._children):
            status = child.process.poll()
            if status is None or (self._stopping and _lives(child.process.pid)):
                continue
            self._children.remove(child)
            seconds = time.monotonic() - child.started
            if status == 0:
                self._tell(child.number, f"{child.run.title}: {_score(child.run)}, {seconds:.0f} s")
            elif self._stopping:  # also a launcher, which turns 75 into 1
                self._tell(child.number, f"{child.run.title}: stopped; the same command goes on")
            elif status == EXIT_PREEMPTED:
                self._tell(child.number, f"{child.run.title}: was asked to stop, and so the sweep stops")
                self._stopping = True
                self._signal(signal.SIGTERM)
            else:
                self.failed.append(child.run)
                how = f"with exit code {status}" if status > 0 else f"by signal {-status} ({signal.strsignal(-status)})"
                self._tell(child.number, f"{child.run.title}: FAILED {how}, {seconds:.0f} s")

    def _end(self) -> int:
        for run in self.failed:
            self.show(f"failed: {run.title}, {run.folder / LOG} ends with")
            lines = (run.folder / LOG).read_text(errors="replace").splitlines()
            for line in [line for line in lines if line.strip()][-TOLD:]:
                self.show(f"    {line}")
        if self._parent is not None:
            self._parent.finish("KILLED" if self._stopping else "FAILED" if self.failed else "FINISHED")
        return EXIT_PREEMPTED if self._stopping else 1 if self.failed else 0

    def _tell(self, number: int, text: str) -> None:
        self.show(f"[{number}/{len(self.sweep.chosen)}] {text}")

    def _stop(self, number: int, _: FrameType | None) -> None:
        """Asks the runs to save and end; the second Ctrl-C ends them."""
        again = number == signal.SIGINT and self._asked
        self._stopping = True
        self._asked |= number == signal.SIGINT  # before they are told: the second may come at once
        self._signal(signal.SIGKILL if again else signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for child in self._children:
            try:
                os.killpg(child.process.pid, number)
            except ProcessLookupError:
                continue


def is_done(run: PlannedRun) -> bool:
    """Whether the run is finished with this very dataset and these settings, its test and report written.

    Its checkpoints need not be there any more. One with other settings is started, and the trainer says what differs.
    """
    report, settings = _report(run), run.folder / "config.yaml"
    if report is None or report.get("dataset") != run.dataset:
        return False
    try:
        written = resolve(load_config(settings)).result_settings()  # options that are newer at their defaults
        known = yaml.safe_load(settings.read_text())["precision"]["dtype"]  # `auto` was settled on the device
    except (InputError, KeyError):  # of another version
        return False
    planned = run.config.result_settings()
    planned["precision.dtype"] = known if run.config.precision.dtype == "auto" else planned["precision.dtype"]
    return written == planned and bool(report["tested"] >= run.config.evaluation.test)


def _report(run: PlannedRun) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads((run.folder / "report.json").read_text())
    except (OSError, ValueError):
        return None
    return report


def _score(run: PlannedRun) -> str:
    report = _report(run) or {}
    test, headline = report.get("test"), report.get("headline")
    if not isinstance(test, dict):
        return "no test"
    return f"test mIoU {100 * test['nets'][headline]['scores']['miou']:.1f} ({headline})"


def _lives(group: int) -> bool:
    """Whether a process of the group is left: ranks may end after the launcher that leads it."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def _unique(words: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _visible() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
