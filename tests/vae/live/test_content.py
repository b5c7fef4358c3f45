"""Folds that no longer fit: changes that leave no trace, and settings that are changed later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cosmos3_fast import accelerate, restore
from cosmos3_fast.vae.live.content import Content, sample
from cosmos3_fast.vae.live.seam import last_encoding
from cosmos3_fast.vae.synthetic import COSMOS3_VAE_CONFIG, synthetic_vae
from cosmos3_fast.vae.verify import FLOAT32_BOUND, relative_error

pytest.importorskip("diffusers")


@pytest.fixture
def vae() -> Any:
    config = {**COSMOS3_VAE_CONFIG, "base_dim": 8, "z_dim": 4, "num_res_blocks": 1}
    return synthetic_vae(config, 0, decoder_base_dim=8)


def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 3, 1, 32, 32, generator=generator, dtype=torch.float32) * 2 - 1


def parameters(vae: Any) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(pixels().to(vae.dtype)).latent_dist.parameters


def assert_fast_and_right(vae: Any) -> None:
    ours = parameters(vae)
    assert last_encoding(vae).path == "fast"
    assert relative_error(ours, parameters(restore(vae))) <= FLOAT32_BOUND


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (63,), (64,), (65,), (8, 3, 3, 3), (8, 4, 2, 5, 5), (1, 7)]
)
def test_samples_lie_inside(shape: tuple[int, ...]) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    values = sample(x)
    assert values.numel() == x.numel() or 64 <= values.numel() < 128
    assert torch.equal(values, x.flatten()[:: max(1, x.numel() // 64) | 1])
    if x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        assert sample(last).untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    apart = torch.zeros(5, 8)[:, ::2]
    assert sample(apart).shape == (20,)


def test_every_weight_has_its_turn() -> None:
    weights = [torch.randn(8, 8) for _ in range(10)]
    for changed in range(10):
        content = Content(weights)
        weights[changed].data.mul_(2)
        assert sum(content.differs(weights) for _ in range(5)) == 1
    assert not any(Content(weights).differs(weights) for _ in range(20))


def test_weights_that_moved_are_looked_at_at_once() -> None:
    weights = [torch.randn(8, 8) for _ in range(10)]
    content = Content(weights)
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.clone()
    assert not content.differs(weights)
    weights[7].data = kept[7] * 2
    assert content.differs(weights)


def fused_step(vae: Any) -> None:
    vae.requires_grad_(True)
    vae.encode(pixels()).latent_dist.parameters.square().sum().backward()
    versions = [p._version for p in vae.encoder.parameters()]
    torch.optim.AdamW(vae.encoder.parameters(), lr=0.1, fused=True).step()
    assert versions == [p._version for p in vae.encoder.parameters()]
    vae.zero_grad(set_to_none=True)


def other_data(vae: Any) -> None:
    for parameter in vae.encoder.parameters():
        parameter.data = parameter.data * 1.25


def one_other_tensor(vae: Any) -> None:
    weight = vae.encoder.mid_block.resnets[0].conv1.weight
    weight.data = weight.data * 1.25


def there_and_back(vae: Any) -> None:
    vae.half().float()


def from_a_vector(vae: Any) -> None:
    values = nn.utils.parameters_to_vector(vae.encoder.parameters())
    nn.utils.vector_to_parameters(values * 1.1, vae.encoder.parameters())


def through_data(vae: Any) -> None:
    for parameter in vae.encoder.parameters():
        parameter.data.mul_(1.25)


@pytest.mark.parametrize(
    "change",
    [fused_step, other_data, one_other_tensor, there_and_back, from_a_vector, through_data],
)
def test_changes_that_leave_no_trace_are_found_at_the_next_call(
    vae: Any, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = parameters(accelerate(vae))
    change(vae)
    ours = parameters(vae)
    assert last_encoding(vae).path == "fast"
    assert "were changed without a trace" in caplog.text
    assert not relative_error(before, ours) <= FLOAT32_BOUND
    assert relative_error(ours, parameters(restore(vae))) <= FLOAT32_BOUND


def test_one_weight_that_is_written_to_is_found_within_some_calls(vae: Any) -> None:
    accelerate(vae)
    parameters(vae)
    count = sum(1 for part in (vae.encoder, vae.quant_conv) for _ in part.parameters())
    vae.encoder.conv_out.weight.data.mul_(1.5)
    for _ in range(-(-count // 2)):
        parameters(vae)
    assert_fast_and_right(vae)


def test_what_one_network_notices_is_known_to_the_other(vae: Any) -> None:
    clip = torch.cat([pixels()] * 5, 2)
    accelerate(vae)
    vae.requires_grad_(False)
    parameters(vae)
    vae.encode(clip)
    vae.quant_conv.bias.data.add_(1)
    count = sum(1 for part in (vae.encoder, vae.quant_conv) for _ in part.parameters())
    for _ in range(-(-count // 2)):
        parameters(vae)
    ours = vae.encode(clip).latent_dist.parameters
    assert last_encoding(vae).path == "fast"
    theirs = restore(vae).encode(clip).latent_dist.parameters
    assert relative_error(ours, theirs) <= FLOAT32_BOUND


def test_moving_weights_folds_nothing(vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = parameters(accelerate(vae))
    network = vars(vae)["_cosmos3_fast"].encoder._frame._snapshot.network
    for parameter in vae.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(parameters(vae), before)
    assert vars(vae)["_cosmos3_fast"].encoder._frame._snapshot.network is network
    assert not caplog.records


def circular(vae: Any) -> None:
    vae.quant_conv.padding_mode = "circular"


def scaled_norm(vae: Any) -> None:
    vae.encoder.norm_out.scale *= 2


def patched_class(vae: Any) -> None:
    cls = type(vae.encoder.norm_out)
    own = cls.forward
    cls.forward = lambda self, x: own(self, x) * 2


def patched_encode(vae: Any) -> None:
    cls = type(vae)
    own = cls._encode
    cls._encode = lambda self, x: own(self, x) * 2


def hook_everywhere(vae: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(lambda module, args, out: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (circular, "padding_mode"),
        (scaled_norm, "scale"),
        (patched_class, "computes something"),
        (patched_encode, "computes something"),
        (hook_everywhere, "hooks of all modules"),
    ],
)
def test_settings_are_looked_at_in_each_call(
    vae: Any, change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls, name in ((type(vae.encoder.norm_out), "forward"), (type(vae), "_encode")):
        monkeypatch.setattr(cls, name, getattr(cls, name))
    accelerate(vae)
    parameters(vae)
    handle = change(vae)
    try:
        ours = parameters(vae)
        assert last_encoding(vae).path == "whole"
        assert reason in last_encoding(vae).reason
        assert torch.equal(ours, parameters(restore(vae)))
    finally:
        if handle is not None:
            handle.remove()


def train(vae: Any) -> None:
    vae.requires_grad_(True).train()


def train_in_eval_mode(vae: Any) -> None:
    vae.requires_grad_(True)
    vae.encode(pixels()).latent_dist.parameters.square().sum().backward()


@pytest.mark.parametrize("event", [train, train_in_eval_mode])
def test_a_vae_that_is_trained_runs_itself(
    vae: Any, event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = parameters(vae)
    accelerate(vae)
    event(vae)
    for _ in range(2):
        assert torch.equal(parameters(vae), own)
        assert last_encoding(vae).path == "whole"
    assert caplog.text.count("are being trained") == 1
    accelerate(vae, frozen=True)
    parameters(vae)
    assert last_encoding(vae).path == "fast"
    accelerate(vae, frozen=False)
    vae.zero_grad(set_to_none=True)
    vae.eval()
    assert_fast_and_right(vae)


def test_dropout_in_training_mode_acts(vae: Any, caplog: pytest.LogCaptureFixture) -> None:
    accelerate(vae)
    vae.train()
    parameters(vae)
    assert last_encoding(vae).path == "fast"
    for module in vae.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert not torch.equal(parameters(vae), parameters(vae))
    assert "is dropout in training mode" in last_encoding(vae).reason
    assert caplog.text.count("is dropout in training mode") == 1
    vae.eval()
    assert_fast_and_right(vae)
