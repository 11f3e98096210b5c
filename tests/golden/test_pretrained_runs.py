"""``network.weights`` in several processes, after a stop, in what a run records, and in a sweep."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dctc.batch_size import Search
from dctc.bundle import Bundle
from dctc.config import Config, load_config
from dctc.engine.flops import round_flops
from dctc.engine.model import begin_with_weights
from dctc.engine.parallel import Parallel
from dctc.engine.weights import read_weights
from dctc.networks import NetworkSpec, build_decoder
from dctc.sweep.plan import load_sweep
from dctc.tracking.found import FoundRun
from dctc.tracking.settings import separate
from dctc.tracking.start import start_tracking
from dctc.train import command
from shards.errors import InputError
from shards.manifest import Dataset
from tests.golden.pretrained import STAND_IN, fresh, trained, written
from tests.tiny import launch_arguments, losses, run

# ---- ranks


def ranks(*others: tuple[str | None, str | None]) -> Parallel:
    """A process that is rank 0 of several, of which the others gather what is given."""
    hosts = [f"node{number}" for number in range(len(others) + 1)]
    cpu = torch.device("cpu")
    return cast(
        Parallel,
        SimpleNamespace(world=len(hosts), device=cpu, hosts=hosts, gather=lambda own: [own, *others]),
    )


def loaded(config: Path, parallel: Parallel) -> str | None:
    chosen: Config = load_config(config)
    method, _ = fresh(config, "network.weights=null")
    return begin_with_weights(chosen, Dataset.open(chosen.data.dataset), parallel, method)


def test_ranks_that_have_another_file_or_none_are_named(
    timm: None, tmp_path: Path, tiny_dataset: Path, file: Path
) -> None:
    config = written(tmp_path, tiny_dataset, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert loaded(config, ranks((digest, None), (digest, None))) == digest
    with pytest.raises(InputError, match=r"'.*small\.safetensors': rank 2 on node2 has another file .* \(SHA-256 ab "):
        loaded(config, ranks((digest, None), ("ab", None)))
    with pytest.raises(InputError, match=r"^rank 1 on node1: key network\.weights is 'x': no such file$"):
        loaded(config, ranks((None, "key network.weights is 'x': no such file"), (digest, None)))
    file.unlink()
    with pytest.raises(InputError, match=r"^key network\.weights is .*no such file"):
        loaded(config, ranks((None, "the same"), (None, "the same")))


@pytest.mark.matrix
@pytest.mark.slow
def test_two_processes_begin_as_one_does(timm: None, tmp_path: Path, tiny_dataset: Path) -> None:
    """A backbone without batch norms, so that losses agree up to rounding."""
    file = tmp_path / "normless.safetensors"
    save_file(trained("normless"), file)
    config = written(tmp_path, tiny_dataset, file, backbone="normless", norm="group")
    assert command([str(config), "run.name=one"]) == 0
    run(
        "accelerate", *launch_arguments(2), config, "run.name=two", ACCELERATE_USE_CPU="true", PYTHONPATH=STAND_IN
    )  # fmt: skip
    folders = [next((tmp_path / "runs").glob(f"*/{name}")) for name in ("one", "two")]
    one, two = (losses(folder) for folder in folders)
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
    digests = {json.loads((folder / "report.json").read_text())["weights_sha256"] for folder in folders}
    assert digests == {hashlib.sha256(file.read_bytes()).hexdigest()}


# ---- going on, and what is recorded


def test_a_run_goes_on_without_the_file(timm: None, tmp_path: Path, tiny_dataset: Path, file: Path) -> None:
    """The same to the bit, whatever is under the path by then; another path is another run's setting."""
    config = str(written(tmp_path, tiny_dataset, file))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert command([config, "run.keep=5"]) == 0
    folder = next((tmp_path / "runs").glob("*/run"))
    step = Path("checkpoints") / "step-00000001"
    shutil.copytree(folder / step, folder.parent / "again" / step)
    file.write_text("changed")
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert command([config, "run.name=again", "network.weights=x.pth"]) == 2
    assert f"other settings: network.weights (was '{file}', now 'x.pth')" in told.getvalue()
    file.unlink()
    assert command([config, "run.name=again"]) == 0
    first, second = (load_file(folder.parent / name / "model.safetensors") for name in ("run", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name in ("run", "again"):
        assert json.loads((folder.parent / name / "report.json").read_text())["weights_sha256"] == digest
        assert yaml.safe_load((folder.parent / name / "config.yaml").read_text())["network"]["weights"] == str(file)
        assert load_config(folder.parent / name / "config.yaml").network.weights == file


def test_the_model_file_needs_none(
    timm: None, tmp_path: Path, tiny_dataset: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dctc.engine.faults._held", {})
    assert command([str(written(tmp_path, tiny_dataset, file, "supervised")), "schedule.rounds=1"]) == 0
    file.unlink()
    (model,) = tmp_path.glob("runs/*/run/model.safetensors")
    bundle = Bundle.load(model)
    assert bundle.description.network == NetworkSpec(3, 6, "timm_unet", 4, "batch", "small")
    assert bundle.logits(torch.zeros(1, 3, 32, 32))["s1"].shape == (1, 6, 32, 32)


def test_the_digest_is_a_parameter_of_the_mlflow_run(
    tmp_path: Path, tiny_dataset: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("dctc.tracking.start.open_tracker", lambda settings, **_: found.append(settings.params))
    config = load_config(written(tmp_path, tiny_dataset, file))
    dataset = Dataset.open(config.data.dataset)
    for digest in ("abc", None):
        start_tracking(
            config, dataset, tmp_path, ("e", "r"), "none", "s1", run_id=None, resumed_step=None, weights=digest,
            main_process=True,
        )  # fmt: skip
    assert found[0] == found[1] | {"weights_sha256": "abc"}
    assert found[1]["network.weights"] == str(file)


def test_runs_are_compared_by_the_digest_and_not_by_the_path() -> None:
    def found(path: str, digest: str) -> FoundRun:
        return cast(FoundRun, SimpleNamespace(params={"network.weights": path, "weights_sha256": digest}))

    key = ("dctc", "1/2")
    assert not separate({key: [found("a.pth", "1"), found("b.pth", "1")]}).notes
    assert separate({key: [found("a.pth", "1"), found("a.pth", "2")]}).notes == (
        "dctc: its runs differ in weights_sha256, so it has several rows",
    )


# ---- what looks at a run before, or beside, it


def test_a_sweep_looks_at_the_file_of_runs_that_have_not_begun(
    timm: None, tmp_path: Path, tiny_dataset: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all of them, before the first one starts."""
    config = yaml.safe_load(written(tmp_path, tiny_dataset, file).read_text())
    del config["run"]["name"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    sweep = tmp_path / "table.yaml"
    rows = [
        {"row": "dctc", "config": "run.yaml"},
        {"row": "U-Net", "config": "run.yaml", "set": {"method.name": "cps"}},
    ]
    sweep.write_text(yaml.safe_dump({"name": "table", "seeds": [0, 1], "shares": ["1/2"], "rows": rows}))
    read: list[Path] = []

    def counted(path: Path) -> tuple[dict[str, Tensor], str]:
        read.append(path)
        return read_weights(path)

    monkeypatch.setattr("dctc.engine.model.read_weights", counted)
    runs = load_sweep(sweep).runs
    assert (len(runs), read) == (4, [file])
    save_file(trained("wide"), file)
    with pytest.raises(InputError, match=r"table\.yaml: row 'dctc': key network\.weights is .*stages\.0\.0\.weight is"):
        load_sweep(sweep)
    file.unlink()
    for begun in runs[:3]:
        (begun.folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(InputError, match=r"row 'U-Net': key network\.weights is .*: no such file"):
        load_sweep(sweep)
    runs[3].folder.mkdir(parents=True)
    (runs[3].folder / "report.json").write_text("{}")  # its checkpoints need not be there any more
    assert len(load_sweep(sweep).runs) == 4


def test_trials_of_batch_sizes_do_not_read_it(tmp_path: Path, tiny_dataset: Path) -> None:
    """A trainer that says with which weights it was started, in place of ours."""
    config = written(tmp_path, tiny_dataset, tmp_path / "none.pth")
    script = (
        "import sys; from dctc.config import load_config; c = load_config(sys.argv[1], sys.argv[2:]); "
        "sys.exit(f'error: weights {c.network.weights}, backbone {c.network.backbone}')"
    )
    search = Search(config, [f"network.weights={tmp_path}/other.pth"], [sys.executable, "-c", script], 1)
    with pytest.raises(InputError, match="weights None, backbone small"):
        list(search.trials())


def test_counting_operations_needs_no_file(timm: None) -> None:
    """What a round takes follows from the network alone, which knows of no file."""
    assert round_flops("supervised", NetworkSpec(3, 2, "timm_unet", 4, backbone="small"), {}, 1, 0, 16) > 0
    assert not any("weights" in name for name in NetworkSpec.__dataclass_fields__)
    assert build_decoder(NetworkSpec(3, 2, "timm_unet", 4, backbone="small")) is not None
