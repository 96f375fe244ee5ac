"""Promises of the Wan transformer beside its numbers: keys, counts, batch invariance, contexts, refusals."""

import pytest
import torch

from turbo_backend.config import MODELS, DiTConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.attention import ATTENTION_TYPES, AttentionSettings, CrossAttention
from turbo_backend.nets.dit import KEEP_FP32, WanDiT, patchify, unpatchify
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.rope import rope_table, split_head_dim
from turbo_backend.nets.text_context import TextContext
from turbo_backend.quantization import quantize_linears

CONFIG = DiTConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=48, text_len=24)
LATENTS = (16, 5, 20, 22)  # 550 tokens
TIMESTEPS = torch.tensor([988.0, 996.0, 1000.0], dtype=torch.float64)
LENGTHS = [7, 24, 1]


def settings(attention_type):
    return AttentionSettings(attention_type=attention_type, sla_topk=0.35, provider="reference")


def make_net(config=CONFIG, *, dtype=torch.float32, **kwargs):
    with torch.device("meta"):
        net = WanDiT(config, **kwargs)
    initialize_random(net, 0, device=torch.device("cpu"), dtype=dtype, keep_fp32=KEEP_FP32)
    return net


@pytest.fixture(scope="module")
def net():
    return make_net()


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, *LATENTS, generator=generator, dtype=torch.float64)
    return latents, torch.randn(3, 24, CONFIG.text_dim, generator=generator)


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_proj_l", "num_keys", "num_quantized_keys"),
    [
        ("Wan2.1-1.3B", 1_418_996_800, 495_360, 885, 1185),
        ("Wan2.1-14B", 14_288_491_584, 660_480, 1175, 1575),
        ("Wan2.2-A14B", 14_288_901_184, 660_480, 1175, 1575),
    ],
)
def test_sizes_of_the_published_models(name, num_parameters, num_proj_l, num_keys, num_quantized_keys):
    config = MODELS[name].dit
    with torch.device("meta"):
        net, base = WanDiT(config), WanDiT(config, sla=False)
    assert sum(p.numel() for p in base.parameters()) == num_parameters
    assert sum(p.numel() for p in net.parameters()) == num_parameters + num_proj_l
    assert len(net.state_dict()) == num_keys
    assert len(base.state_dict()) == num_keys - 2 * config.num_layers
    quantize_linears(net)
    assert len(net.state_dict()) == num_quantized_keys


def test_keys_and_shapes_of_the_published_layout():
    with torch.device("meta"):
        net = WanDiT(MODELS["Wan2.2-A14B"].dit)
    shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    linears = {f"{a}.{p}": (5120, 5120) for a in ("self_attn", "cross_attn") for p in "qkvo"}
    linears |= {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824), "self_attn.attn_op.local_attn.proj_l": (128, 128)}
    block = {"modulation": (1, 6, 5120), "norm3.weight": (5120,), "norm3.bias": (5120,)}
    block |= {f"{a}.norm_{p}.weight": (5120,) for a in ("self_attn", "cross_attn") for p in "qk"}
    outside = {
        "patch_embedding": (5120, 144),
        "text_embedding.0": (5120, 4096),
        "text_embedding.2": (5120, 5120),
        "time_embedding.0": (5120, 256),
        "time_embedding.2": (5120, 5120),
        "time_projection.1": (30720, 5120),
        "head.head": (64, 5120),
    }
    expected = {"head.modulation": (1, 2, 5120)}
    for n in range(40):
        outside |= {f"blocks.{n}.{name}": shape for name, shape in linears.items()}
        expected |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    for name, shape in outside.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert shapes == expected


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_batch_equals_each_alone(attention_type, dtype, quantized, inputs):
    """Bit for bit, with prompts and timesteps that differ."""
    net = make_net(dtype=dtype)
    if quantized:
        quantize_linears(net)
    latents, text = inputs
    attention = settings(attention_type)
    together = net(latents, TIMESTEPS, net.prepare_context(text, LENGTHS), attention=attention)
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    for i, length in enumerate(LENGTHS):
        context = net.prepare_context(text[i : i + 1, :length], [length])
        alone = net(latents[i : i + 1], TIMESTEPS[i : i + 1], context, attention=attention)
        assert torch.equal(together[i], alone[0])


def test_contexts_can_be_taken_apart_and_joined(net, inputs):
    latents, text = inputs
    context = net.prepare_context(text, LENGTHS)
    parts = context.split()
    assert [len(part) for part in parts] == [1, 1, 1]
    joined = TextContext.cat([parts[2], TextContext.cat(parts[:2])])
    order = [2, 0, 1]
    original = settings("original")
    expected = net(latents, TIMESTEPS, context, attention=original)
    assert torch.equal(net(latents[order], TIMESTEPS[order], joined, attention=original), expected[order])


def test_rows_past_the_length_are_not_read(net, inputs):
    latents, text = inputs
    spoiled = text.clone()
    spoiled[0, 7:] = torch.nan
    clean, other = (
        net(latents, TIMESTEPS, net.prepare_context(rows, LENGTHS), attention=settings("original"))
        for rows in (text, spoiled)
    )
    assert torch.equal(clean, other)


def test_each_layer_reads_the_text_once_for_all_steps(net, inputs, monkeypatch):
    latents, text = inputs
    projected = []
    project = CrossAttention.project_context

    def count(attention, embedded_SM, **options):
        projected.append((attention, len(embedded_SM)))
        return project(attention, embedded_SM, **options)

    monkeypatch.setattr(CrossAttention, "project_context", count)
    context = net.prepare_context(text, LENGTHS)
    assert not projected
    first, second = (net(latents, TIMESTEPS, context, attention=settings("original")) for _ in range(2))
    assert projected == [(block.cross_attn, rows) for block in net.blocks for rows in (8, 24, 2)]
    assert torch.equal(first, second)


def test_padding_is_one_row(net, inputs):
    samples = net.prepare_context(inputs[1], LENGTHS).samples
    assert [len(sample.embedded) for sample in samples] == [8, 24, 2]
    assert [sample.num_padding for sample in samples] == [17, 0, 23]


def test_given_rope_is_used(net, inputs):
    latents, text = inputs
    context = net.prepare_context(text, LENGTHS)
    rope = rope_table((5, 10, 11), CONFIG.head_dim, torch.device("cpu"))
    original = settings("original")
    default = net(latents, TIMESTEPS, context, attention=original)
    assert torch.equal(net(latents, TIMESTEPS, context, attention=original, rope=rope), default)
    assert not torch.equal(net(latents, TIMESTEPS, context, attention=original, rope=rope.roll(1, 0)), default)


def test_rope_table_is_made_once_and_limited():
    cpu = torch.device("cpu")
    assert split_head_dim(128) == (44, 42, 42)
    assert rope_table((2, 3, 4), 128, cpu) is rope_table((2, 3, 4), 128, cpu)
    assert rope_table((2, 3, 4), 64, cpu).shape == (24, 32, 2)
    assert rope_table((1, 1, 128), 128, cpu).dtype == torch.float32
    for grid in ((129, 1, 1), (1, 134, 1), (1, 0, 1)):
        with pytest.raises(InvalidArgument):
            rope_table(grid, 128, cpu)


def test_patch_orders():
    """Into the network channels come first in a patch; out of it they come last."""
    x = torch.arange(2 * 3 * 2 * 4 * 6).view(2, 3, 2, 4, 6)
    patches = patchify(x, (1, 2, 2))
    assert patches.shape == (2, 2 * 2 * 3, 12)
    assert torch.equal(patches[1, 1 * 6 + 1 * 3 + 2], x[1, :, 1, 2:4, 4:6].flatten())
    last = patches.unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(unpatchify(last, (2, 2, 3), (1, 2, 2)), x)


def test_base_network_runs_dense_only(inputs):
    base = make_net(sla=False)
    latents, text = inputs
    context = base.prepare_context(text, LENGTHS)
    with_sla = make_net()(latents, TIMESTEPS, context, attention=settings("original"))
    assert torch.equal(base(latents, TIMESTEPS, context, attention=settings("original")), with_sla)
    for attention_type in ("sla", "sagesla"):
        with pytest.raises(InvalidArgument, match="proj_l"):
            base(latents, TIMESTEPS, context, attention=settings(attention_type))


@pytest.mark.parametrize(
    ("shape", "num_timesteps", "num_contexts"),
    [
        ((3, 36, 5, 20, 22), 3, 3),
        ((3, 16, 5, 19, 22), 3, 3),
        ((3, 16, 5, 22), 3, 3),
        ((3, *LATENTS), 2, 3),
        ((3, *LATENTS), 3, 2),
        ((3, 16, 1, 2, 258), 3, 3),
    ],
)
def test_inputs_that_do_not_fit(net, inputs, shape, num_timesteps, num_contexts):
    context = net.prepare_context(inputs[1][:num_contexts], LENGTHS[:num_contexts])
    with pytest.raises(InvalidArgument):
        net(torch.zeros(shape), TIMESTEPS[:num_timesteps], context, attention=settings("original"))


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((1, 24, 47), [3]),
        ((24, 48), [3]),
        ((1, 24, 48), [25]),
        ((1, 24, 48), [-1]),
        ((2, 24, 48), [3]),
        ((1, 30, 48), [30]),
        ((1, 4, 48), [5]),
    ],
)
def test_texts_that_do_not_fit(net, shape, lengths):
    with pytest.raises(InvalidArgument):
        net.prepare_context(torch.zeros(shape), lengths)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"attention_type": "dense", "provider": "reference"},
        {"attention_type": "sla", "sla_topk": 0.0, "provider": "reference"},
        {"attention_type": "sla", "sla_topk": 1.5, "provider": "reference"},
        {"attention_type": "sla", "sla_topk": float("nan"), "provider": "reference"},
        {"attention_type": "sla", "provider": "spargeattn"},
    ],
)
def test_attention_settings_that_do_not_fit(kwargs):
    with pytest.raises(InvalidArgument):
        AttentionSettings(**kwargs)
