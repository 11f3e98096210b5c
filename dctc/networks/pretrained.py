"""The weights of a whole network of timm, as the trunk that makes its feature maps takes them.

timm makes a trunk by taking a network apart: what stood in a sequence gets a name of its own (``stages.0`` becomes
``stages_0``), or the whole network a prefix. What comes after the last feature map, the classifier above all, is left
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

RGB = 3  # bands of the images that networks are pre-trained on
_PREFIXES = ("", "model.", "body.")  # of trunks that hold the network whole
_COUNTER = "num_batches_tracked"  # of batch norms: older files lack it, and nothing here reads it


class UnfitWeights(ValueError):
    """The weights are not those of the backbone; the message is about "it", their file."""


def fit(
    trunk: Mapping[str, Tensor], whole: Mapping[str, Tensor], weights: Mapping[str, Tensor], backbone: str
) -> dict[str, Tensor]:
    """The state dict of a trunk with the values of ``weights``; raises :class:`UnfitWeights`.

    Each tensor of the trunk must be there in its shape. What depends on the bands may also be there for :data:`RGB`,
    and is then :func:`adapted`. No tensor may be there that the whole network lacks: many a network is the
    beginning of a larger one.

    Args:
        trunk: state dict for the bands in use.
        whole: state dict of the network of which the trunk is a part, for :data:`RGB`.
        weights: by the names of ``whole``; its classifier may have other classes, or be missing.
        backbone: its name, for messages.
    """
    sources = _sources(trunk, whole, backbone)
    advice = f"only the weights of timm's {backbone!r} itself fit"
    needed = [source for source in sources.values() if not source.endswith(_COUNTER)]
    if lacking := [source for source in needed if source not in weights]:
        raise UnfitWeights(
            f"it has no tensor {lacking[0]}, which backbone {backbone!r} needs ({len(lacking)} of {len(needed)} are "
            f"missing): {advice}"
        )
    fitted = dict(trunk)
    for name, source in sources.items():
        if source in weights:
            fitted[name] = _fit_one(source, trunk[name], whole[source], weights[source], backbone)
    if surplus := sorted(set(weights) - set(whole)):
        raise UnfitWeights(f"its tensor {surplus[0]} is none of backbone {backbone!r} ({len(surplus)} such): {advice}")
    return fitted


def _sources(trunk: Iterable[str], whole: Iterable[str], backbone: str) -> dict[str, str]:
    """What each tensor of a trunk is called in the whole network."""
    flat = {name.replace(".", "_"): name for name in whole}
    found: dict[str, str] = {}
    for name in trunk:
        known = [flat.get(name.removeprefix(prefix).replace(".", "_")) for prefix in _PREFIXES]
        source = next((source for source in known if source is not None), None)
        if source is None or source in found.values():
            raise UnfitWeights(
                f"no file serves backbone {backbone!r}: timm's feature maps of it have a tensor {name}, "
                "which cannot be told by its name"
            )
        found[name] = source
    return found


def _fit_one(name: str, wanted: Tensor, rgb: Tensor, given: Tensor, backbone: str) -> Tensor:
    """One tensor in the shape and type that is wanted; ``rgb`` has the shape that it has for three bands."""
    if given.is_floating_point() != wanted.is_floating_point():
        raise UnfitWeights(f"its tensor {name} is {given.dtype}, and backbone {backbone!r} needs {wanted.dtype}")
    if given.shape == wanted.shape:
        return given.detach().to(wanted.dtype)
    if given.shape != rgb.shape:
        choice = " or ".join(dict.fromkeys([str(list(wanted.shape)), str(list(rgb.shape))]))
        raise UnfitWeights(f"its tensor {name} is {list(given.shape)}, and backbone {backbone!r} needs {choice}")
    if given.dim() != 4 or given.shape[1] != RGB:
        raise UnfitWeights(
            f"its tensor {name} of {list(given.shape)} is for three bands, and only that of a convolution of the image "
            f"itself can be brought to {list(wanted.shape)}"
        )
    return adapted(given.detach(), wanted.shape[1]).to(wanted.dtype)


def adapted(weight: Tensor, bands: int) -> Tensor:
    """A convolution of three bands [O,3,kh,kw] for others [O,bands,kh,kw], float32, as timm does it.

    One band gets the sum of the three, so that grey images give what they gave. Others take the three in turn, by
    3/bands, so that bands of one value give what they gave (for 2 and 4, 5, 7 ... but nearly: the three then weigh
    unequally).
    """
    weight = weight.float()
    if bands == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [band % RGB for band in range(bands)]] * (RGB / bands)
