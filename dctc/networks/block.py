"""The unit in which the engine recomputes and shards a network."""

from __future__ import annotations

from torch import nn


class Block(nn.Sequential):
    """Layers whose activations are recomputed together and whose weights are gathered together.

    A network that uses it for its heavy stages needs to know nothing else of activation checkpointing or FSDP2.
    """
