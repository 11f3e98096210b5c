"""The schema of a run: YAML files that extend each other, dotted overrides, errors that name the key and the file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from shards.errors import InputError
from shards.manifest import parse_share
from shards.remote import DEFAULT_BYTES, CacheSettings, is_url
from shards.schema import without_comments

COMMAND_LINE = "command line"


def _share(value: Any) -> Fraction:
    try:
        return parse_share(value)
    except InputError as error:  # as a ValueError it comes back with the key and the file
        raise ValueError(str(error)) from None


def _bytes(value: Any) -> int:
    """A positive number of bytes: 64000000000, "64GB" (10^9) or "64GiB" (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", str(value).strip())
    if match is None:
        raise ValueError("not a number of bytes: write it as 64000000000, 64GB or 60GiB")
    number, prefix, binary = match.groups()
    count = int(Fraction(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))
    if count < 1:
        raise ValueError("must be at least 1 byte")
    return count


def _location(value: Any) -> Any:
    if not isinstance(value, str | Path):
        raise ValueError("name the dataset's folder or URL")
    return value if is_url(value) else Path(value)


def _file(value: Any) -> Any:
    if isinstance(value, str) and is_url(value):
        raise ValueError("nothing is downloaded: fetch the file, and name it here")
    return value


Location = Annotated[Path | str, BeforeValidator(_location)]
File = Annotated[Path, BeforeValidator(_file)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Share = Annotated[Fraction, BeforeValidator(_share), PlainSerializer(str)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DataConfig(_Section):
    """Which tiles, how many of their labels, in what batches. Batch sizes are global, whatever the number of ranks.

    ``order: auto`` is block for a dataset behind a URL and global for a folder.
    """

    dataset: Location
    labelled_share: Share = Fraction(1)
    batch_labelled: Count = 4
    batch_unlabelled: Count = 4
    augment: Literal["none", "flips", "weak", "strong"] = "none"
    photometry: Annotated[float, Field(ge=0, le=1)] = 1.0  # amount of what strong views change beside geometry
    cutmix: bool = False  # of the labelled stream: each tile with a box of its partner's in the batch
    order: Literal["auto", "global", "block"] = "auto"
    mix: Count = 64  # order block: shards that are shuffled together
    on_damage: Literal["stop", "substitute"] = "stop"
    workers: Annotated[int, Field(ge=0)] = 0  # loader processes a stream and rank; 0 reads in the training process
    prefetch: Count = 2  # batches that each worker holds ready
    cache: Path | None = None  # of datasets behind a URL; null: DCTC_CACHE, else ~/.cache/dctc
    cache_bytes: Bytes = DEFAULT_BYTES

    @property
    def cache_settings(self) -> CacheSettings:
        """The node's cache for datasets behind a URL."""
        return CacheSettings(self.cache, self.cache_bytes)

    @property
    def resolved_order(self) -> Literal["global", "block"]:
        """The kind of order that this run reads in."""
        if self.order == "auto":
            return "block" if is_url(self.dataset) else "global"
        return self.order


class NetworkConfig(_Section):
    """``norm: auto`` is batch on one process and on CPU, sync on several GPUs (so that N GPUs equal one)."""

    name: str = "unet"
    width: Count = 64
    backbone: str = ""  # of network timm_unet: the name of a timm network
    weights: File | None = None  # of the backbone, that its encoders begin with; null is random
    norm: Literal["auto", "batch", "sync", "group"] = "auto"


class MethodConfig(BaseModel):
    """``name`` and the method's own options, which the method checks."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options, without the name."""
        return dict(self.model_extra or {})


class OptimizerConfig(_Section):
    """One optimizer a part, all alike. ``clip`` bounds the gradient norm of each part on its own."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-3
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Positive = 1e-8
    momentum: Decay = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive | None = None
    nonfinite: Literal["stop", "skip"] = "stop"  # an update with NaN or inf: end the run, or leave the update out


class ScheduleConfig(_Section):
    """Length and learning rate. ``rounds`` wins over ``epochs``; the warm-up keeps its share of the run."""

    epochs: Count = 100
    rounds: Count | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] | None = None  # None is 5 %: the paper's 5 of 100
    shape: Literal["cosine", "poly"] = "cosine"

    @model_validator(mode="after")
    def _warm_up_ends(self) -> ScheduleConfig:
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is longer than epochs {self.epochs}")
        return self

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return 0.05 * self.epochs if self.warmup_epochs is None else self.warmup_epochs


def _dtype(value: Any) -> Any:
    if value in ("fp8", "float8"):
        raise ValueError("fp8 libraries convert nn.Linear alone, and these networks are convolutions: use bf16")
    return value


class PrecisionConfig(_Section):
    """Arithmetic of the forward passes; losses and weights are float32 always.

    ``dtype: auto`` is bf16 on a GPU that has it, else fp32.
    """

    dtype: Annotated[Literal["auto", "fp32", "tf32", "bf16", "fp16"], BeforeValidator(_dtype)] = "auto"
    channels_last: bool = False


class ParallelConfig(_Section):
    """How the work is laid out on the devices; nothing here changes the result but by rounding.

    ``strategy: auto`` is what the launch file says, else none for one process and ddp for several; anything else must
    be what was launched.
    """

    strategy: Literal["auto", "none", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    accumulation: Count = 1
    activation_checkpointing: bool = False  # activations of a block are computed again in the backward pass
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"  # torch.compile, each part
    offload: bool = False  # zero1-3: optimizer state, and at stage 3 parameters, in the host's memory
    timeout: Annotated[float, Field(ge=10)] = 600.0  # seconds a collective call waits for a rank, after the first round


class RunConfig(_Section):
    """Where a run goes and how it goes on. Intervals are in rounds; None is once an epoch, 0 never.

    A checkpoint is also written at the end and when the run is asked to stop.
    """

    output: Path = Path("runs")
    experiment: str | None = None  # default: dataset and protocol
    name: str | None = None  # default: CONFIG-SHARE-sSEED, see load_config
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: Annotated[int, Field(ge=0)] | None = None
    keep: Count = 2  # checkpoints that stay
    resume: str = "auto"  # auto, never or the path of a checkpoint
    pictures_every: Annotated[int, Field(ge=0)] | None = None
    log_every: Count = 10
    profile: Annotated[str, Field(pattern=r"^\d+\.\.\d+$")] | None = None  # trace of rounds, as 10..12

    def profiled(self, total: int) -> range | None:
        """The rounds to trace, from 1 on, of a run of ``total``."""
        if self.profile is None:
            return None
        first, last = map(int, self.profile.split(".."))
        return range(max(1, first), min(last, total) + 1)


class TrackingConfig(_Section):
    """MLflow; ``uri: null`` means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db beside the runs folder.

    ``tags`` go to the run beside dctc's own; a sweep says there which row of its table the run is. The
    finished run's model becomes a version of the registered model ``register_as``.
    """

    enabled: bool = True
    uri: str | None = None
    register_as: str | None = None
    tags: dict[str, str] = {}


class EvaluationConfig(_Section):
    """Validation while training and the test at the end. ``every`` is in rounds; None is once an epoch, 0 never."""

    every: Annotated[int, Field(ge=0)] | None = None
    batch: Count = 8  # tiles a rank
    pictures: Annotated[int, Field(ge=0)] = 4
    test: bool = True


class Config(_Section):
    """A whole run."""

    data: DataConfig
    method: MethodConfig
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def plain(self) -> dict[str, Any]:
        """As nested plain values, ready for YAML."""
        return self.model_dump(mode="json")

    def flat(self) -> dict[str, Any]:
        """Dotted key -> plain value."""
        return dict(_flatten(self.plain()))

    def result_settings(self) -> dict[str, Any]:
        """The flat settings that decide the weights: what a resumed run must share with the run it continues."""
        settings = {key: value for key, value in self.flat().items() if not key.startswith(_FREE)}
        return settings | {"data.order": self.data.resolved_order}  # `auto` would change with the dataset's place


# Settings that leave the weights as they are (up to rounding, for the layout). The dataset is compared by its digest.
_FREE = (
    "data.dataset", "data.on_damage", "data.workers", "data.prefetch", "data.cache", "optimizer.nonfinite", "parallel.",
    "run.output", "run.experiment", "run.name", "run.checkpoint_every", "run.keep", "run.resume", "run.pictures_every",
    "run.log_every", "run.profile", "tracking.", "evaluation.",
)  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence that helps with a misspelt name: the nearest valid one, else all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid are {', '.join(sorted(known))}"


def load_config(
    path: str | Path, overrides: Sequence[str] = (), between: Sequence[tuple[str, Sequence[str]]] = ()
) -> Config:
    """Read a run's configuration.

    Later wins: the files it ``extends`` (in order), the file itself, the ``key.sub=value`` overrides. ``between`` the
    two stand further overrides, each list with the name of the file that has them.

    A run without a name is called after the file, its share and its seed, ``dctc_extended-1/8-s0``: two files of one
    method are two runs. Where the command line chooses the method, after that method.

    Raises:
        InputError: naming file or command line, key, and the nearest valid name.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, values in _layers(Path(path), ()):
        _merge(merged, values, source, origins)
    for source, texts in [*between, (COMMAND_LINE, overrides)]:
        for text in texts:
            _merge(merged, parse_override(text), source, origins)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise InputError("; ".join(_explain(item, origins, str(path)) for item in error.errors())) from None
    if config.run.name is not None:
        return config
    kind = config.method.name if origins["method.name"] == COMMAND_LINE else Path(path).stem
    name = f"{kind}-{config.data.labelled_share}-s{config.run.seed}"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=value`` as nested mappings; the value is YAML, but that ``#`` begins no comment in a text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override {text!r} is not of the form key=value, for example data.labelled_share=1/4")
    try:
        nested: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"override {text!r}: {error}") from None
    nested = without_comments(nested, value)
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _layers(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.resolve() in seen:
        raise InputError(f"{path}: extends itself, by way of {' -> '.join(str(p) for p in seen)}")
    values = read_mapping(path)
    bases = values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{path}: key extends is {bases!r}: name a file, or a list of files, relative to this one")
    for base in bases:
        yield from _layers(path.parent / base, (*seen, path.resolve()))
    yield str(path), values


def read_mapping(path: Path, what: str = "configuration", of: str = "sections") -> dict[str, Any]:
    """A YAML file whose top is a mapping; ``what`` and ``of`` are the words for it in errors (:class:`InputError`)."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot read this {what} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: a {what} is a mapping of {of}, this is {type(values).__name__}")
    return values


def _merge(
    target: dict[str, Any], values: Mapping[str, Any], source: str, origins: dict[str, str], at: str = ""
) -> None:
    for key, value in values.items():
        dotted = f"{at}{key}"
        origins[dotted] = source
        if isinstance(value, Mapping):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value, source, origins, f"{dotted}.")
        else:
            target[key] = value


def _flatten(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _explain(item: Mapping[str, Any], origins: Mapping[str, str], path: str) -> str:
    parts = [str(part) for part in item["loc"]]
    key = ".".join(parts)
    where = next((origins[k] for k in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if k in origins), path)
    if item["type"] == "extra_forbidden":
        section = _section(parts[:-1])
        return f"{where}: unknown key {key}; {nearest(parts[-1], list(section.model_fields))}"
    if item["type"] == "missing":
        return f"{where}: key {key} is missing"
    return f"{where}: key {key} is {item['input']!r}: {item['msg'].removeprefix('Value error, ')}"


def _section(parts: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in parts:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return section
