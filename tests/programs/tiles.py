"""How much a process grows to decode one picture, whole and in tiles: prints bytes, as JSON.

A process of its own, since one that trained before keeps the memory that it freed.
"""

import json

import torch

from tests.programs.peak import forget_peak, peak_bytes
from varkit.tokenizers.conv import ConvConfig, Decoder


@torch.no_grad()
def main() -> None:
    """Measure both."""
    torch.manual_seed(0)
    network = Decoder(ConvConfig(32, (1, 1, 2), res_blocks=1, latent_channels=8, groups=0)).eval()
    features, grown = torch.randn(1, 8, 96, 96), []
    for tile in (0, 16):
        network.tile = tile
        before = forget_peak()
        network(features)
        grown.append(peak_bytes() - before)
    print(json.dumps({"grown": grown}))


if __name__ == "__main__":
    main()
