"""The encoder and the op in one torch.compile graph, and as an exported program.

python examples/compile_graph.py [--height 64] [--width 96]

Random weights of a narrow topology: what is shown is that it compiles without a graph break, that
the compiled graph serves other sizes, and that a saved program loads and runs elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos3_fast import FrameEncoder
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_config, synthetic_state_dict


class ConditionedLatents(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] and noise [B, 48, T, H/16, W/16] to conditioned latents.

    Returns the latents, in the noise's shape and dtype, and the velocity mask [1, 1, T, 1, 1].
    """

    def __init__(self, encoder: FrameEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.cosmos3.prepare_latents(self.encoder(pixels), noise, [0])


def narrow_model() -> ConditionedLatents:
    """Cosmos3's topology at a tenth of its width."""
    config = synthetic_config({**COSMOS3_VAE_CONFIG, "base_dim": 16}, seed=0)
    encoder = FrameEncoder.from_state_dict(synthetic_state_dict(config, 0), config, torch.float32)
    return ConditionedLatents(encoder)


def inputs(height: int, width: int, num_frames: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, height, width, generator=generator) * 2 - 1
    frames = (num_frames - 1) // 4 + 1
    noise = torch.randn(1, 48, frames, height // 16, width // 16, generator=generator)
    return pixels, noise


def export_and_load(model: nn.Module, example: tuple[Tensor, Tensor], path: Path) -> nn.Module:
    """The model as it comes back from a file, for any number of latent frames."""
    frames = torch.export.Dim("frames", min=2, max=1024)
    program = torch.export.export(model, example, dynamic_shapes=({}, {2: frames}))
    torch.export.save(program, path)
    return torch.export.load(path).module()


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    args = parser.parse_args()
    model = narrow_model()
    example = inputs(args.height, args.width)
    wanted, _ = model(*example)

    latents, velocity_mask = torch.compile(model, fullgraph=True)(*example)
    print(f"compiled, one graph: latents {list(latents.shape)}, largest difference from eager "
          f"{(latents - wanted).abs().max():.1e}")  # fmt: skip
    print(f"velocity mask: {velocity_mask.flatten().int().tolist()}")

    with tempfile.TemporaryDirectory() as folder:
        loaded = export_and_load(model, example, Path(folder) / "conditioned_latents.pt2")
        longer = inputs(args.height, args.width, num_frames=81)
        difference = (loaded(*longer)[0] - model(*longer)[0]).abs().max()
    print(f"exported, saved, loaded, run on 81 frames: largest difference {difference:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
