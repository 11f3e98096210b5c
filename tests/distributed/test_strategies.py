"""Every strategy trains the same as one process, and each of them goes on from a checkpoint of any other.

The matrix {none, ddp, fsdp2, zero1, zero2, zero3} x {accumulation 1, 4} x {clipping on, off} x {SGD, AdamW} is marked
``matrix``: all of it for dctc, two combinations for each other method; `make test` has ddp alone (test_parity.py).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import ROOT, launch_together, losses, make_dataset, run, write_config

pytestmark = pytest.mark.timeout(900)  # each starts several pairs of processes; slow machines take thrice as long
STRATEGIES = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
METHODS = ("mean_teacher", "cps", "dst_cbc")  # another method joins the matrix by its name here
# The extended preset with all that needs the other ranks' counts, or moves a part without an update.
EXTENDED = (
    "method.labels_for_students=true method.labels_in_phase3=true method.views=2 method.cutmix=true "
    "method.feature_dropout=0.5 method.class_balance=0.5 method.arbitration=true method.update=fused "
    "method.label_turns=2 method.attention=false method.teacher_pull=0.1 "
)
KINDS = {
    "": "",
    "-adaptive": f"{EXTENDED}method.threshold=adaptive",
    "-entropy": f"{EXTENDED}method.threshold=entropy",
    "-preset": "method.labels_for_students=true method.labels_in_phase3=true method.cutmix=true method.label_turns=4 "
    "method.pseudo_label=soft method.sharpen=none method.teacher_pull=0.02 method.attention=false method.update=fused",
    "-balanced": "method.class_balance=0.5",
    "-turns": "method.label_turns=2",
    "-sure": "method.confidence=0.2",  # or a net that has not learnt yet trusts nothing, and losses are 0
}
NETWORKS = ("attention_unet", "u2net_small")  # beside unet
OPTIMIZERS = {"sgd": "optimizer.lr=0.01", "adamw": "optimizer.lr=0.001 optimizer.weight_decay=0.01 optimizer.eps=1e-3"}
TOLERANCE = 1e-6
SEEDS = (0, 1, 2)
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One cell of the matrix. AdamW's eps is large enough that a gradient of rounding noise makes no whole step."""

    method: str
    optimizer: str
    clip: float | None
    accumulation: int
    seed: int = 0
    network: str = "unet"
    kind: str = ""

    @property
    def name(self) -> str:
        what = f"{self.method}{self.kind}-{self.network}"
        return f"{what}-{self.optimizer}-{self.clip}-{self.accumulation}-{self.seed}"

    def keys(self, prefix: str) -> str:
        return (
            f"run.name={prefix}-{self.name} run.seed={self.seed} method.name={self.method} run.keep=9 "
            f"network.name={self.network} "
            f"optimizer.name={self.optimizer} {OPTIMIZERS[self.optimizer]} "
            f"optimizer.clip={self.clip or 'null'} parallel.accumulation={self.accumulation}"
            f" {KINDS[self.kind]}"
        )


CASES = [Case("dctc", *values) for values in itertools.product(OPTIMIZERS, (None, 0.5), (1, 4))]
CASES += [Case(method, "sgd", 0.5, 4, kind="-balanced") for method in METHODS]
CASES += [Case(method, "adamw", None, 1) for method in METHODS]
# CutMix pairs the tiles of a micro-batch, so each needs two.
CASES += [Case("unimatch", "sgd", 0.5, 2, kind="-sure"), Case("unimatch", "adamw", None, 1, kind="-sure")]
CASES += [Case("dctc", "sgd", 0.5, 2, kind=kind) for kind in ("-adaptive", "-entropy", "-preset")]
NETWORK_CASES = [Case("supervised", "sgd", 0.5, 1, network=network) for network in NETWORKS]
NETWORK_CASES += [Case("dctc", "sgd", 0.5, 4, network="u2net_small", kind="-turns")]


class Runs:
    """Trains cases, a strategy's together in one pair of processes, each once."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder / "runs" / "synthetic-scene"
        self.config = write_config(
            folder / "matrix.yaml", dataset, schedule={"rounds": ROUNDS},
            data={"batch_labelled": 8, "batch_unlabelled": 8},
        )  # fmt: skip

    def of(self, strategy: str, cases: list[Case]) -> list[Path]:
        folders = [self.folder / f"{strategy}-{case.name}" for case in cases]
        missing = {
            case.keys(strategy): None for case, folder in zip(cases, folders, strict=True)
            if not (folder / "model.safetensors").exists()
        }  # fmt: skip
        if missing:
            launch_together(strategy, self.config, list(missing))
        assert {json.loads((folder / "report.json").read_text())["strategy"] for folder in folders} == {strategy}
        return folders


def vectors(folder: Path) -> dict[str, Tensor]:
    """All weights of each part as one vector."""
    weights = load_file(folder / "model.safetensors")
    parts = {key.partition(".")[0] for key in weights}
    return {p: torch.cat([t.flatten() for k, t in sorted(weights.items()) if k.startswith(f"{p}.")]) for p in parts}


def distance(one: Path, two: Path) -> float:
    """Largest relative difference of the losses of any round, and of the weights of any part."""
    first, second = losses(one), losses(two)
    assert len(first) == len(second) > 0
    assert [list(a) for a in first] == [list(b) for b in second]
    apart = [abs(a[k] - b[k]) / abs(a[k]) for a, b in zip(first, second, strict=True) for k in a]
    weights, others = vectors(one), vectors(two)
    assert weights.keys() == others.keys()
    return max(*apart, *(float((weights[p] - others[p]).norm() / weights[p].norm()) for p in weights))


def must_equal_one_process(runs: Runs, strategy: str, cases: list[Case]) -> None:
    """Each within the tolerance for one seed of three.

    Rounding may flip a near-tie (in a pseudo label's argmax, a max-pool, a ReLU at 0), and the trainings part there:
    one process with other micro-batches does the same. A seed in which none is near shows whether the engine is exact;
    a wrong scale, a missed reduction or a stale weight shows in every seed.
    """
    apart: dict[Case, list[float]] = {case: [] for case in cases}
    left = cases
    for seed in SEEDS:
        seeded = [replace(case, seed=seed) for case in left]
        one = runs.of("none", [replace(case, accumulation=1) for case in seeded])  # one start for all of them
        for case, *folders in zip(left, one, runs.of(strategy, seeded), strict=True):
            apart[case].append(distance(*folders))
        left = [case for case in left if apart[case][-1] > TOLERANCE]
        if not left:
            return
    found = {case.name: apart[case] for case in left}
    raise AssertionError(f"{strategy}: {found} for seeds {SEEDS}")


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles of 16 px: fewer pixels are near a tie."""
    return make_dataset(tmp_path_factory.mktemp("small"), tile=16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("matrix"), small_dataset)


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_matrix(runs: Runs, strategy: str) -> None:
    """SGD too, because Adam hides a wrong scale of the gradient."""
    must_equal_one_process(runs, strategy, CASES)


SOURCES = [Case("dctc", "sgd", 0.5, 1), Case("dctc", "adamw", None, 1)]


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_goes_on_from_a_checkpoint_of_every_other(runs: Runs, strategy: str) -> None:
    """The last round from another strategy's checkpoint ends where that strategy's own last round ended.

    A lost moment would show as a difference of a percent; what is allowed is a near-tie that rounding flips.
    """
    sources = {other: runs.of(other, SOURCES) for other in STRATEGIES}
    pairs = [
        (folder, f"{strategy}-from-{other}-{case.name}", case)
        for other, folders in sources.items() for folder, case in zip(folders, SOURCES, strict=True)
    ]  # fmt: skip
    checkpoint = f"checkpoints/step-{ROUNDS - 1:08d}"
    launch_together(
        strategy,
        runs.config,
        [f"{case.keys('x')} run.name={name} run.resume={folder / checkpoint}" for folder, name, case in pairs],
    )
    for folder, name, _ in pairs:
        own, other = vectors(folder), vectors(runs.folder / name)
        apart = max(float((own[p] - other[p]).norm() / own[p].norm()) for p in own)
        assert apart <= 1e-4, name
        if name.startswith(f"{strategy}-from-{strategy}"):
            assert apart == 0.0, f"{name}: the same strategy and ranks go on to the same bits"


VARIANTS = [
    ("zero2", "parallel.offload=true"),
    ("zero3", "parallel.offload=true"),
    ("zero3", "parallel.activation_checkpointing=true"),
    ("fsdp2", "parallel.activation_checkpointing=true"),
    ("ddp", "parallel.activation_checkpointing=true"),
    ("fsdp2", "optimizer.nonfinite=skip"),
]
LAID_OUT = ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.matrix
@pytest.mark.parametrize(("strategy", "variant"), VARIANTS)
def test_what_only_saves_memory_or_looks_changes_nothing(runs: Runs, strategy: str, variant: str) -> None:
    case = Case("dctc", "sgd", 0.5, 1)
    (plain,) = runs.of(strategy, [case])
    name = f"{strategy}-{variant.partition('=')[0]}"
    launch_together(strategy, runs.config, [f"{case.keys('x')} run.name={name} {variant}"])
    assert distance(plain, runs.folder / name) <= TOLERANCE


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", LAID_OUT)
def test_channels_last_trains_everywhere(runs: Runs, strategy: str) -> None:
    case = Case("dctc", "sgd", 0.5, 1)
    launch_together(strategy, runs.config, [f"{case.keys('x')} run.name=last-{strategy} precision.channels_last=true"])
    (plain,) = runs.of(strategy, [case])
    assert distance(plain, runs.folder / f"last-{strategy}") <= 1e-4


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_network_trains_as_in_one_process(runs: Runs, strategy: str) -> None:
    """Gates, and losses on seven outputs of one pass.

    dctc on an Attention U-Net is left to the float64 of ``tests/golden/test_dctc_round.py``: as narrow as it is here,
    one process with other micro-batches parts from itself in every second seed, with soft labels too.
    """
    must_equal_one_process(runs, strategy, NETWORK_CASES)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_is_the_same_in_every_strategy_that_has_it(runs: Runs, dtype: str) -> None:
    """Gradients are exchanged in float32 by all of them; a lower precision there would show as 1e-3."""
    case = Case("dctc", "sgd", None, 1)
    strategies = ["ddp", "fsdp2", "zero3"] if dtype == "bf16" else ["ddp", "fsdp2"]
    for strategy in strategies:
        launch_together(
            strategy, runs.config, [f"{case.keys('x')} run.name={dtype}-{strategy} precision.dtype={dtype}"]
        )
    for strategy in strategies[1:]:
        assert distance(runs.folder / f"{dtype}-ddp", runs.folder / f"{dtype}-{strategy}") <= 1e-6
    lower, full = vectors(runs.folder / f"{dtype}-ddp"), vectors(*runs.of("ddp", [case]))
    assert all((lower[part] - full[part]).norm() > 1e-5 * full[part].norm() for part in full), "no other precision"


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp2"])
def test_compiled_parts_train_the_same(runs: Runs, strategy: str) -> None:
    case = Case("supervised", "sgd", None, 1)
    (eager,) = runs.of(strategy, [case])
    launch_together(
        strategy,
        runs.config,
        [f"{case.keys('x')} run.name=compiled-{strategy} parallel.compile=default evaluation.every=2"],
    )
    assert distance(eager, runs.folder / f"compiled-{strategy}") <= 1e-5


# ---- what was asked for and what came up


@pytest.mark.parametrize(
    ("strategy", "keys", "words"),
    [
        ("fsdp2", "parallel.strategy=zero2", "parallel.strategy is zero2, but the launch file asks for fsdp2"),
        ("zero1", "precision.dtype=fp16", "key precision.dtype is fp16: zero1 keeps one loss scale an engine"),
    ],
)
def test_what_cannot_be_is_said_at_the_start_and_once(runs: Runs, strategy: str, keys: str, words: str) -> None:
    done = run(
        "accelerate", "launch", "--config_file", ROOT / "launch" / f"{strategy}.yaml", "--num_processes", "2",
        "dctc/train.py", runs.config, "run.name=wrong", keys, check=False, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(f"error: {words}") == 1, done.stderr
    assert not (runs.folder / "wrong").exists()
