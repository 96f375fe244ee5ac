"""Int8 linears: the format, exact products, and a quantised network beside its originals."""

import pytest
import torch
from torch import nn

from turbo_backend.config import MODELS, DiTConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.quantization import Fp8Linear, Int8Linear, apply_linear, convert_to_fp8, quantize_linears

CONFIG = DiTConfig(dim=256, ffn_dim=384, num_heads=4, num_layers=2, text_dim=48, text_len=24)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_net():
    net = WanDiT(CONFIG)
    initialize_random(net, 0)
    return net


def naive_quantize(weight):
    """One 128 x 128 block at a time."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            where = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            amax = weight[where].abs().max().clamp(min=1e-8)
            scale[i, j] = amax / 128
            codes[where] = torch.round(weight[where] / scale[i, j]).clamp(-128, 127).to(torch.int8)
    return codes, scale


def test_format_of_a_linear():
    linear = nn.Linear(200, 300)
    quantized = Int8Linear.from_linear(linear)
    codes, scale = naive_quantize(linear.weight.detach())
    assert {k: (v.dtype, tuple(v.shape)) for k, v in quantized.state_dict().items()} == {
        "int8_weight": (torch.int8, (300, 200)),
        "scale": (torch.float32, (3, 2)),
        "bias": (torch.float32, (300,)),
    }
    assert torch.equal(quantized.scale, scale)
    # A weight half-way between two codes may go either way, by one.
    assert (quantized.int8_weight.int() - codes.int()).abs().max() <= 1
    assert (quantized.int8_weight != codes).float().mean() < 1e-3
    assert torch.equal(quantized.bias, linear.bias)
    # Half a step, and a whole one where +amax is cut to 127.
    spread = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    assert ((quantized.dequantized_weight() - linear.weight).abs() <= 1.001 * spread).all()


def test_linear_is_exact_on_representable_inputs():
    """Integers whose blocks have amax 128 pass both quantisers unchanged, so the product is that of integers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (2, 150, 256), generator=generator).float()
    weight = torch.randint(-127, 128, (130, 256), generator=generator).float()
    for start in (0, 128):
        x[:, ::128, start] = -128
        weight[::128, start] = -128
    linear = nn.Linear(256, 130)
    linear.weight.data, linear.bias.data = weight, torch.arange(130.0)
    expected = x.double() @ weight.double().T + torch.arange(130.0)
    with torch.no_grad():
        actual = Int8Linear.from_linear(linear)(x)
    assert ((actual - expected).abs().max() / expected.abs().max()).item() < 1e-6


def test_samples_are_quantised_apart():
    """A block of 128 tokens never reaches into the next sample, however much larger that one is."""
    linear = Int8Linear.from_linear(nn.Linear(128, 64).requires_grad_(False))
    x = randn(2, 100, 128)
    x[1] *= 1000
    assert torch.equal(linear(x)[0], linear(x[:1])[0])
    assert torch.equal(linear(x)[1], linear(x[1:])[0])


def test_which_linears_are_quantised():
    net = make_net()
    before = {name: type(module) for name, module in net.named_modules()}
    quantize_linears(net)
    quantized = {name for name, module in net.named_modules() if isinstance(module, Int8Linear)}
    assert quantized == {
        name
        for name, kind in before.items()
        if kind is nn.Linear and name.startswith("blocks.") and not name.endswith("proj_l")
    }
    assert len(quantized) == 10 * CONFIG.num_layers


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("Wan2.1-1.3B", {"self_attn.q": (12, 12), "ffn.0": (70, 12), "ffn.2": (12, 70)}),
        ("Wan2.1-14B", {"cross_attn.o": (40, 40), "ffn.0": (108, 40), "ffn.2": (40, 108)}),
    ],
)
def test_shapes_of_the_published_files(name, shapes):
    with torch.device("meta"):
        net = WanDiT(MODELS[name].dit)
    quantize_linears(net)
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    for linear, shape in shapes.items():
        assert tuple(net.get_buffer(f"blocks.0.{linear}.scale").shape) == shape


def test_quantised_state_loads_into_a_net_on_meta():
    net = make_net()
    quantize_linears(net)
    with torch.device("meta"):
        empty = WanDiT(CONFIG)
    quantize_linears(empty)
    empty.load_state_dict(net.state_dict(), strict=True, assign=True)
    for key, tensor in empty.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[key])


def test_a_cast_leaves_the_scales_alone():
    net = make_net()
    quantize_linears(net)
    scale = net.blocks[0].ffn[0].scale.clone()
    net.to(torch.bfloat16)
    assert net.blocks[0].ffn[0].bias.dtype == torch.bfloat16
    assert net.blocks[0].ffn[0].int8_weight.dtype == torch.int8
    assert torch.equal(net.blocks[0].ffn[0].scale, scale)


@pytest.mark.oracle
def test_quantised_network_beside_its_originals():
    """Relative RMSE: codes flip under fp32 noise, so a largest difference would say little.

    Activations in int8 with one scale a 128 x 128 block of normal values: step = 4.3 sigma / 128, error step / 12^0.5,
    or 1 % of sigma at each linear, next to which the weights' own error is alike.
    """
    net, dequantized, quantized = make_net(), make_net(), make_net()
    quantize_linears(quantized)
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear):
            dequantized.get_submodule(name).weight.data = module.dequantized_weight()
    attention = AttentionSettings(attention_type="original", provider="reference")
    latents, text = randn(2, 16, 3, 16, 20), randn(2, 24, CONFIG.text_dim, seed=1)
    out = {
        name: n(latents, torch.tensor([988.0, 608.0]), n.prepare_context(text, [5, 24]), attention=attention)
        for name, n in (("net", net), ("dequantized", dequantized), ("quantized", quantized))
    }

    def rmse(actual, expected):
        return ((out[actual] - out[expected]).square().mean() / out[expected].square().mean()).sqrt().item()

    assert 1e-4 < rmse("quantized", "dequantized") < 2e-2
    assert rmse("quantized", "net") < 3e-2


def test_e4m3_linear_made_from_int8():
    """Rows of the int8 weights' values, each rounded by at most half an e4m3 step."""
    quantized = Int8Linear.from_linear(nn.Linear(256, 130).requires_grad_(False))
    linear = Fp8Linear.from_int8(quantized)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in linear.state_dict().items()} == {
        "fp8_weight": (torch.float8_e4m3fn, (130, 256)),
        "scale": (torch.float32, (130,)),
        "bias": (torch.float32, (130,)),
    }
    exact = quantized.dequantized_weight()
    rounded = linear.fp8_weight.float() * linear.scale[:, None]
    step = exact.abs().clamp_min(exact.abs().amax(1, keepdim=True) * 2**-14) * 2**-4
    assert ((rounded - exact).abs() <= 1.01 * step).all()
    x = randn(2, 30, 256)
    out, plain = apply_linear(linear, x, provider="reference"), x @ exact.T + linear.bias
    assert out.dtype == x.dtype
    assert 0.01 < ((out - plain).norm() / plain.norm()).item() < 0.045
    x[1] *= 1000
    assert torch.equal(linear(x)[1], linear(x[1:])[0])


def test_uniform_e4m3_linear():
    """One scale; the values beside it are those that bounds of its products need."""
    quantized = Int8Linear.from_linear(nn.Linear(256, 130).requires_grad_(False))
    linear = Fp8Linear.from_int8(quantized, uniform=True)
    exact = quantized.dequantized_weight()
    assert linear.uniform
    assert torch.equal(linear.scale, (exact.abs().amax() * (1.0 / 448.0)).repeat(130))
    rounded = linear.fp8_weight.float() * linear.scale[:, None]
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.03
    assert torch.equal(linear.weight_norm, rounded.norm(dim=1).amax())
    assert torch.equal(linear.bias_amax, linear.bias.abs().amax())
    assert set(linear.state_dict()) == {"fp8_weight", "scale", "bias"}


def test_conversion_and_casts_of_e4m3_linears():
    net = make_net()
    quantize_linears(net)
    assert net.linear_kind == "int8"
    convert_to_fp8(net, fuse_gelu=True)
    assert net.linear_kind == "fp8"
    assert [net.blocks[0].ffn[i].uniform for i in (0, 2)] == [True, False]
    assert not net.blocks[0].self_attn.q.uniform
    assert not any(isinstance(module, Int8Linear) for module in net.modules())
    scale = net.blocks[0].ffn[0].scale.clone()
    net.to(torch.bfloat16)
    assert net.blocks[0].ffn[0].fp8_weight.dtype == torch.float8_e4m3fn
    assert net.blocks[0].ffn[0].bias.dtype == torch.bfloat16
    assert torch.equal(net.blocks[0].ffn[0].scale, scale)
