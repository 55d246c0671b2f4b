"""Activation checkpointing that leaves BatchNorm's running statistics as they would be without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mcl_dist.model.batch_norm import SynchronizedBatchNorm3d
from mcl_dist.model.compiler import uncompiled


def recomputed(owner: nn.Module, function: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> Any:
    """`function(inputs)`, of whose activations only the inputs are kept; the others are computed again on the way back.

    Args:
        owner: the module whose BatchNorms `function` goes through.
        function: of no randomness.
        inputs: its only argument.
    """
    # The compiler moves running statistics once in any case, and takes no contexts; but it cannot see through exchanges
    # between ranks.
    if torch.compiler.is_compiling() and not any(isinstance(m, SynchronizedBatchNorm3d) for m in owner.modules()):
        return checkpoint(function, inputs, use_reentrant=False)
    return _statistics_held_meanwhile(owner, function, inputs)


@uncompiled
def _statistics_held_meanwhile(owner: nn.Module, function: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_held(owner)

    return checkpoint(function, inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _statistics_held(owner: nn.Module) -> Iterator[None]:
    """Let BatchNorms move copies meanwhile: without statistics to move they would save other tensors than before."""
    norms = [module for module in owner.modules() if isinstance(module, nn.BatchNorm3d)]
    held = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in held:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in held:
            setattr(norm, name, buffer)
