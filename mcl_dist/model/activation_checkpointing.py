"""Activation checkpointing that updates BatchNorm's running statistics only once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mcl_dist.model.batch_norm import SynchronizedBatchNorm3d
from mcl_dist.model.compiler import disable_compile


def checkpoint_activations(module: nn.Module, function: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> Any:
    """`function(inputs)` that keeps only its inputs for the backward, which computes the other activations again.

    Args:
        module: contains the BatchNorms that `function` uses.
        function: deterministic.
        inputs: its only argument.
    """
    # Compiled, the statistics are updated once in any case, and contexts are not supported; but the compiler cannot
    # trace collectives between ranks.
    if torch.compiler.is_compiling() and not any(isinstance(m, SynchronizedBatchNorm3d) for m in module.modules()):
        return checkpoint(function, inputs, use_reentrant=False)
    return _checkpoint_eagerly(module, function, inputs)


@disable_compile
def _checkpoint_eagerly(module: nn.Module, function: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_restored(module)

    return checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _statistics_restored(module: nn.Module) -> Iterator[None]:
    """Let BatchNorms update copies: without statistics to update, they would save other tensors than in the forward."""
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm3d)]
    originals = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in originals:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in originals:
            setattr(norm, name, buffer)
