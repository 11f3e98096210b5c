"""Labels on another grid than their images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

from shards.errors import InputError
from shards.pack import Packed
from tests.data import layouts
from tests.data.own import TWO, generic, labels, packed_from
from tests.data.real import fates

PLACE = Affine(2.0, 0, 500000.0, 0, -2.0, 5300000.0)
UTM = {"crs": "EPSG:32632", "transform": PLACE}
IDS: dict[str, Any] = {"kind": "ids", "pattern": r"labels/(?P<scene>[^/]+)\.tif"}
PALETTE: dict[str, Any] = {"kind": "palette", "pattern": r"labels/(?P<scene>[^/]+)\.tif"}


def packed(tmp_path: Path, label: dict[str, Any], out: str = "") -> Packed:
    return packed_from(generic(label=label), tmp_path / "in", tmp_path / out)


def write_scene(tmp_path: Path, ids: Any, **options: Any) -> None:
    layouts.write_tiff(tmp_path / "in/images/x.tif", layouts.random_image(3, 64, 64, 0), **UTM)
    layouts.write_tiff(tmp_path / "in/labels/x.tif", ids if ids.ndim == 3 else ids[None], **(UTM | options))


@pytest.mark.parametrize(
    ("crs", "transform", "said"),
    [
        ("EPSG:25832", PLACE, None),  # the same places by another name
        ("EPSG:32632", PLACE @ Affine.translation(0.4, 0), None),
        ("EPSG:32632", PLACE @ Affine.translation(0.6, 0), "by 0.60 pixels"),
        ("EPSG:32633", PLACE, "georeference disagrees"),
        ("EPSG:3857", PLACE, "georeference disagrees"),
    ],
)
def test_grids_are_compared_in_the_crs_of_the_image(
    tmp_path: Path, crs: str, transform: Affine, said: str | None
) -> None:
    ids = layouts.random_ids(2, 64, 64, 0)
    write_scene(tmp_path, ids, crs=crs, transform=transform)
    if said is None:
        assert np.array_equal(labels(packed(tmp_path, IDS), 64, 64)["x"], ids)
        return
    with pytest.raises(InputError, match=said) as caught:
        packed(tmp_path, IDS)
    assert "label.resampling" in str(caught.value)
    lenient = packed(tmp_path, IDS | {"check_grid": False}, "lenient")
    assert np.array_equal(labels(lenient, 64, 64)["x"], ids)


@pytest.mark.parametrize("method", ["nearest", "mode"])
@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:32631"])
def test_ids_warped_onto_the_image(tmp_path: Path, method: str, crs: str) -> None:
    """A finer label, of the same or of the next zone, that covers a part of the image."""
    ids = layouts.random_ids(2, 150, 120, 0)
    ids[40:50, 40:50] = 9
    transform = PLACE @ Affine.translation(4, 6) @ Affine.scale(0.5)
    if crs == "EPSG:32631":
        transform = Affine(1.0, 0, 948790.0, 0, -1.0, 5317430.0)
    write_scene(tmp_path, ids, crs=crs, transform=transform, nodata=9)
    with pytest.raises(InputError, match=r"labels/x\.tif: label of 120 x 150 pixels"):
        packed(tmp_path, IDS)
    got = packed(tmp_path, IDS | {"resampling": method}, "warped")
    truth = np.full((64, 64), 255, dtype=np.uint8)
    reproject(
        ids,
        truth,
        src_transform=transform,
        src_crs=crs,
        dst_transform=PLACE,
        dst_crs="EPSG:32632",
        src_nodata=9,
        dst_nodata=255,
        resampling=Resampling[method],
        tolerance=1e-9,
    )
    assert 0.1 < (truth == 255).mean() < 0.9
    assert np.array_equal(labels(got, 64, 64)["x"], truth)
    assert fates(got) == {"label_nodata": int((truth == 255).sum())}


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_warped_onto_the_image(tmp_path: Path, alpha: bool) -> None:
    ids = layouts.random_ids(2, 32, 32, 0)
    colors = layouts.colored(ids, TWO)
    if alpha:
        opaque = np.full((1, 32, 32), 255, dtype=np.uint8)
        opaque[:, :4] = 0
        colors = np.concatenate([colors, opaque])
    options = {"photometric": "RGB"} | ({"alpha": "YES"} if alpha else {})
    write_scene(tmp_path, colors, transform=PLACE @ Affine.scale(2), **options)
    got = packed(tmp_path, PALETTE | {"resampling": "nearest"})
    truth = np.kron(ids, np.ones((2, 2), dtype=np.uint8))
    truth[:8] = 255 if alpha else truth[:8]
    assert np.array_equal(labels(got, 64, 64)["x"], truth)
    assert fates(got) == ({"label_nodata": 8 * 64} if alpha else {})


def test_a_label_without_georeference_cannot_be_warped(tmp_path: Path) -> None:
    write_scene(tmp_path, layouts.random_ids(2, 32, 32, 0), transform=Affine.identity(), crs=None)
    with pytest.raises(InputError, match=r"labels/x\.tif: cannot be resampled onto its image's grid"):
        packed(tmp_path, IDS | {"resampling": "nearest"})
