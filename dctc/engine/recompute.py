"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dctc.networks.block import Block


def recompute_blocks(module: nn.Module) -> int:
    """Recompute every :class:`Block` of ``module`` in its backward pass; returns how many there are.

    Values and gradients stay what they were. Call it before the module is wrapped; its state-dict keys do not change.
    """
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(  # type: ignore[method-assign]  # hooks of wrappers stay outside of what is run again
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    return len(blocks)


def _contexts(block: Block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_stay(block)


@contextmanager
def _statistics_stay(block: Block) -> Iterator[None]:
    """The second forward pass of a batch must not move the running statistics a second time."""
    layers = [layer for layer in block.modules() if isinstance(layer, _NormBase) and layer.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.sub_(1)
