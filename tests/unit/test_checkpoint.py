"""Checkpoints: bit-equal after loading, complete or absent, never of another run, and without a trace in the run."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dctc.engine import checkpoint
from dctc.engine.checkpoint import (
    LATEST,
    PROGRESS,
    CheckpointError,
    Checkpoints,
    Progress,
    complete,
    latest,
    read_progress,
)
from dctc.engine.parallel import Parallel
from dctc.engine.precision import Precision
from dctc.engine.update import OptimizerSpec, Updater
from dctc.methods import Batch, Method, build_method
from dctc.methods.base import updates
from dctc.networks import NetworkSpec
from shards.errors import InputError

SPECS = [OptimizerSpec(name="adamw", weight_decay=0.1), OptimizerSpec(name="sgd", lr=0.01)]


class Session:
    """A method in training, as a process would hold it."""

    def __init__(
        self, folder: Path, seed: int = 0, spec: OptimizerSpec = SPECS[0], keep: int = 2, method: str = "dctc",
        width: int = 4, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.parallel = Parallel()
        self.method: Method = build_method(method, NetworkSpec(2, 3, width=width), options)
        self.updater = Updater(self.method.parts, spec, self.parallel, Precision("fp32", self.parallel.device))
        self.checkpoints = Checkpoints(folder, keep, self.parallel)
        self.progress = Progress(dataset="d" * 64, settings={"run.seed": seed, "optimizer.betas": [0.9, 0.999]})

    def train(self, rounds: int) -> None:
        for _ in range(rounds):
            generator = torch.Generator().manual_seed(self.progress.rounds)
            images = torch.randn(2, 2, 16, 16, generator=generator)
            labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
            valid = torch.ones(2, 16, 16, dtype=torch.bool)
            labelled, unlabelled = Batch(images, valid, labels), Batch(images.flip(-1), valid)
            for update in updates(self.method.round([labelled], [unlabelled], self.progress.rounds)):
                self.updater(update)
            self.progress.rounds += 1

    def save(self) -> Path:
        final = self.checkpoints.save(self.updater.parts, self.progress)
        self.checkpoints.wait()
        return final

    def load(self, source: Path) -> None:
        self.progress = read_progress(source)
        self.checkpoints.load_weights(source, {name: part.inner for name, part in self.updater.parts.items()})
        self.checkpoints.load_optimizers(source, self.updater.parts)

    def state(self) -> dict[str, Tensor]:
        """Every tensor by name: parameters, buffers, moments, step counts."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.method.parts.items():
            tensors |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
            for key, parameter in module.named_parameters():
                moments = self.updater.optimizers[name].state.get(parameter, {})
                tensors |= {f"{name}.{key}.{k}": v.clone() for k, v in moments.items() if torch.is_tensor(v)}
        return tensors


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(got[name], value)] == []


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# ---- round trip


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_loading_gives_every_bit_back_and_training_goes_on_alike(tmp_path: Path, spec: OptimizerSpec) -> None:
    first = Session(tmp_path, spec=spec)
    first.train(3)
    saved = first.state()
    source = first.save()
    drawn = torch.rand(3)
    assert_equal(first.state(), saved)  # saving changes nothing
    first.train(2)

    second = Session(tmp_path, seed=1, spec=spec)
    second.load(source)
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood
    assert_equal(second.state(), saved)
    assert second.progress == Progress(rounds=3, dataset="d" * 64, settings=first.progress.settings)
    second.train(2)
    assert_equal(second.state(), first.state())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_checkpoint_before_a_phase_starts_changes_nothing(tmp_path: Path, spec: OptimizerSpec) -> None:
    """The students' optimizers have not stepped yet when it is written."""
    plain = Session(tmp_path / "a", spec=spec, phase2_start=2, phase3_start=2)
    saving = Session(tmp_path / "b", spec=spec, phase2_start=2, phase3_start=2)
    for session in (plain, saving):
        session.train(1)
    source = saving.save()
    resumed = Session(tmp_path / "b", seed=1, spec=spec, phase2_start=2, phase3_start=2)
    resumed.load(source)
    for session in (plain, saving, resumed):
        session.train(2)
    assert_equal(resumed.state(), saving.state())
    assert_equal(saving.state(), plain.state())


def test_progress_survives(tmp_path: Path) -> None:
    session = Session(tmp_path, method="supervised")
    session.progress = Progress(
        7, 0.625, "run id", "digest", {"a": 1, "b": [0.9, 0.1 + 0.2], "c": None, "d": "1/8"}, 1.5
    )
    assert read_progress(session.save()) == session.progress


# ---- complete or absent


def test_only_the_last_ones_stay_and_latest_names_the_newest(tmp_path: Path) -> None:
    session = Session(tmp_path / "checkpoints", method="supervised")
    for _ in range(4):
        session.train(1)
        folder = session.save()
        assert folder.is_dir()
        assert (tmp_path / "checkpoints" / LATEST).read_text() == folder.name
        assert complete(tmp_path / "checkpoints")[-1] == latest(tmp_path / "checkpoints") == folder
    assert names(tmp_path / "checkpoints") == [LATEST, "step-00000003", "step-00000004"]


def test_one_may_be_kept(tmp_path: Path) -> None:
    session = Session(tmp_path, keep=1, method="supervised")
    for _ in range(3):
        session.train(1)
        session.save()
    assert names(tmp_path) == [LATEST, "step-00000003"]


def test_saving_a_round_twice_keeps_the_first(tmp_path: Path) -> None:
    session = Session(tmp_path, method="supervised")
    written = {path: path.stat().st_mtime_ns for path in session.save().iterdir()}
    assert {path: path.stat().st_mtime_ns for path in session.save().iterdir()} == written


def test_another_training_of_the_same_round_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """From an older checkpoint with another strategy, or with updates skipped that ruined the first one."""
    first = Session(tmp_path, method="supervised", keep=3)
    for _ in range(2):
        first.train(1)
        source = first.save()
    second = Session(tmp_path, seed=1, method="supervised", keep=3)
    second.load(tmp_path / "step-00000001")
    for parameter in second.method.parts["network"].parameters():
        parameter.data.add_(0.5)
    second.train(1)
    assert second.save() == source
    third = Session(tmp_path, seed=2, method="supervised")
    third.load(source)
    assert_equal(third.state(), second.state())
    assert names(tmp_path) == [LATEST, "step-00000001", "step-00000002"]


def test_what_cannot_be_removed_harms_nothing_and_counts_as_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system somebody may still read the old one; or the process is killed in the middle."""
    session = Session(tmp_path, keep=1, method="supervised")
    session.train(1)
    session.save()

    def half(path: Path, ignore_errors: bool = False) -> None:
        next(Path(path).iterdir()).unlink()
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", half)
        session.train(1)
        final = session.save()
    assert complete(tmp_path) == [final]
    assert latest(tmp_path) == final
    session.train(1)
    session.save()  # which removes what is left
    assert names(tmp_path) == [LATEST, "step-00000003"]


def test_going_back_to_an_older_checkpoint_keeps_what_is_saved_from_there(tmp_path: Path) -> None:
    """``run.resume=checkpoints/step-00000001`` while later ones exist: the new one is not the oldest to go."""
    session = Session(tmp_path, keep=2, method="supervised")
    for rounds in (1, 5, 6):
        session.progress.rounds = rounds
        session.checkpoints.keep = 3
        session.save()
    session.checkpoints.keep = 2
    session.progress.rounds = 2
    folder = session.save()
    assert folder.is_dir()
    assert latest(tmp_path) == folder  # and a run that is stopped again goes on from there


def test_a_draft_is_ignored_and_written_anew(tmp_path: Path) -> None:
    session = Session(tmp_path, method="supervised")
    session.train(1)
    source = session.save()
    session.train(1)
    draft = tmp_path / "step-00000002.tmp"
    draft.mkdir()
    (draft / PROGRESS).write_text(json.dumps({"rounds": 2}))
    (draft / "rubbish").write_text("half")
    assert complete(tmp_path) == [source]
    final = session.save()
    assert complete(tmp_path) == [source, final]
    assert not draft.exists()
    assert not (final / "rubbish").exists()


@pytest.mark.parametrize("stranger", ["step-1", "step-00000009.tmp", "step-000000009", "latest", "notes"])
def test_other_entries_are_no_checkpoints(tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger).mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    for folder in (tmp_path, tmp_path / "not there"):
        assert complete(folder) == []
        assert latest(folder) is None


@pytest.mark.parametrize("content", [None, "", "step-00000009", "../elsewhere", "step-00000003.tmp"])
def test_without_a_usable_latest_the_one_of_most_rounds_counts(tmp_path: Path, content: str | None) -> None:
    for number in (2, 1):
        (tmp_path / f"step-0000000{number}").mkdir()
    (tmp_path / "step-00000003.tmp").mkdir()
    if content is not None:
        (tmp_path / LATEST).write_text(content)
    assert latest(tmp_path) == tmp_path / "step-00000002"


@pytest.mark.parametrize("where", ["async_save", "_write_synced", "_sync_folder", "_random_state"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    session = Session(tmp_path, method="supervised")
    session.train(1)
    saved, source = session.state(), session.save()
    session.train(1)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, killed)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            session.save()
    assert complete(tmp_path) == [source]
    assert latest(tmp_path) == source
    other = Session(tmp_path, seed=1, method="supervised")
    other.load(complete(tmp_path)[-1])
    assert_equal(other.state(), saved)
    session.save()  # and the next attempt succeeds
    assert names(tmp_path) == [LATEST, "step-00000001", "step-00000002"]


def test_what_is_saved_is_the_state_at_the_call_however_training_goes_on(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.train(1)
    saved = session.state()
    source = session.checkpoints.save(session.updater.parts, session.progress)
    session.train(3)  # while it is written
    session.checkpoints.wait()
    other = Session(tmp_path, seed=1)
    other.load(source)
    assert other.progress.rounds == 1
    assert_equal(other.state(), saved)


def test_a_full_disk_says_which_checkpoint_is_good_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same system call fails."""
    session = Session(tmp_path, method="supervised", width=8)
    session.train(1)
    source = session.save()
    session.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(
            CheckpointError, match=r"step-00000002.*could not be written.*last good one is.*step-00000001"
        ):
            session.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == [LATEST, "step-00000001"]
    assert latest(tmp_path) == source
    session.save()
    assert names(tmp_path) == [LATEST, "step-00000001", "step-00000002"]


def test_the_next_save_reports_a_failure_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path, method="supervised")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_synced", full)
        session.checkpoints.save(session.updater.parts, session.progress)
        session.train(1)
        with pytest.raises(CheckpointError, match="No space left on device"):
            session.checkpoints.save(session.updater.parts, session.progress)
    assert names(tmp_path) == []
    session.save()
    assert names(tmp_path) == [LATEST, "step-00000001"]


def test_a_run_that_ends_by_an_error_lets_its_checkpoint_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(tmp_path, method="supervised")
    written = checkpoint._write_synced

    def slow(path: Path, text: str) -> None:
        time.sleep(0.3)
        written(path, text)

    monkeypatch.setattr(checkpoint, "_write_synced", slow)
    final = session.checkpoints.save(session.updater.parts, session.progress)
    assert complete(tmp_path) == []
    session.checkpoints.settle()
    assert complete(tmp_path) == [final]


def test_a_checkpoint_of_a_cpu_goes_on_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path, method="supervised")
    session.train(1)
    saved, source = session.state(), session.save()
    of_cpu = checkpoint._random_state
    monkeypatch.setattr(checkpoint, "_random_state", lambda: of_cpu() | {"cuda": torch.zeros(16, dtype=torch.uint8)})
    other = Session(tmp_path, seed=1, method="supervised")
    other.load(source)
    assert_equal(other.state(), saved)


# ---- what is refused


def test_changed_settings_are_refused_by_name() -> None:
    progress = Progress(dataset="a", settings={"optimizer.lr": 0.1, "run.seed": 0, "method.sharpen": "s1", "same": 1})
    progress.must_match("a", dict(progress.settings), Path("x"))
    with pytest.raises(InputError) as caught:
        progress.must_match(
            "a", {"optimizer.lr": 0.2, "run.seed": 0, "network.width": 8, "same": 1}, Path("runs/step-1")
        )
    message = str(caught.value)
    assert "runs/step-1" in message
    assert "optimizer.lr (was 0.1, now 0.2)" in message
    assert "method.sharpen (was 's1', now None)" in message
    assert "network.width (was None, now 8)" in message
    assert "run.seed" not in message
    assert "same" not in message


def test_another_dataset_is_refused() -> None:
    with pytest.raises(InputError, match=r"another dataset.*aaaa.*bbbb.*run\.name"):
        Progress(dataset="aaaa").must_match("bbbb", {}, Path("x"))


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"surprise": 1}'])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / PROGRESS).write_text(content)
    with pytest.raises(InputError, match="not a complete checkpoint"):
        read_progress(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    source = Session(tmp_path, method="supervised").save()
    for other in (Session(tmp_path, method="supervised", width=8), Session(tmp_path)):
        with pytest.raises(InputError, match="cannot be read") as caught:
            other.load(source)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, pattern: str, kept: int) -> None:
    session = Session(tmp_path, method="supervised")
    source = session.save()
    (file,) = source.glob(pattern)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="cannot be read") as caught:
        session.load(source)
    assert "Traceback" not in str(caught.value)
