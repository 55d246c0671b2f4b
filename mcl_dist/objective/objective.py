"""MCL's objective: the loss of a query batch and its keys, as one module (METHOD.md, section 4)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import torch

from mcl_dist.config import choice, number
from mcl_dist.errors import ConfigError
from mcl_dist.model.network import LossModule, Network
from mcl_dist.objective.alignment import align, alignment_map, automatic_gradient, similarity_gradient
from mcl_dist.objective.losses import inter_loss, intra_loss, key_similarities, order_loss
from mcl_dist.objective.momentum_encoder import Keys
from mcl_dist.objective.negative_queue import NegativeQueue


@dataclass(frozen=True)
class ObjectiveConfig:
    """Parameters of the losses; the defaults are METHOD.md's.

    Attributes:
        temperature: τ of the inter and intra losses.
        queue: K, number of negatives.
        negatives: `sharded` keeps K/W of them on each of W ranks, `replicated` all on every rank; equal results.
        fill_queue: start with keys of the initial encoder: the loss starts at the level of guessing and falls. Else
            start with random directions, which are easily distinguished from keys until keys replace them.
        momentum: of the key encoder's moving average, at the start.
        momentum_schedule: `constant`, or `cosine` towards 1 at the end of the run.
        alignment_layer: layer of the encoder whose output the alignment loss uses, such as `layer4.1.conv3`, by
            differentiating twice; None for the method's layer, the last convolution, in closed form.
        intra, alignment: weights of the two terms; 0 removes a term from the total.
        order: weight of the order term: `ramp` is epoch/epochs, from 1/epochs to 1 (UCF101); `none` is 0 (Kinetics).
    """

    temperature: float = number(0.1, minimum=1e-3)
    queue: int = number(131072, minimum=1)
    negatives: str = choice("sharded", "replicated")
    fill_queue: bool = False
    momentum: float = number(0.999, minimum=0, maximum=1)
    momentum_schedule: str = choice("constant", "cosine")
    alignment_layer: str | None = None
    intra: float = number(1.0, minimum=0)
    alignment: float = number(1.0, minimum=0)
    order: str = choice("none", "ramp")


class LossWeights(NamedTuple):
    """Weights of the terms at one step; inter has weight 1."""

    intra: float
    alignment: float
    order: float


class Objective(LossModule):
    """The query network with its losses; keys and queue are inputs and constants.

    Attributes:
        report: the total, each term before weighting, the mean similarity to positives and to negatives, and the
            alignment's spatio-temporal similarity.
    """

    network: Network

    def __init__(
        self, network: Network, *, temperature: float, autocast: bool = False, alignment_layer: str | None = None
    ) -> None:
        """Losses of a network; `alignment_layer` is `ObjectiveConfig.alignment_layer`.

        Raises:
            ConfigError: the encoder has no such layer, or its BatchNorm cannot be differentiated twice.
        """
        super().__init__(network)
        if alignment_layer is not None:
            _check_layer(network, alignment_layer)
        self._layer = alignment_layer
        self._temperature = temperature
        self._autocast = autocast

    def forward(
        self,
        clips_bcthw: torch.Tensor,
        keys: Keys,
        queue: NegativeQueue,
        motion_bthw: torch.Tensor,
        order: torch.Tensor,
        weights: LossWeights,
    ) -> torch.Tensor:
        """Sum of the losses, weighted by the `weights` of this step.

        Args:
            clips_bcthw: normalised query clips, (B, 3, T, H, W).
            keys: of the same videos.
            queue: K negatives, without these keys.
            motion_bthw: motion targets of the alignment, (B, T', H', W').
            order: order labels, int64 (B,).
        """
        with (
            torch.autocast(clips_bcthw.device.type, torch.bfloat16, enabled=self._autocast),
            _captured_outputs(self.network, self._layer) as activations,
        ):
            output = self.network(clips_bcthw)
        query = output.inter.vector
        similarities = key_similarities(query, keys.inter)
        inter = inter_loss(similarities, queue.log_sum_exp(query, self._temperature), self._temperature)
        intra = intra_loss(key_similarities(output.intra.vector, keys.intra), self._temperature)
        if self._layer is None:
            gradient = similarity_gradient(self.network, output, keys.inter[0])
        else:
            gradient = automatic_gradient(output, keys.inter[0], activations[0])
        alignment = align(alignment_map(gradient), motion_bthw.to(gradient.dtype))
        _, second, third = keys.order
        order_term = order_loss(self.network.order_classifier, output.order.vector, second, third, order)
        total = inter + weights.intra * intra + weights.alignment * alignment.loss + weights.order * order_term
        self.report = {
            name: value.detach()
            for name, value in {
                "loss": total,
                "loss_inter": inter,
                "loss_intra": intra,
                "loss_alignment": alignment.loss,
                "loss_order": order_term,
                "similarity_positive": similarities.mean(),
                "similarity_negative": (query.detach() @ queue.mean().to(query.dtype)).mean(),
                "similarity_alignment": alignment.spatiotemporal.mean(),
            }.items()
        }
        return total


def _check_layer(network: Network, layer: str) -> None:
    known = [name for name, _ in network.encoder.named_modules() if name]
    if layer not in known:
        close = ", ".join(get_close_matches(layer, known)) or known[-1]
        raise ConfigError(f"objective.alignment_layer: the encoder has no layer `{layer}`; similar names: {close}")
    if network.encoder.config.batch_norm == "synchronized":
        raise ConfigError(
            "objective.alignment_layer: synchronized BatchNorm cannot be differentiated twice; "
            "remove the setting, or choose another encoder.batch_norm"
        )


@contextmanager
def _captured_outputs(network: Network, layer: str | None) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of one of the encoder's layers; none for None."""
    activations: list[torch.Tensor] = []
    if layer is None:
        yield activations
        return
    module = network.encoder.get_submodule(layer)
    handle = module.register_forward_hook(lambda _module, _inputs, output: activations.append(output))
    try:
        yield activations
    finally:
        handle.remove()
