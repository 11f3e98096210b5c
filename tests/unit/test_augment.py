"""Views and CutMix: the same for a stream position whatever the batch; labels and validity go with the image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dctc.data.augment import (
    BOXES_VIEW,
    CUTMIX_VIEW,
    BoxSpec,
    Kind,
    View,
    box_masks,
    cutmix_masks,
    mix,
    partners,
    sample_keys,
)
from dctc.data.geometry import rescale
from dctc.data.order import augmentation_words
from dctc.data.photometry import distort

IGNORE = 255
KINDS: list[Kind] = ["none", "flips", "weak", "strong"]


def batch(count: int, size: int = 32, bands: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images that carry their labels: band 0 is the label as a number; some pixels are not valid."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 6, (count, size // 8, size // 8), generator=generator)
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    valid = torch.rand(count, size, size, generator=generator) > 0.1
    images = torch.randn(count, bands, size, size, generator=generator)
    images[:, 0] = labels.float()
    images = torch.where(valid[:, None], images, 0.0)
    return images, valid, torch.where(valid, labels, IGNORE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bands", [1, 3, 8])
def test_a_sample_does_not_depend_on_its_batch(kind: Kind, bands: int) -> None:
    images, valid, labels = batch(12, bands=bands)
    positions = torch.arange(100, 112)
    view = View(kind, seed=7, stream=1)
    together = view(images, valid, labels, positions)
    for part in (slice(0, 1), slice(3, 8), torch.tensor([11, 2, 7])):
        alone = view(images[part], valid[part], labels[part], positions[part])
        for whole, piece in zip(together, alone, strict=True):
            assert whole is not None
            assert piece is not None
            assert torch.equal(whole[part], piece)


def test_none_changes_nothing_and_others_do() -> None:
    images, valid, labels = batch(8)
    positions = torch.arange(8)
    same = View("none", 0, 0)(images, valid, labels, positions)
    assert same[0] is images
    seen = [View(kind, 0, 0)(images, valid, labels, positions)[0] for kind in KINDS]
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[k + 1 :])
    assert not torch.equal(View("weak", 1, 0)(images, valid, labels, positions)[0], seen[2]), "the seed counts"
    assert not torch.equal(View("weak", 0, 1)(images, valid, labels, positions)[0], seen[2]), "the stream counts"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), size=st.sampled_from([32, 64, 96]))
def test_labels_follow_the_image(seed: int, size: int) -> None:
    """Band 0 is the label; away from borders, where it is interpolated, it still is after scaling and turning."""
    images, valid, labels = batch(4, size, seed=seed)
    moved, seen, truth = View("weak", seed, 0)(images, valid, labels, torch.arange(4))
    assert truth is not None
    assert ((truth == IGNORE) == ~seen).all(), "valid pixels keep labels, others are ignored"
    assert (moved[~seen[:, None].expand_as(moved)] == 0).all()
    flat = torch.nn.functional.max_pool2d(truth[:, None].float(), 5, 1, 2) == -torch.nn.functional.max_pool2d(
        -truth[:, None].float(), 5, 1, 2
    )
    inside = flat[:, 0] & seen
    inside[:, :3] = inside[:, -3:] = inside[..., :3] = inside[..., -3:] = False  # the next pixel is not in sight there
    assert inside.any()
    assert torch.allclose(moved[:, 0][inside], truth[inside].float(), atol=1e-3)


def test_a_scale_of_one_and_of_two_by_hand() -> None:
    images, valid, labels = batch(2, 16)
    same = rescale(images, valid, labels, np.ones(2), np.full((2, 2), 0.3))
    assert torch.allclose(same[0], images, atol=1e-5)
    assert torch.equal(same[1], valid)
    assert same[2] is not None
    assert torch.equal(same[2], labels)
    corner = rescale(images, valid, labels, np.full(2, 2.0), np.zeros((2, 2)))
    assert corner[2] is not None
    assert torch.equal(corner[2], labels[:, :8, :8].repeat_interleave(2, 1).repeat_interleave(2, 2))
    small = rescale(images, valid, None, np.full(2, 0.5), np.zeros((2, 2)))
    assert small[2] is None
    assert not small[1][:, 8:].any()
    assert not small[1][:, :, 8:].any()


def test_scales_are_spread_over_the_whole_range() -> None:
    ones = torch.ones(400, 1, 8, 8)
    seen = View("weak", 3, 0)(ones, torch.ones(400, 8, 8, dtype=torch.bool), None, torch.arange(400))[1]
    share = seen.float().mean(dim=(1, 2))
    assert 0.4 < (share < 1).float().mean() < 0.6, "half of the scales shrink the picture"
    assert share.min() <= 0.3


def test_strong_views_differ_by_number_and_share_a_geometry() -> None:
    images, valid, labels = batch(6, 64)
    positions = torch.arange(6)
    weak = View("weak", 0, 1, number=0)
    first, second = (View("strong", 0, 1, number=k, geometry=0) for k in (1, 2))
    _, seen, truth = weak(images, valid, labels, positions)
    (a, valid_a, truth_a), (b, valid_b, _) = (view(images, valid, labels, positions) for view in (first, second))
    assert not torch.equal(a, b)
    assert truth is not None
    assert truth_a is not None
    assert torch.equal(truth_a[valid_a], truth[valid_a])
    assert (valid_a <= seen).all()
    assert (valid_b <= seen).all()
    assert (truth_a[~valid_a] == IGNORE).all()


def test_photometry_is_finite_moderate_and_keeps_what_is_not_valid_at_zero() -> None:
    images, valid, _ = batch(64, 32, bands=5)
    valid[0] = False
    images[0] = 0
    strong, seen = View("strong", 0, 0).colour(images, valid, torch.arange(64))
    assert strong.isfinite().all()
    assert (strong[~seen[:, None].expand_as(strong)] == 0).all()
    cut = (valid & ~seen).flatten(1).any(dim=1).float().mean()
    assert 0.25 < cut < 0.7, "about half of the samples lose a box"
    assert (valid & ~seen).float().mean() < 0.25
    assert strong.abs().max() < 100
    assert not torch.equal(strong[1], images[1])


def lowbias32(counter: int, key: int) -> float:
    """A number in [0, 1) for a counter and a key, in Python's own integers."""
    x = (counter * 0x9E3779B1 + key) % 2**32
    for multiplier, shift in ((0x7FEB352D, 16), (0x846CA68B, 15)):
        x = ((x ^ (x >> shift)) * multiplier) % 2**32
    return (x ^ (x >> 16)) / 2**32


@pytest.mark.parametrize("amount", [0.0, 0.25, 1.0])
def test_the_amount_of_photometry_scales_each_of_its_parts(amount: float) -> None:
    """The formulas of the module, by Python's floats; the sample's words leave out blur, noise and box."""
    u = [0.9, 0.2, 0.8, *[0.99] * 9]
    words = (np.array([u]) * 2**53).astype(np.uint64) << np.uint64(11)
    key = int(words[0, -2] >> np.uint64(32))
    pixels = [-2.0, -0.5, 0.0, 0.7]
    image = torch.tensor(pixels).reshape(1, 1, 2, 2).repeat(1, 2, 1, 1)
    shown, seen = distort(image, torch.ones(1, 2, 2, dtype=torch.bool), words, amount)
    assert seen.all()
    for band in (0, 1):
        gain, offset = (lowbias32(2 * kind + band, key) for kind in (0, 1))
        for pixel, value in zip(pixels, shown[0, band].flatten().tolist(), strict=True):
            x = pixel * (1 + amount * (0.8 * u[0] - 0.4)) + amount * (u[1] - 0.5)
            x = math.copysign(abs(x) ** ((0.7 * 2 ** u[2]) ** amount), x)
            x = x * (1 + amount * (0.4 * gain - 0.2)) + 0.4 * amount * (offset - 0.5)
            assert value == pytest.approx(x, abs=1e-5)


def test_no_photometry_leaves_the_tiles_alone_and_more_of_it_changes_more() -> None:
    images, valid, _ = batch(32, 64, bands=3)
    positions = torch.arange(32)
    changes, lost = [], []
    for amount in (0.0, 0.3, 0.6, 1.0):
        shown, seen = View("strong", 0, 0, photometry=amount).colour(images, valid, positions)
        apart = ((shown - images).abs() * seen[:, None]).flatten(1).sum(dim=1) / seen.flatten(1).sum(dim=1)
        changes.append(float(apart.mean()))
        lost.append(float((valid & ~seen).float().mean()))
    assert changes[0] < 1e-5
    assert lost[0] == 0
    assert changes == sorted(changes)
    assert lost == sorted(lost)
    assert lost[2] > 0
    assert changes[1] > 0.02


def test_blur_takes_nothing_from_pixels_without_data() -> None:
    """What is the same in all valid pixels is still so in what is valid afterwards, but for the noise."""
    valid = torch.rand(64, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.3
    images = torch.where(valid[:, None], 5.0, 0.0)
    strong, seen = View("strong", 0, 0).colour(images, valid, torch.arange(64))
    spread = [float(sample[0][mask].std()) for sample, mask in zip(strong, seen, strict=True)]
    assert max(spread) < 0.15, "the noise has a deviation of 0.1 at most"


@pytest.mark.parametrize("size", [37, 64, 127])
def test_strong_is_the_same_for_any_threads_and_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    valid = torch.rand(6, size, size, generator=generator) > 0.1
    images = torch.where(valid[:, None], torch.randn(6, 3, size, size, generator=generator), 0.0)
    positions, view = torch.arange(6), View("strong", 0, 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = view.colour(images, valid, positions)[0]
        for threads in (2, 5, 6, 7):
            torch.set_num_threads(threads)
            assert torch.equal(one, view.colour(images, valid, positions)[0])
            for sample in range(6):
                part = slice(sample, sample + 1)
                assert torch.equal(one[part], view.colour(images[part], valid[part], positions[part])[0])
    finally:
        torch.set_num_threads(before)


# ---- CutMix


def test_boxes_against_the_formula() -> None:
    positions, rows = torch.arange(10, 20), torch.arange(10)
    masks = cutmix_masks(5, 0, positions, rows, 40, torch.device("cpu"))
    words = augmentation_words(5, 0, positions.numpy(), 3, CUTMIX_VIEW)
    for sample in range(10):
        u = [int(word) // 2**11 / 2**53 for word in words[sample]]
        side = int(40 * u[0] ** 0.5)
        top, left = int(u[1] * (40 - side + 1)), int(u[2] * (40 - side + 1))
        expected = np.zeros((40, 40), dtype=bool)
        expected[top : top + side, left : left + side] = True
        assert np.array_equal(masks[sample].numpy(), expected)


def test_partners_are_the_other_one_of_a_pair() -> None:
    assert partners(6, torch.device("cpu")).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(ValueError, match="3 is odd"):
        partners(3, torch.device("cpu"))


def test_a_tile_is_never_mixed_with_itself() -> None:
    masks = cutmix_masks(0, 1, torch.arange(6), torch.tensor([4, 4, 1, 2, 9, 9]), 16, torch.device("cpu"))
    assert not masks[[0, 1, 4, 5]].any()
    assert masks[[2, 3]].any()


def test_the_area_is_uniform() -> None:
    masks = cutmix_masks(0, 0, torch.arange(2000), torch.arange(2000), 64, torch.device("cpu"))
    area = masks.float().mean(dim=(1, 2))
    assert abs(float(area.mean()) - 0.5) < 0.03
    assert abs(float((area < 0.25).float().mean()) - 0.25) < 0.04


def test_mixing_takes_the_partner_inside_the_box() -> None:
    images, valid, labels = batch(4, 16)
    rows = torch.arange(4)
    masks, other = cutmix_masks(1, 0, rows, rows, 16, torch.device("cpu")), partners(4, torch.device("cpu"))
    for tensor in (images, valid, labels, torch.rand(4, 6, 16, 16)):
        mixed = mix(tensor, masks, other)
        for sample in range(4):
            box = masks[sample].expand_as(tensor[sample])
            assert torch.equal(mixed[sample][box], tensor[sample ^ 1][box])
            assert torch.equal(mixed[sample][~box], tensor[sample][~box])


# ---- boxes of a method


CPU = torch.device("cpu")


def test_several_boxes_against_the_formula() -> None:
    positions, rows = torch.arange(10, 20), torch.arange(10)
    masks = box_masks(BoxSpec(3, 0.25, 0.5), (5, 1, 1), positions, rows, 40, CPU)
    words = augmentation_words(5, 1, positions.numpy(), 10, BOXES_VIEW + 1)
    for sample in range(10):
        u = [int(word) // 2**11 / 2**53 for word in words[sample]]
        area = (0.25 + 0.25 * u[0]) / 3
        expected = np.zeros((40, 40), dtype=bool)
        for box in range(3):
            height, width = round(40 * area ** u[1 + box]), round(40 * area ** (1 - u[1 + box]))
            top, left = int(u[4 + 2 * box] * (40 - height + 1)), int(u[5 + 2 * box] * (40 - width + 1))
            expected[top : top + height, left : left + width] = True
        assert np.array_equal(masks[sample].numpy(), expected)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 5),
    ends=st.tuples(st.floats(0.0625, 1), st.floats(0.0625, 1)).map(sorted),
    size=st.sampled_from([16, 33, 64]),
)
def test_boxes_cover_no_more_than_they_may(count: int, ends: list[float], size: int) -> None:
    """Less where they overlap, and up to half a pixel more a side by rounding."""
    spec, rows = BoxSpec(count, *ends), torch.arange(40)
    masks = box_masks(spec, (0, 1, 0), rows, rows, size, CPU)
    share = masks.float().mean(dim=(1, 2))
    assert float(share.max()) <= ends[1] + count * 1.5 / size
    assert float(share.max()) > 0
    alone = box_masks(spec, (0, 1, 0), rows[6:8], rows[6:8], size, CPU)
    assert torch.equal(alone, masks[6:8]), "a sample's boxes do not depend on its batch"
    other = box_masks(spec, (0, 1, 1), rows, rows, size, CPU)
    assert masks.all() or not torch.equal(other, masks), (
        "each view has its own"
    )  # a box of the whole tile has one place


def test_boxes_by_chance() -> None:
    """Half of the tiles have theirs, of areas that are spread as if each had."""
    rows = torch.arange(400)
    some = box_masks(BoxSpec(1, 0.1, 0.4, chance=0.5), (0, 1, 0), rows, rows, 40, CPU).float().mean((1, 2))
    assert abs(float((some > 0).float().mean()) - 0.5) < 0.08
    areas = some[some > 0]
    assert 0.08 < float(areas.min()) < 0.12
    assert 0.38 < float(areas.max()) < 0.42
    assert abs(float(areas.mean()) - 0.25) < 0.02
    first = augmentation_words(0, 1, rows.numpy(), 1, BOXES_VIEW)[:, 0].astype(np.float64) / 2**64
    assert np.array_equal(some.numpy() > 0, first < 0.5)


def test_keys_are_a_samples_own() -> None:
    positions = torch.tensor([7, 8, 10**12])
    keys = sample_keys(3, 1, positions)
    assert len(set(keys)) == 3
    assert all(0 <= key < 2**63 for key in keys)
    assert sample_keys(3, 1, positions[1:]) == keys[1:]
    assert not set(keys) & set(sample_keys(3, 0, positions)) | set(keys) & set(sample_keys(4, 1, positions))


def test_boxes_never_mix_a_tile_with_itself() -> None:
    rows = torch.tensor([4, 4, 1, 2, 9, 9])
    masks = box_masks(BoxSpec(3, 0.25, 0.5), (0, 1, 0), torch.arange(6), rows, 16, CPU)
    assert not masks[[0, 1, 4, 5]].any()
    assert masks[[2, 3]].flatten(1).any(dim=1).all()


def test_noise_changes_nothing_else_and_is_a_samples_own() -> None:
    images, valid, labels = batch(6)
    positions = torch.arange(6)
    first, seen, kept = View("noise", 0, 1, 1)(images, valid, labels, positions)
    assert torch.equal(seen, valid)
    assert kept is labels
    apart = (first - images)[valid[:, None].expand_as(images)]
    assert abs(float(apart.std()) - 0.15) < 0.01
    assert abs(float(apart.mean())) < 0.01
    assert not first[~valid[:, None].expand_as(images)].any()
    second = View("noise", 0, 1, 2)(images, valid, labels, positions)[0]
    others = (second - images)[valid[:, None].expand_as(images)]
    assert abs(float(torch.corrcoef(torch.stack([apart, others]))[0, 1])) < 0.05
    alone = View("noise", 0, 1, 1)(images[2:4], valid[2:4], labels[2:4], positions[2:4])[0]
    assert torch.equal(alone, first[2:4])
