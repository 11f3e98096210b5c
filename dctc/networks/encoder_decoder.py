"""One encoder and one decoder as a single module: the teacher, or a supervised baseline."""

from __future__ import annotations

from torch import Tensor, nn


class EncoderDecoder(nn.Module):
    """Images [B,bands,H,W] to logits [B,classes,H,W] of the same height and width.

    A decoder with deep supervision returns several of them in training mode: a tuple whose first is the prediction.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of ``images``; the encoder pads, the decoder crops."""
        logits: Tensor | tuple[Tensor, ...] = self.decoder(self.encoder(images), images.shape[-2:])
        return logits
