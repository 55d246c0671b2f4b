"""Synchronised BatchNorm on any backend; PyTorch's SyncBatchNorm supports only GPUs."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import batch_norm

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.compiler import disable_compile

REDUCED_AXES = (0, 2, 3, 4)  # all but the channels of (B, C, T, H, W)


class SynchronizedBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` over the clips of all ranks; each rank must have equally many. Equal to it on a single rank."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Normalise (B, C, T, H, W); all ranks must call it together in training mode."""
        if self.training and ProcessGroup().size > 1:
            outputs: torch.Tensor = self._forward_synchronized(inputs)
            return outputs
        return super().forward(inputs)

    @disable_compile
    def _forward_synchronized(self, inputs: torch.Tensor) -> torch.Tensor:
        mean, variance = batch_statistics(self, inputs.detach())
        if self.track_running_stats:
            self._update_running(mean, variance, ProcessGroup().size * inputs[:, 0].numel())
        outputs: torch.Tensor = _Normalise.apply(inputs, self.weight, self.bias, mean, variance, self.eps)  # type: ignore[no-untyped-call]
        return outputs

    @torch.no_grad()
    def _update_running(self, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
        """Update the running statistics as `nn.BatchNorm3d` does: with the unbiased variance."""
        num_batches, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if num_batches is None or running_mean is None or running_var is None:
            return
        num_batches.add_(1)
        weight = 1 / num_batches.item() if self.momentum is None else self.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), weight)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), weight)


def batch_statistics(norm: nn.BatchNorm3d, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) by which `norm` normalises in training mode, at least float32, differentiable."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=REDUCED_AXES, correction=0)
    if not isinstance(norm, SynchronizedBatchNorm3d):
        return mean, variance
    global_mean = mean_over_ranks(norm, mean)
    # A rank's variance is about its own mean; about the global mean it is larger by the squared difference.
    return global_mean, mean_over_ranks(norm, variance + (mean - global_mean).square())


def mean_over_ranks(norm: nn.BatchNorm3d, values: torch.Tensor) -> torch.Tensor:
    """Mean over the ranks that `norm` normalises together, differentiable any number of times."""
    if not isinstance(norm, SynchronizedBatchNorm3d) or ProcessGroup().size == 1:
        return values
    result: torch.Tensor = _MeanOverRanks.apply(values)  # type: ignore[no-untyped-call]
    return result


class _MeanOverRanks(torch.autograd.Function):
    """Mean over ranks; the gradient is the mean over ranks too, because all ranks' losses are summed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return ProcessGroup(values.device).mean(values.contiguous())

    @staticmethod
    def backward(ctx: Any, d_mean: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        result: torch.Tensor = _MeanOverRanks.apply(d_mean)  # type: ignore[no-untyped-call]
        return result


class _Normalise(torch.autograd.Function):
    """BatchNorm with given statistics, whose gradient includes the path through the statistics on all ranks.

    PyTorch's kernels for given statistics process the activations. The term that they omit is, in every channel, a
    multiple of the input plus a constant: see METHOD.md, section 8, on dy and g.
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
        means = ProcessGroup(inputs.device).mean(torch.stack([d_bias, d_weight]))
        d_bias_mean, d_weight_mean = means / inputs[:, 0].numel()
        inverse_deviation = torch.rsqrt(variance + ctx.eps)
        scale = weight * inverse_deviation
        slope = scale * inverse_deviation * d_weight_mean
        through_statistics = torch.addcmul(per_channel(scale * d_bias_mean - mean * slope), inputs, per_channel(slope))
        return d_inputs.sub_(through_statistics), d_weight, d_bias, None, None, None


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """Reshape (C,) to broadcast with (B, C, T, H, W)."""
    return values[:, None, None, None]
