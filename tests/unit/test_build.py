"""What a configuration becomes on a real dataset: equal rounds for every share, the two streams, refusals in words."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from dctc.config import load_config
from dctc.engine.build import Run, finish, locate, make_folder, prepare, resolve, settle
from dctc.engine.parallel import Parallel
from dctc.engine.preempt import StopRequest
from dctc.engine.trainer import Tracker, Trainer
from shards.errors import InputError
from shards.index import Index
from shards.manifest import Dataset
from shards.pack import pack
from shards.recipe import load_recipe
from shards.synth import write_scenes

ROOT = Path(__file__).resolve().parents[2]
SHARES = ("1/8", "1/4", "1/2", "1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """80 training tiles of 16 px, all labelled."""
    folder = tmp_path_factory.mktemp("tiny")
    write_scenes(folder / "scenes", 8, 64, 0)
    pack(
        load_recipe(ROOT / "configs/data/synthetic.yaml", ["tile.size=16"]),
        folder / "scenes",
        folder / "out",
        workers=1,
    )
    return Dataset.open(folder / "out")


def located(dataset: Dataset, folder: Path, *overrides: str) -> Run:
    config = load_config(written(dataset, folder), overrides)
    return locate(config, dataset, Parallel())


def written(dataset: Dataset, folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"data: {{dataset: {dataset.root}}}\nmethod: {{name: dctc}}\n"
        f"network: {{width: 2}}\nrun: {{output: {folder / 'runs'}}}\n"
    )
    return path


def trainer(dataset: Dataset, folder: Path, *overrides: str) -> Trainer:
    config = settle(resolve(load_config(written(dataset, folder), overrides)), torch.device("cpu"))
    run = located(dataset, folder, *overrides)
    nobody = cast(Tracker, SimpleNamespace())
    return prepare(config, dataset, Parallel(), run, cast(StopRequest, SimpleNamespace(received=None)))(nobody)


def test_every_share_and_method_takes_equally_many_rounds(dataset: Dataset, tmp_path: Path) -> None:
    tiles = dataset.manifest.splits["train"].tiles
    overrides = ("schedule.epochs=10", "schedule.warmup_epochs=1", "data.batch_labelled=3", "data.batch_unlabelled=6")
    schedules = {
        trainer(dataset, tmp_path, *overrides, f"data.labelled_share={share}", f"method.name={method}").schedule
        for share in SHARES
        for method in ("dctc", "supervised")
    }
    (schedule,) = schedules
    assert schedule.epoch == -(-tiles // 3)
    assert (schedule.rounds, schedule.warmup) == (10 * schedule.epoch, schedule.epoch)


def test_a_short_run_has_a_short_warm_up(dataset: Dataset, tmp_path: Path) -> None:
    schedule = trainer(dataset, tmp_path, "schedule.epochs=2").schedule
    rates = [schedule.factor(step) for step in range(schedule.rounds)]
    assert max(rates) == 1
    assert rates[-1] < 0.01


def test_the_streams_of_each_share(dataset: Dataset, tmp_path: Path) -> None:
    train = set(Index.open(dataset).rows("train").tolist())
    smaller: set[int] = set()
    for share in SHARES:
        built = trainer(dataset, tmp_path, f"data.labelled_share={share}")
        assert built.unlabelled is not None
        labelled, unlabelled = (set(stream.rows.tolist()) for stream in (built.labelled, built.unlabelled))
        assert built.labelled.labels
        assert not built.unlabelled.labels  # its labels are never read
        assert built.labelled.number != built.unlabelled.number
        assert smaller < labelled  # nested
        if share == "1":  # all labelled: the labelled images without their labels
            assert labelled == unlabelled == train
        else:
            assert labelled | unlabelled == train
            assert not labelled & unlabelled
        smaller = labelled


def test_supervised_has_no_second_stream(dataset: Dataset, tmp_path: Path) -> None:
    built = trainer(dataset, tmp_path, "method.name=supervised", "data.batch_labelled=5", "data.batch_unlabelled=7")
    assert built.unlabelled is None
    assert built.tiles_per_round == 5
    assert trainer(dataset, tmp_path, "data.batch_labelled=5", "data.batch_unlabelled=7").tiles_per_round == 12


def test_the_same_tiles_are_watched_whatever_the_layout(dataset: Dataset, tmp_path: Path) -> None:
    first, second = (trainer(dataset, tmp_path, f"parallel.accumulation={n}").watch.rows for n in (1, 2))
    assert first.keys() == second.keys() == {"val", "test", "labelled", "unlabelled", "probe", "pictures"}
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_pseudo_labels_of_all_shares_are_looked_at_on_the_same_tiles(dataset: Dataset, tmp_path: Path) -> None:
    probes = [
        trainer(dataset, tmp_path, f"data.labelled_share={share}").watch.rows["probe"].tolist()
        for share in ("1/16", "1/8", "1/2", "1")
    ]
    assert probes[0] == probes[1] == probes[2] == probes[3]
    assert len(set(probes[0])) == 32
    half = set(Index.open(dataset).labelled_rows(Fraction(1, 2)).tolist())
    assert not half & set(probes[0]), "up to a half of the labels none of them is labelled"
    most = trainer(dataset, tmp_path, "data.labelled_share=95%").watch.rows
    assert set(most["probe"].tolist()) == set(most["unlabelled"].tolist()), "where few are left, those"


def test_pseudo_labels_are_never_of_a_strong_view(dataset: Dataset, tmp_path: Path) -> None:
    kinds = {}
    for kind in ("none", "flips", "weak", "strong"):
        built = trainer(dataset, tmp_path, f"data.augment={kind}")
        assert built.unlabelled is not None
        kinds[kind] = (built.labelled.augment, built.unlabelled.augment)
    expected = {kind: (kind, kind) for kind in ("none", "flips", "weak")} | {"strong": ("strong", "weak")}
    assert kinds == expected


def test_an_option_that_does_nothing_is_told(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no more than told: models and runs of earlier versions have such options."""
    told = {}
    for options in ("confidence=0.9", "drop=0.3", "confidence=0.9 threshold=fixed", "drop=0.3 threshold=entropy"):
        trainer(dataset, tmp_path, *(f"method.{option}" for option in options.split()))
        told[options] = [line for line in capsys.readouterr().out.splitlines() if "does nothing" in line]
    assert told == {
        "confidence=0.9": ["warning: method.confidence does nothing: it is of threshold=fixed, and threshold is none"],
        "drop=0.3": ["warning: method.drop does nothing: it is of threshold=entropy, and threshold is none"],
        "confidence=0.9 threshold=fixed": [],
        "drop=0.3 threshold=entropy": [],
    }


def test_the_amount_of_photometry_is_that_of_all_strong_views(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the method's and of labelled tiles; where there is none, the key is told to do nothing."""
    changed, told = {}, {}
    for amount in (0, 0.5, 1):
        for setting in ("data.augment=strong", "method.views=1", "data.augment=flips"):
            built = trainer(dataset, tmp_path, f"data.photometry={amount}", setting)
            told[amount, setting] = "data.photometry does nothing" in capsys.readouterr().out
            assert built.unlabelled is not None
            first = [
                next(built.batches(range(1), torch.device("cpu")))[0] for built in (built.labelled, built.unlabelled)
            ]
            if first[1].views:
                apart = first[1].views[0] - first[1].images
            else:
                plain = replace(built.labelled, augment="weak" if setting == "data.augment=strong" else "flips")
                apart = first[0].images - next(plain.batches(range(1), torch.device("cpu")))[0].images
            changed[amount, setting] = float(apart.abs().mean())
    for setting in ("data.augment=strong", "method.views=1"):
        assert changed[0, setting] < 1e-5
        assert 0.01 < changed[0.5, setting] < changed[1, setting]
    assert told == {case: case in {(0, "data.augment=flips"), (0.5, "data.augment=flips")} for case in told}


@pytest.mark.parametrize("key", ["phase2_start", "phase3_start"])
def test_a_phase_that_never_starts_is_told(
    dataset: Dataset, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for start in ("20", "19", "0.9", "0"):
        trainer(dataset, tmp_path, "schedule.rounds=20", f"method.{key}={start}")
        told[start] = [line for line in capsys.readouterr().out.splitlines() if "never starts" in line]
    expected = f"warning: method.{key} is round 20 of 20, so that phase never starts"
    assert told == {"20": [expected], "19": [], "0.9": [], "0": []}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.name=dctcc", ("method.name", "'dctcc'", "did you mean 'dctc'")),
        ("method.temperture=1", ("method.temperture", "did you mean 'temperature'")),
        ("method.sharpen=s3", ("method.sharpen", "'s3'", "none, s1, s2, both")),
        ("method.temperature=2", ("method.temperature", "2")),
        ("method.phase2_start=-1", ("method.phase2_start", "-1")),
        ("network.name=unett", ("network.name", "'unett'", "did you mean 'unet'")),
        ("network.name=atention_unet", ("network.name", "did you mean 'attention_unet'")),
        ("network.name=zzz", ("network.name", "attention_unet, timm_unet, u2net, u2net_small, unet")),
        ("network.backbone=resnet34", ("network.backbone", "unet takes no backbone")),
        ("network.norm=sync", ("network.norm", "batch or group")),
    ],
)
def test_settings_that_no_method_or_network_takes(
    dataset: Dataset, tmp_path: Path, override: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        trainer(dataset, tmp_path, override)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("countable", [True, False])
def test_what_a_run_took(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    countable: bool,
) -> None:
    """Memory is of the fullest of two ranks; a method whose operations cannot be counted ends well, with a warning."""

    def flops(*_: object, step: int, rounds: int) -> float:
        assert step == rounds - 1, "the last round of the only stage"
        if not countable:
            raise RuntimeError("it reads a value back")
        return 2.5e9

    monkeypatch.setattr("dctc.engine.build.round_flops", flops)
    path = written(dataset, tmp_path)
    config = settle(resolve(load_config(path, ["evaluation.test=false"])), torch.device("cpu"))
    run = located(dataset, tmp_path)
    make_folder(config, run, Parallel())
    built = trainer(dataset, tmp_path)
    told: dict[str, float] = {}
    built.tracker = cast(
        Tracker,
        SimpleNamespace(
            metrics=lambda values, _: told.update(values),
            artifact=lambda _: None,
            model=lambda _: None,
            run_id=None,
            await_run_id=lambda: None,
        ),
    )
    built.progress.seconds = 12.5
    monkeypatch.setattr(built.parallel, "gather", lambda own: [own, own + 7.0])
    finish(built, config)
    report = json.loads((run.folder / "report.json").read_text())
    assert told["perf/train_seconds"] == report["train_seconds"] == 12.5
    assert told["perf/peak_memory_gib"] == report["peak_memory_gib"] > 7.0
    assert (told.get("perf/round_gflop"), report["round_gflop"]) == ((2.5, 2.5) if countable else (None, None))
    assert ("cannot be counted" in capsys.readouterr().out) is not countable


def test_a_batch_that_does_not_divide_is_refused_before_the_first_round(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch of 4 does not divide"):
        trainer(dataset, tmp_path, "parallel.accumulation=3")


def test_the_folder_is_named_by_dataset_and_run(dataset: Dataset, tmp_path: Path) -> None:
    run = located(dataset, tmp_path, "data.labelled_share=0.25", "run.seed=3")
    experiment = f"{dataset.manifest.name}-{dataset.manifest.protocol}"
    assert (run.experiment, run.name) == (experiment, "run-1/4-s3")
    assert run.folder == tmp_path / "runs" / experiment / "run-1_4-s3"
    assert not run.folder.exists()
    make_folder(load_config(written(dataset, tmp_path), ["data.labelled_share=0.25", "run.seed=3"]), run, Parallel())
    again = load_config(run.folder / "config.yaml")
    assert (
        again.data.labelled_share
        == load_config(written(dataset, tmp_path), ["data.labelled_share=1/4"]).data.labelled_share
    )
    assert run.source is None


def test_a_run_that_ended_while_this_one_began_is_not_trained_over(dataset: Dataset, tmp_path: Path) -> None:
    config = load_config(written(dataset, tmp_path), ["optimizer.lr=0.5"])
    run = locate(config, dataset, Parallel())
    (run.folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run.folder / "checkpoints" / "step-00000004" / "progress.json").write_text("{}")
    (run.folder / "checkpoints" / "latest").write_text("step-00000004\n")
    (run.folder / "config.yaml").write_text("the other's")
    with pytest.raises(InputError, match="another process has trained there meanwhile: give the same command again"):
        make_folder(config, run, Parallel())
    assert (run.folder / "config.yaml").read_text() == "the other's"


@pytest.mark.parametrize("key", ["run.name", "run.experiment"])
@pytest.mark.parametrize("name", [".", "..", "\u00e9" * 128])
def test_names_that_are_no_folders(dataset: Dataset, tmp_path: Path, key: str, name: str) -> None:
    with pytest.raises(InputError, match=f"^{key} '"):
        located(dataset, tmp_path, f"{key}={name}")
    located(dataset, tmp_path, f"{key}={127 * chr(233)}")
