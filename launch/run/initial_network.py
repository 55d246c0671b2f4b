"""The network that a pre-training run starts from."""

import torch

from mcl_dist.model.encoder import EncoderConfig
from mcl_dist.model.network import HeadsConfig, Network
from mcl_dist.model.pretrained_weights import InitialConfig, initialise


def build_initial_network(
    seed: int, encoder: EncoderConfig, heads: HeadsConfig, initial: InitialConfig
) -> tuple[Network, list[str]]:
    """Build the network from the seed and the initial weights; it is equal on all ranks.

    Returns:
        The network, and the names of the parameters that the weights leave at random values.
    """
    torch.manual_seed(seed)
    network = Network(encoder, heads)
    return network, initialise(network, initial)
