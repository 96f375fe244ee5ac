"""Seeded random weights."""

import pytest
import torch
from torch import nn

from turbo_backend.config import DiTConfig
from turbo_backend.nets.dit import KEEP_FP32, WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.quantization import quantize_linears

CPU = torch.device("cpu")
CONFIG = DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=48)


def make_state(seed=0, config=CONFIG, *, quantized=False, **kwargs):
    with torch.device("meta"):
        net = WanDiT(config)
    if quantized:
        quantize_linears(net)
    initialize_random(net, seed, device=CPU, **kwargs)
    return net.state_dict()


@pytest.mark.parametrize("generator_device", [None, CPU])
@pytest.mark.parametrize("quantized", [False, True])
def test_seeded_and_complete(generator_device, quantized):
    first, again, other = (
        make_state(seed, quantized=quantized, generator_device=generator_device) for seed in (3, 3, 4)
    )
    for key, tensor in first.items():
        assert not tensor.is_meta
        assert tensor.float().isfinite().all()
        assert torch.equal(tensor, again[key])
        assert key.endswith(".scale") or not torch.equal(tensor, other[key]), key


def test_values_depend_on_the_name_alone():
    deeper = DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=3, text_dim=48)
    state, larger = make_state(), make_state(config=deeper)
    assert all(torch.equal(tensor, larger[key]) for key, tensor in state.items())
    assert not torch.equal(larger["blocks.0.self_attn.q.weight"], larger["blocks.1.self_attn.q.weight"])


def test_sizes_are_sane():
    state = make_state()
    assert state["blocks.0.ffn.2.weight"].std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert state["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert state["blocks.0.norm3.weight"].mean().item() == pytest.approx(1, abs=0.05)
    assert state["blocks.0.norm3.bias"].abs().max().item() < 0.2
    quantized = make_state(quantized=True)
    weight = quantized["blocks.0.ffn.2.int8_weight"].float() * quantized["blocks.0.ffn.2.scale"][0, 0]
    assert weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


def test_dtypes():
    state = make_state(dtype=torch.bfloat16, keep_fp32=KEEP_FP32, quantized=True)
    dtypes = {key: tensor.dtype for key, tensor in state.items()}
    assert dtypes["patch_embedding.weight"] == torch.bfloat16
    assert dtypes["blocks.0.ffn.0.bias"] == torch.bfloat16
    assert dtypes["blocks.0.ffn.0.scale"] == torch.float32
    assert dtypes["blocks.0.ffn.0.int8_weight"] == torch.int8
    assert dtypes["blocks.0.modulation"] == torch.float32
    assert dtypes["head.head.weight"] == torch.float32
    assert dtypes["text_embedding.0.weight"] == torch.bfloat16


def test_any_module():
    net = nn.Sequential(nn.Conv3d(4, 8, 3), nn.Embedding(5, 6))
    initialize_random(net, 0)
    assert net[0].weight.std().item() == pytest.approx((4 * 27) ** -0.5, rel=0.1)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_meta_needs_a_device():
    with torch.device("meta"):
        net = WanDiT(CONFIG)
    with pytest.raises(ValueError, match="meta"):
        initialize_random(net, 0)
