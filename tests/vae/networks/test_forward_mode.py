"""Forward-mode derivatives through the networks, bare and in a live VAE, equal the VAE's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoder_cases import FAMILIES, denormalized, latent_frame
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos3_fast import FrameDecoder, FrameEncoder, accelerate
from cosmos3_fast.vae.synthetic import synthetic_vae

pytest.importorskip("diffusers")

# A tangent is a product of as many layers, summed in another order; in float64, too, the VAE's own
# up-sampling rounds to float32.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4}


def live_vae(family: str, dtype: torch.dtype) -> Any:
    return synthetic_vae(FAMILIES[family], seed=1).to(dtype).requires_grad_(False).eval()


def by_transform(function: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (along,))[1]


def by_duals(function: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, along))).tangent
    assert tangent is not None
    return tangent


def assert_agrees(got: Tensor, wanted: Tensor) -> None:
    assert wanted.any()
    scale = wanted.abs().max().item()
    torch.testing.assert_close(got, wanted, rtol=0, atol=BOUNDS[wanted.dtype] * scale)


@pytest.fixture(params=[by_transform, by_duals])
def jvp(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tensor]]:
    # Of torch's attention kernels this one has a forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        yield request.param


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_decoder(family: str, dtype: torch.dtype, jvp: Callable[..., Tensor]):
    vae = live_vae(family, dtype)
    # In float32 large enough for Winograd's convolutions, which have no derivative.
    sides = (2, 3) if dtype == torch.float64 else (4, 5)
    latents = latent_frame(vae.config, 0, 1, *sides, dtype)
    along = latent_frame(vae.config, 1, 1, *sides, dtype)
    decoder = FrameDecoder.from_vae(vae)

    def own(z: Tensor) -> Tensor:
        return vae.decode(denormalized(vae.config, z)).sample

    assert_agrees(jvp(decoder, latents, along), jvp(own, latents, along))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_of_an_encoder(family: str, dtype: torch.dtype, jvp: Callable[..., Tensor]):
    vae = live_vae(family, dtype)
    pixels, along = (torch.sin(torch.arange(3 * 64 * 64) * k).view(1, 3, 64, 64) for k in (1, 2.5))
    pixels, along = pixels.to(dtype), along.to(dtype)
    encoder = FrameEncoder.from_vae(vae)
    mean, std = (
        torch.tensor(vae.config[name], dtype=dtype).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )

    def own(x: Tensor) -> Tensor:
        return (vae.encode(x.unsqueeze(2)).latent_dist.mean - mean) / std

    assert_agrees(jvp(encoder, pixels, along), jvp(own, pixels, along))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_live_vae(family: str, jvp: Callable[..., Tensor]):
    dtype = torch.float64
    vae, accelerated = live_vae(family, dtype), live_vae(family, dtype)
    accelerate(accelerated, mode="fast")
    latents = denormalized(vae.config, latent_frame(vae.config, 0, 1, 2, 3, dtype))
    along = latent_frame(vae.config, 1, 1, 2, 3, dtype).unsqueeze(2)
    assert_agrees(
        jvp(lambda z: accelerated.decode(z).sample, latents, along),
        jvp(lambda z: vae.decode(z).sample, latents, along),
    )
    pixels = torch.sin(torch.arange(3 * 32 * 32, dtype=dtype)).view(1, 3, 1, 32, 32)
    assert_agrees(
        jvp(lambda x: accelerated.encode(x).latent_dist.mean, pixels, pixels.cos()),
        jvp(lambda x: vae.encode(x).latent_dist.mean, pixels, pixels.cos()),
    )
