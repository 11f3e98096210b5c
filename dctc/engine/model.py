"""Which networks a run trains, and what its model files say of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dctc.bundle import Description
from dctc.config import Config, nearest
from dctc.engine.checkpoint import Progress
from dctc.engine.parallel import Parallel
from dctc.methods import Method, build_method
from dctc.networks import NetworkSpec, UnavailableBackbone, UnknownNetwork, build_network
from shards.errors import InputError
from shards.manifest import Dataset


def check_network(config: Config, dataset: Dataset) -> None:
    """Raises :class:`InputError` where the network cannot be built; it is made for that and let go."""
    with _keys_named(config):
        build_network(network_spec(config, dataset))


def make_method(config: Config, dataset: Dataset, parallel: Parallel) -> Method:
    """The run's method with fresh parts; raises :class:`InputError` where its network cannot be built."""
    with _keys_named(config):
        return build_method(config.method.name, network_spec(config, dataset, parallel), config.method.options)


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
