"""Predict a whole scene: windows, the net, blending, georeferenced maps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from torch import Tensor

from dctc.mapping.blend import Accumulator
from dctc.mapping.legend import polygon_legend, raster_legend
from dctc.mapping.polygons import PolygonOptions, PolygonWriter
from dctc.mapping.raster import Draft, Layer, MapSet, RowWriter, make_folder, write_text
from dctc.mapping.record import Record
from dctc.mapping.scene import Scene, Source
from dctc.mapping.share import Share, Whole
from dctc.mapping.spool import Spools
from dctc.mapping.windows import Band, Grid, reflect
from dctc.methods.turns import VIEWS, average_views
from shards.errors import InputError
from shards.manifest import IGNORE, ClassInfo

PROBABILITY_STEPS = 250  # probabilities are stored as round(250 p) in uint8: steps of 0.004, and 255 stays free
ROWS_AT_ONCE = 64  # rendered: what lies between probabilities and a file is several times as large as the file's rows
GDAL_CACHE_BYTES = 256 << 20  # GDAL's default is 5 % of the machine's memory


class SceneModel(Protocol):
    """What a model must offer to predict scenes; :class:`dctc.bundle.Bundle` does."""

    @property
    def bands(self) -> Sequence[str]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def classes(self) -> Sequence[ClassInfo]: ...
    @property
    def tile_size(self) -> int: ...
    @property
    def headline(self) -> str: ...
    def logits(self, raw: Tensor) -> Mapping[str, Tensor]:
        """Images [B,C,H,W] in the scenes' units to float logits [B,K,H,W] by the name of the net."""
        ...


@dataclass(frozen=True)
class Outputs:
    """The files written for one scene, None where not asked for, and how long it took."""

    classes: Path
    probabilities: Path | None
    entropy: Path | None
    disagreement: Path | None
    polygons: Path | None
    pixels: int
    seconds: float

    @property
    def files(self) -> list[Path]:
        """The files that there are."""
        found = (self.classes, self.probabilities, self.entropy, self.disagreement, self.polygons)
        return [path for path in found if path is not None]

    @property
    def pixels_per_s(self) -> float:
        """Scene pixels a second from opening the scene to the last rename."""
        return self.pixels / self.seconds


def predict_scene(
    model: SceneModel,
    scene: Path,
    out: Path,
    *,
    net: str | None = None,
    overlap: float = 0.25,
    batch: int = 8,
    device: torch.device | str = "cpu",
    tta: bool = False,
    probabilities: bool = False,
    entropy: bool = False,
    disagreement: bool = False,
    polygons: PolygonOptions | None = None,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    source: Source | None = None,
    record: Record | None = None,
    share: Share | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Predict ``scene`` and write its maps into the folder ``out``, all of them whole or none.

    Windows of ``model.tile_size`` cover every pixel; their softmax probabilities are blended by a raised cosine and the
    class is the argmax of the blend. Memory grows with the scene's width, not with its height.

    Written beside each other, cloud-optimised, on the scene's own grid (same CRS, same transform to the last bit):
        STEM_classes.tif: uint8 class ids with colour table and class names, 255 = no data; STEM_classes.qml: legend.
        STEM_probabilities.tif: uint8 [K], round(250 p) with the scale 1/250 stored in the file, 255 = no data.
        STEM_entropy.tif: float32, entropy of the blended probabilities in nats, NaN = no data.
        STEM_disagreement.tif: uint8, round(250 d) with the scale 1/250, 255 = no data; d is the blended total variation
            distance of both students' probabilities: 0 where they say the same, 1 where they exclude each other.
        STEM_polygons.gpkg, STEM_polygons.qml: the map as polygons; see :class:`dctc.mapping.polygons.PolygonWriter`.

    Args:
        model: already on ``device``.
        net: which of the model's nets; its headline by default.
        overlap: share of a window's side that neighbours have in common, at least; 0 to 0.9.
        batch: windows in one forward pass.
        tta: average the probabilities over the eight flips and quarter turns of each window.
        bands: which bands of the scene (from 1) are the model's; see :class:`dctc.mapping.raster.Scene`.
        nodata: value of pixels without data (in all bands), for scenes that do not say so themselves.
        source: an open reader of the scene's pixels in place of the file's own, as the model wants them; ``scene``
            then only names the maps, ``bands`` and ``nodata`` are not asked.
        record: written last, so that it stands beside finished maps only.
        share: what this process predicts where several share a scene; all of it by default. The files are there when
            the process that leads returns.
        progress: called with (pixels done, pixels in all) after each batch.

    Raises:
        InputError: scene and model do not fit, a damaged scene, an unwritable folder, a bad option, an unknown net, or
            predictions that are not finite. Nothing is left behind.
    """
    began = time.perf_counter()
    if batch < 1:
        raise InputError(f"batch {batch}: at least one window must be predicted at a time")
    with (
        rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES),
        torch.inference_mode(),
        nullcontext(source) if source else Scene(scene, model.bands, model.dtype, bands, nodata) as pixels,
    ):
        grid = Grid.over(pixels.height, pixels.width, model.tile_size, overlap)
        kinds = {"probabilities": probabilities, "entropy": entropy, "disagreement": disagreement}
        layers = _layers(model.classes, kinds)
        forward = _Forward(model, net, torch.device(device), tta, disagreement)
        make_folder(out)
        drafts: dict[str, Callable[[], Draft]] = {
            kind: partial(RowWriter, out / f"{scene.stem}_{kind}.tif", pixels, layer) for kind, layer in layers.items()
        }
        if polygons is not None:
            drafts["polygons"] = partial(
                PolygonWriter, out / f"{scene.stem}_polygons.gpkg", pixels, model.classes, polygons
            )
        finals = {kind: out / f"{scene.stem}_{kind}.{'gpkg' if kind == 'polygons' else 'tif'}" for kind in drafts}
        first, last = partial(Record.forget, out, scene), partial(_finish, finals, model.classes, record)
        share = share or Whole()
        maps = MapSet(drafts, first, last) if share.leads else Spools({kind: finals[kind] for kind in layers})
        with maps:
            render = _Renderer(maps, len(model.classes), scene)
            _sweep(pixels, grid, share.bands(len(grid.tops)), forward, render, batch, progress)
            share.exchange(maps)
    get = finals.get
    return Outputs(
        finals["classes"], get("probabilities"), get("entropy"), get("disagreement"), get("polygons"),
        grid.height * grid.width, time.perf_counter() - began,
    )  # fmt: skip


def _finish(finals: Mapping[str, Path], classes: Sequence[ClassInfo], record: Record | None) -> None:
    """Legends, and then the record that all is there."""
    write_text(finals["classes"].with_suffix(".qml"), raster_legend(classes))
    if "polygons" in finals:
        write_text(finals["polygons"].with_suffix(".qml"), polygon_legend(classes, "class_id"))
    if record is not None:
        record.write(list(finals.values()))


def _layers(classes: Sequence[ClassInfo], wanted: Mapping[str, bool]) -> dict[str, Layer]:
    if len(classes) > IGNORE:
        raise InputError(f"the model has {len(classes)} classes, a uint8 map holds at most {IGNORE} beside nodata")
    names = tuple(info.name for info in classes)
    scale = 1 / PROBABILITY_STEPS
    possible = {
        "probabilities": Layer("uint8", names, IGNORE, predictor=2, scale=scale),
        "entropy": Layer("float32", ("entropy in nats",), math.nan, predictor=3),
        "disagreement": Layer("uint8", ("disagreement of the students",), IGNORE, predictor=2, scale=scale),
    }
    layers = {kind: layer for kind, layer in possible.items() if wanted[kind]}
    return layers | {
        "classes": Layer("uint8", ("class",), IGNORE, predictor=1, palette=tuple(classes), overviews="mode")
    }


class _Forward:
    """Class probabilities of a batch of windows, and as a further channel how far the students differ."""

    def __init__(
        self, model: SceneModel, net: str | None, device: torch.device, tta: bool, disagreement: bool = False
    ) -> None:
        self.model = model
        self.net = model.headline if net is None else net
        self.device = device
        self.views = VIEWS if tta else VIEWS[:1]
        self.disagreement = disagreement
        self.channels = len(model.classes) + disagreement
        self._mean = torch.tensor(list(model.mean), dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, raw: NDArray[Any], valid: NDArray[np.bool_]) -> Tensor:
        """Raw windows [B,C,H,H] and their valid pixels [B,H,H] to float32 [B,channels,H,H] on the device."""
        images = self._to_device(raw).float()
        if not valid.all():  # what training shows for pixels without data: the band's mean, 0 after normalisation
            images = torch.where(self._to_device(valid)[:, None], images, self._mean)
        return average_views(self._probabilities, images, self.views)

    def _probabilities(self, images: Tensor) -> Tensor:
        logits = self.model.logits(images)
        if self.net not in logits:
            raise InputError(f"net {self.net!r} is not in this model: it has {', '.join(logits)}")
        probabilities = logits[self.net].float().softmax(1)
        if not self.disagreement:
            return probabilities
        if not {"s1", "s2"} <= logits.keys():
            raise InputError(f"--disagreement: this model has no two students s1 and s2, but {', '.join(logits)}")
        apart = (logits["s1"].float().softmax(1) - logits["s2"].float().softmax(1)).abs().sum(1, keepdim=True) / 2
        return torch.cat([probabilities, apart], 1)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # a pageable copy would wait for the net
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


class _Renderer:
    """Turns blended probabilities into the rows of the files."""

    def __init__(self, maps: MapSet | Spools, classes: int, scene: Path) -> None:
        self._maps = maps
        self._count = classes
        self._scene = scene

    @torch.inference_mode()
    def __call__(self, blended: Tensor, valid: NDArray[np.bool_]) -> None:
        """Append rows [channels, n, width] whose pixels outside ``valid`` [n, width] become nodata."""
        for start in range(0, len(valid), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            if not np.isfinite(blended[:, part].sum(0).cpu().numpy()[valid[part]]).all():
                raise InputError(
                    f"{self._scene}: the model's predictions are not finite; it is damaged, or diverged in training"
                )
        for kind in self._maps.kinds:
            channels = blended[self._count :] if kind == "disagreement" else blended[: self._count]
            self._maps.append(kind, self._rows(kind, channels, valid))

    def _rows(self, kind: str, channels: Tensor, valid: NDArray[np.bool_]) -> NDArray[Any]:
        """What a file holds of these rows, a few of them at a time."""
        parts = []
        for start in range(0, len(valid), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values, nodata = getattr(self, f"_{kind}")(channels[:, part])
            array: NDArray[Any] = values.cpu().numpy()
            array[:, ~valid[part]] = nodata
            parts.append(array)
        return np.concatenate(parts, axis=1)

    @staticmethod
    def _classes(blended: Tensor) -> tuple[Tensor, float]:
        return blended.argmax(0, keepdim=True).to(torch.uint8), IGNORE

    @staticmethod
    def _probabilities(blended: Tensor) -> tuple[Tensor, float]:
        return (blended * PROBABILITY_STEPS).round().clamp(0, PROBABILITY_STEPS).to(torch.uint8), IGNORE

    _polygons = _classes
    _disagreement = _probabilities

    @staticmethod
    def _entropy(blended: Tensor) -> tuple[Tensor, float]:
        return torch.special.entr(blended).sum(0, keepdim=True).clamp_min(0), math.nan


def _sweep(
    source: Source,
    grid: Grid,
    own: range,
    forward: _Forward,
    render: _Renderer,
    batch: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Predict band after band of ``own``; a thread reads the next one, another writes the one before."""
    blend = Accumulator(forward.channels, grid, forward.device)
    writing: deque[Future[None]] = deque()
    pixels = grid.height * grid.width
    windows, total = 0, len(grid.lefts) * sum(1 for _ in grid.bands(own))
    with ThreadPoolExecutor(1) as writer, closing(_read_ahead(source, grid, own)) as strips:
        for band, values, valid in strips:
            for columns in _batches(grid, valid, batch):
                raw, seen = _cut(values, grid, columns), _cut(valid, grid, columns)
                blend.add(forward(raw, seen), band, columns)
                if progress is not None:
                    progress(pixels * (windows + columns[-1] + 1) // total, pixels)
            windows += len(grid.lefts)
            if writing:  # one flushed band at a time: it is as large as the blend itself
                writing.popleft().result()
            blended = blend.flush(band)
            if band.row in own:  # those before lack what windows further up add
                writing.append(writer.submit(render, blended, valid[: band.done - band.top, : grid.width]))
            del blended
        for pending in writing:
            pending.result()
    if progress is not None:
        progress(pixels, pixels)


def _batches(grid: Grid, valid: NDArray[np.bool_], batch: int) -> Iterator[list[int]]:
    """Columns of the windows of one band that have any data, ``batch`` at a time."""
    columns = [i for i, left in enumerate(grid.lefts) if valid[:, left : left + grid.tile].any()]
    for start in range(0, len(columns), batch):
        yield columns[start : start + batch]


def _cut(strip: NDArray[Any], grid: Grid, columns: Sequence[int]) -> NDArray[Any]:
    """Windows [n, ..., tile, tile] out of a strip [..., tile, width]."""
    return np.stack([strip[..., grid.lefts[i] : grid.lefts[i] + grid.tile] for i in columns])


_Strip = tuple[Band, NDArray[Any], NDArray[np.bool_]]


def _read_ahead(source: Source, grid: Grid, own: range) -> Generator[_Strip]:
    """The strips of a scene; a thread reads the next one while the caller works on this one."""
    with ThreadPoolExecutor(1) as pool:
        strips = _strips(source, grid, own)
        coming = pool.submit(next, strips, None)
        while (strip := coming.result()) is not None:
            coming = pool.submit(next, strips, None)
            yield strip


def _strips(source: Source, grid: Grid, own: range) -> Iterator[_Strip]:
    """For each band its values [C, tile, width] and valid pixels [tile, width], padded; each row is read once."""
    values: NDArray[Any] | None = None
    valid: NDArray[np.bool_] | None = None
    bottom = 0
    for band in grid.bands(own):
        fresh_values, fresh_valid = source.read(max(bottom, band.top), band.bottom)
        if values is None or valid is None:
            values, valid = fresh_values, fresh_valid
        else:
            kept = bottom - band.top
            values = np.concatenate([values[:, values.shape[1] - kept :], fresh_values], axis=1)
            valid = np.concatenate([valid[valid.shape[0] - kept :], fresh_valid], axis=0)
        bottom = band.bottom
        yield band, reflect(values, grid.tile), reflect(valid, grid.tile)
