"""U2-Net in two halves (Qin et al., 2020): 44,079,234 parameters at width 64 with 3 bands and 6 classes."""

from __future__ import annotations

from dctc.networks.rsu import Stage, U2Decoder, U2Encoder

ENCODER = (
    Stage(7, 32, 64),
    Stage(6, 32, 128),
    Stage(5, 64, 256),
    Stage(4, 128, 512),
    Stage(0, 256, 512),
    Stage(0, 256, 512),
)
DECODER = (Stage(0, 256, 512), Stage(4, 128, 256), Stage(5, 64, 128), Stage(6, 32, 64), Stage(7, 16, 64))


class Encoder(U2Encoder):
    """See :class:`dctc.networks.rsu.U2Encoder`."""

    def __init__(self, bands: int, width: int, norm: str = "batch", attention: bool = False) -> None:
        super().__init__(ENCODER, bands, width, norm, attention)


class Decoder(U2Decoder):
    """See :class:`dctc.networks.rsu.U2Decoder`."""

    def __init__(self, classes: int, width: int, norm: str = "batch") -> None:
        super().__init__(DECODER, [stage.outer for stage in ENCODER], classes, width, norm)
