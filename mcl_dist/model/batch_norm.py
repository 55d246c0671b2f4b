"""BatchNorm whose statistics are those of all ranks' clips, on any backend.

PyTorch's own SyncBatchNorm runs on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.compiler import uncompiled

AXES = (0, 2, 3, 4)  # all but the channels of (B, C, T, H, W)


class SynchronizedBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` over the clips of all ranks, which must be as many on each; alone, it is just that."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, T, H, W); in training mode all ranks must call it together."""
        if self.training and ProcessGroup().size > 1:
            outputs: torch.Tensor = self._over_ranks(inputs)
            return outputs
        return super().forward(inputs)

    @uncompiled
    def _over_ranks(self, inputs: torch.Tensor) -> torch.Tensor:
        mean, variance = statistics(self, inputs.detach())
        if self.track_running_stats:
            self._track(mean, variance, ProcessGroup().size * inputs[:, 0].numel())
        outputs: torch.Tensor = _Normalise.apply(inputs, self.weight, self.bias, mean, variance, self.eps)  # type: ignore[no-untyped-call]
        return outputs

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Move the running statistics as `nn.BatchNorm3d` does, the variance without bias."""
        tracked, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if tracked is None or running_mean is None or running_var is None:
            return
        tracked.add_(1)
        share = 1 / tracked.item() if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), share)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), share)


def statistics(norm: nn.BatchNorm3d, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) that `norm` sees in training mode, in float32 or wider, differentiable."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=AXES, correction=0)
    if not isinstance(norm, SynchronizedBatchNorm3d):
        return mean, variance
    mean_of_all = mean_over_ranks(norm, mean)
    # A rank's variance is about its own mean; about the mean of all it is larger by the difference squared.
    return mean_of_all, mean_over_ranks(norm, variance + (mean - mean_of_all).square())


def mean_over_ranks(norm: nn.BatchNorm3d, values: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks that `norm` looks at, differentiable any number of times; over its own, nothing changes."""
    if not isinstance(norm, SynchronizedBatchNorm3d) or ProcessGroup().size == 1:
        return values
    result: torch.Tensor = _MeanOverRanks.apply(values)  # type: ignore[no-untyped-call]
    return result


class _MeanOverRanks(torch.autograd.Function):
    """All ranks' losses are summed: each sends its gradient to all, and the mean of these comes back."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return ProcessGroup(values.device).mean(values.contiguous())

    @staticmethod
    def backward(ctx: Any, d_mean: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        result: torch.Tensor = _MeanOverRanks.apply(d_mean)  # type: ignore[no-untyped-call]
        return result


class _Normalise(torch.autograd.Function):
    """BatchNorm with statistics given, whose gradient takes account of their coming from all ranks' inputs.

    PyTorch's kernels for given statistics do the pass over the activations; what they leave out is, in every channel, a
    multiple of the input and a constant: see METHOD.md, section 8, on dy and g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight, mean, variance)
        ctx.eps = eps
        return batch_norm(inputs, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, mean, variance = ctx.saved_tensors
        d_inputs, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            d_outputs, inputs, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        of_all = ProcessGroup(inputs.device).mean(torch.stack([d_bias, d_weight])) / inputs[:, 0].numel()
        inverse_deviation = torch.rsqrt(variance + ctx.eps)
        scale = weight * inverse_deviation
        slope = scale * inverse_deviation * of_all[1]
        shared = torch.addcmul(per_channel(scale * of_all[0] - mean * slope), inputs, per_channel(slope))
        return d_inputs.sub_(shared), d_weight, d_bias, None, None, None


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """(C,) shaped to go with (B, C, T, H, W)."""
    return values[:, None, None, None]
