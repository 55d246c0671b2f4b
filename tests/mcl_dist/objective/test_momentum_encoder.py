from __future__ import annotations

import torch

from mcl_dist.distributed.process_group import ProcessGroup
from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.objective.momentum_encoder import MomentumEncoder, shuffle_permutation


def network() -> Network:
    torch.manual_seed(0)
    return Network(EncoderConfig(width=4, blocks=(1,)), HeadsConfig(dim=8)).train()


def test_an_update_moves_every_parameter_by_one_minus_momentum() -> None:
    query = network()
    momentum = MomentumEncoder(query, ProcessGroup(), seed=0, autocast=False)
    before = [p.clone() for p in momentum.network.parameters()]
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(4.0)
    momentum.update(query.parameters(), 0.75)
    for old, new in zip(before, momentum.network.parameters(), strict=True):
        torch.testing.assert_close(new, old + 1.0)


def test_a_skipped_step_does_not_change_the_moving_average() -> None:
    query = network()
    momentum = MomentumEncoder(query, ProcessGroup(), seed=0, autocast=False)
    before = [p.clone() for p in momentum.network.parameters()]
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(4.0)
    momentum.update(query.parameters(), 0.75, taken=torch.tensor(0.0))
    assert all(map(torch.equal, momentum.network.parameters(), before))
    momentum.update(query.parameters(), 0.75, taken=torch.tensor(1.0))
    torch.testing.assert_close(list(momentum.network.parameters()), [old + 1.0 for old in before])


def test_keys_are_unit_vectors_of_the_three_key_views_without_gradients() -> None:
    momentum = MomentumEncoder(network(), ProcessGroup(), seed=0, autocast=False)
    views = torch.randint(0, 256, (3, 4, 4, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    keys = momentum.encode(views, step=0)
    for vectors in keys:
        assert vectors.shape == (3, 3, 8)
        assert not vectors.requires_grad
        torch.testing.assert_close(vectors.norm(dim=2), torch.ones(3, 3))
    changed = views.clone()
    changed[:, 0] = 0
    torch.testing.assert_close(momentum.encode(changed, step=0).inter, keys.inter)


def test_encoding_and_exchange_are_separate_phases() -> None:
    momentum = MomentumEncoder(network(), ProcessGroup(), seed=0, autocast=False)
    phases: list[str] = []
    momentum.encode(torch.zeros(2, 4, 4, 16, 16, 3, dtype=torch.uint8), 0, phases.append)
    assert phases == ["keys", "keys", "keys", "exchange"]


def test_the_shuffle_differs_by_step_and_key() -> None:
    shuffles = [shuffle_permutation(64, 0, step, key).tolist() for step in range(2) for key in range(3)]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 6
    assert all(sorted(shuffle) == list(range(64)) for shuffle in shuffles)
