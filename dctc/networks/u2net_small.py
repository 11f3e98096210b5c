"""The small U2-Net of the same paper, with 64 channels everywhere: 1,148,706 parameters at width 64."""

from __future__ import annotations

from dctc.networks.rsu import Stage, U2Decoder, U2Encoder

ENCODER = tuple(Stage(depth, 16, 64) for depth in (7, 6, 5, 4, 0, 0))
DECODER = tuple(Stage(depth, 16, 64) for depth in (0, 4, 5, 6, 7))


class Encoder(U2Encoder):
    """See :class:`dctc.networks.rsu.U2Encoder`."""

    def __init__(self, bands: int, width: int, norm: str = "batch", attention: bool = False) -> None:
        super().__init__(ENCODER, bands, width, norm, attention)


class Decoder(U2Decoder):
    """See :class:`dctc.networks.rsu.U2Decoder`."""

    def __init__(self, classes: int, width: int, norm: str = "batch") -> None:
        super().__init__(DECODER, [stage.outer for stage in ENCODER], classes, width, norm)
