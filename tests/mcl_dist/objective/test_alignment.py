from __future__ import annotations

import torch

from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network, NetworkOutput
from mcl_dist.objective.alignment import align, alignment_map, automatic_gradient, similarity_gradient


def small_network() -> Network:
    torch.manual_seed(0)
    return Network(EncoderConfig(width=4, blocks=(1, 2, 1)), HeadsConfig(dim=8)).double().train()


def forward(network: Network) -> tuple[NetworkOutput, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(3, 3, 8, 32, 32, generator=generator, dtype=torch.float64)
    key = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator, dtype=torch.float64), dim=1)
    return network(clips), key


def automatic(network: Network, output: NetworkOutput, key: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    return automatic_gradient(output, key, output.features.projected)


def test_the_closed_form_equals_automatic_differentiation() -> None:
    network = small_network()
    output, key = forward(network)
    torch.testing.assert_close(
        similarity_gradient(network, output, key), automatic(network, output, key), rtol=1e-10, atol=1e-14
    )


def test_the_closed_form_gives_the_loss_gradients_of_double_backward() -> None:
    targets = torch.rand(3, 2, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for method in (similarity_gradient, automatic):
        network = small_network()
        output, key = forward(network)
        align(alignment_map(method(network, output, key)), targets).loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    closed_form, double_backward = gradients
    assert set(double_backward) <= set(closed_form)
    for name, gradient in closed_form.items():
        expected = double_backward.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12, msg=name)


def test_the_loss_of_maps_proportional_to_their_targets_is_zero() -> None:
    maps = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(3)) + 0.1
    assert align(maps, 3 * maps).loss.abs() < 1e-6


def test_the_loss_does_not_depend_on_the_scale_of_the_maps() -> None:
    generator = torch.Generator().manual_seed(4)
    maps, targets = torch.rand(2, 4, 7, 7, generator=generator), torch.rand(2, 4, 7, 7, generator=generator)
    torch.testing.assert_close(align(1e-10 * maps, targets).loss, align(maps, targets).loss)


def test_channels_are_weighted_by_their_spatial_mean_per_frame() -> None:
    gradient = torch.zeros(1, 1, 2, 1, 2)
    gradient[0, 0, 0] = torch.tensor([[1.0, 3.0]])
    gradient[0, 0, 1] = torch.tensor([[-1.0, 2.0]])
    assert alignment_map(gradient).flatten().tolist() == [2.0, 6.0, 0.0, 1.0]
