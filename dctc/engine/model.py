"""Which networks a run trains, and what its model files say of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dctc.bundle import Description
from dctc.config import Config, nearest
from dctc.engine.checkpoint import Progress
from dctc.engine.parallel import Parallel
from dctc.engine.weights import read_weights
from dctc.methods import Method, build_method
from dctc.networks import (
    NetworkSpec,
    UnavailableBackbone,
    UnfitWeights,
    UnknownNetwork,
    begin_with,
    build_network,
    fit_weights,
)
from shards.errors import InputError
from shards.manifest import Dataset


def check_network(config: Config, dataset: Dataset) -> None:
    """Raises :class:`InputError` where the network cannot be built; it is made for that and let go."""
    with _keys_named(config):
        build_network(network_spec(config, dataset))


def check_weights(config: Config, dataset: Dataset) -> None:
    """Raises :class:`InputError` where ``network.weights`` is set and cannot be what a fresh run begins with."""
    if config.network.weights is not None:
        _fitted(config, network_spec(config, dataset))


def make_method(config: Config, dataset: Dataset, parallel: Parallel) -> Method:
    """The run's method with fresh parts; raises :class:`InputError` where its network cannot be built."""
    with _keys_named(config):
        return build_method(config.method.name, network_spec(config, dataset, parallel), config.method.options)


def begin_with_weights(config: Config, dataset: Dataset, parallel: Parallel, method: Method) -> str | None:
    """Put ``network.weights`` into all encoders of a fresh method, whose parts are not wrapped yet; its SHA-256.

    All ranks call it, and each reads the file, from its own machine's disk as the case may be. None without a file.

    Raises:
        InputError: on all ranks, when the file of one of them does not serve or is not the same as another's.
    """
    path = config.network.weights
    if path is None:
        return None
    spec = network_spec(config, dataset, parallel)
    fitted: dict[str, Tensor] = {}
    digest = problem = None
    try:
        fitted, digest = _fitted(config, spec)
    except InputError as error:
        problem = error.message
    found = parallel.gather((digest, problem))
    failed = [rank for rank, (_, problem) in enumerate(found) if problem is not None]
    if failed:
        who = "" if len(failed) == len(found) else f"rank {failed[0]} on {parallel.hosts[failed[0]]}: "
        raise InputError(f"{who}{found[failed[0]][1]}")
    if other := next((rank for rank, (its, _) in enumerate(found) if its != found[0][0]), None):
        raise InputError(
            f"key network.weights is {str(path)!r}: rank {other} on {parallel.hosts[other]} has another file of that "
            f"name than rank 0 on {parallel.hosts[0]} (SHA-256 {found[other][0]} and {found[0][0]}): copy one to all"
        )
    begin_with(spec, method.parts.values(), fitted)
    return digest


def _fitted(config: Config, spec: NetworkSpec) -> tuple[dict[str, Tensor], str]:
    """What all encoders begin with, and the file's SHA-256."""
    path = config.network.weights
    assert path is not None
    if not spec.backbone:
        raise InputError(
            f"key network.weights is {str(path)!r}: network {spec.name} has no backbone that could begin with it; take "
            "network.name=timm_unet and a network.backbone, or network.weights=null"
        )
    weights, digest = read_weights(path)
    try:
        with _keys_named(config):
            return fit_weights(spec, weights), digest
    except UnfitWeights as error:
        raise InputError(f"key network.weights is {str(path)!r}: {error}") from None


@contextmanager
def _keys_named(config: Config) -> Iterator[None]:
    try:
        yield
    except UnknownNetwork as error:
        name = config.network.name
        raise InputError(f"key network.name: unknown network {name!r}; {nearest(name, error.known)}") from None
    except UnavailableBackbone as error:
        raise InputError(f"key network.backbone is {config.network.backbone!r}: {error}") from None


def network_spec(config: Config, dataset: Dataset, parallel: Parallel | None = None) -> NetworkSpec:
    """The network for this dataset; without ``parallel``, as a model file names it (sync norm is batch norm there)."""
    norm = config.network.norm
    if parallel is None:
        norm = "group" if norm == "group" else "batch"
    elif norm == "auto":
        norm = "sync" if parallel.world > 1 and parallel.device.type == "cuda" else "batch"
    elif norm == "sync" and parallel.device.type != "cuda":
        raise InputError("network.norm is sync, which needs GPUs: use batch or group on CPU")
    manifest = dataset.manifest
    return NetworkSpec(
        len(manifest.bands), len(manifest.classes), config.network.name, config.network.width, norm,
        config.network.backbone,
    )  # fmt: skip


def describe(config: Config, dataset: Dataset, progress: Progress) -> Description:
    """What the model files of this run say of themselves."""
    manifest = dataset.manifest
    return Description(
        method=config.method.name,
        options=config.method.options,
        network=network_spec(config, dataset),
        bands=[band.name for band in manifest.bands],
        dtype=manifest.dtype,
        mean=[band.mean for band in manifest.bands],
        std=[band.std for band in manifest.bands],
        classes=manifest.classes,
        tile_size=manifest.tile_size,
        dataset=dataset.digest,
        rounds=progress.rounds,
        run_id=progress.tracking_id,
    )
