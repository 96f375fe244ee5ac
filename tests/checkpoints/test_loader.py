"""Filling networks: strictness, readable reports, dtypes, quantizing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from turbo_backend.checkpoints import DenoiserLayout, TextEncoderLayout, VAELayout, load_into, open_checkpoint
from turbo_backend.checkpoints.loader import network_specs
from turbo_backend.config import MODELS, DiTConfig, TextEncoderConfig, VAEConfig
from turbo_backend.errors import CheckpointError
from turbo_backend.nets.random_weights import initialize_random
from turbo_kernels import quantize_int8_blockwise

State = dict[str, torch.Tensor]
Write = Callable[..., Path]

CPU = torch.device("cpu")


def _report(network: nn.Module, path: Path, *, quantize: bool = False) -> str:
    before = {key: tensor.device for key, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(network, open_checkpoint(path), device="cpu", dtype=torch.float32, quantize=quantize)
    assert {key: tensor.device for key, tensor in network.state_dict().items()} == before, "a refused file left traces"
    text = str(caught.value)
    assert len(text.splitlines()) <= 22
    return text


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_and_converts(
    small_net: nn.Module, small_state: State, write: Write, name: str, dtype: torch.dtype
) -> None:
    path = write(small_state, name)
    load_into(small_net, open_checkpoint(path), device="cpu", dtype=dtype)
    path.write_bytes(b"gone")  # nothing may still refer to the file
    for key, tensor in small_net.state_dict().items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, small_state[key].to(dtype), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in small_net.parameters())
    assert isinstance(small_net.get_parameter("first.weight"), nn.Parameter)
    small_net(torch.ones(1, 6, dtype=dtype))


def test_keep_fp32(small_net: nn.Module, small_state: State, write: Write) -> None:
    small_state["first.bias"] = small_state["first.bias"].double() + 1e-9
    checkpoint = open_checkpoint(write(small_state, "a.pth"))
    load_into(small_net, checkpoint, device="cpu", dtype=torch.bfloat16, keep_fp32=("first.", "table"))
    kept = {key for key, tensor in small_net.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {"first.weight", "first.bias", "table"}


def test_one_report_names_everything(small_net: nn.Module, small_state: State, write: Write) -> None:
    del small_state["first.bias"]
    small_state["stray"] = torch.ones(1)
    small_state["first.weight"] = torch.ones(7, 4)
    small_state["table"] = torch.ones(5, dtype=torch.int64)
    text = _report(small_net, write(small_state, "a.pth"))
    for part in (
        "1 missing, 1 extra, 1 of another shape, 1 of another type",
        "first.bias",
        "stray",
        "first.weight: file [7, 4], network [4, 6]",
        "table: file int64, network float32",
    ):
        assert part in text


def test_repeated_blocks_are_folded(write: Write, dit_state: State, dit_config: DiTConfig) -> None:
    state = {key: tensor for key, tensor in dit_state.items() if "proj_l" not in key}
    state |= {f"extra.{i}": torch.ones(1) for i in range(200)}
    text = _report(DenoiserLayout(dit_config, quant_linear=False).build(), write(state, "a.pth"))
    assert "4 missing, 200 extra" in text
    assert "blocks.*.self_attn.attn_op.local_attn.proj_l.weight  x 2" in text
    assert "not a TurboDiffusion denoiser" in text
    assert "and 196 more" in text


def _float_and_int8(dit_state: State) -> State:
    state = {}
    for key, tensor in dit_state.items():
        name = key.removesuffix(".weight")
        if key.startswith("blocks.") and tensor.ndim == 2 and "proj_l" not in key:
            state[f"{name}.int8_weight"], state[f"{name}.scale"] = quantize_int8_blockwise(tensor.float())
        else:
            state[key] = tensor
    return state


def test_quantized_file_loads_as_it_is(dit_state: State, write: Write, dit_config: DiTConfig) -> None:
    state = _float_and_int8(dit_state)
    network = DenoiserLayout(dit_config, quant_linear=True).load(
        open_checkpoint(write(state, "a.safetensors")), device="cpu", dtype=torch.bfloat16
    )
    loaded = network.state_dict()
    assert set(loaded) == set(state)
    for key, tensor in loaded.items():
        assert tensor.dtype == torch.int8 if key.endswith("int8_weight") else tensor.is_floating_point()
        assert tensor.dtype == torch.float32 or not key.endswith(".scale")
        torch.testing.assert_close(tensor.float(), state[key].float(), rtol=0, atol=0)


def test_floating_file_is_quantized_while_loading(dit_state: State, write: Write, dit_config: DiTConfig) -> None:
    layout = DenoiserLayout(dit_config, quant_linear=True)
    from_float = layout.load(open_checkpoint(write(dit_state, "a.pth")), device="cpu", dtype=torch.float32)
    from_int8 = layout.load(
        open_checkpoint(write(_float_and_int8(dit_state), "q.pth")), device="cpu", dtype=torch.float32
    )
    for (key, left), right in zip(from_float.state_dict().items(), from_int8.state_dict().values(), strict=True):
        assert left.dtype == right.dtype, key
        assert torch.equal(left, right), key


def test_quantizing_by_rows_equals_quantizing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from turbo_backend.checkpoints import loader

    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    monkeypatch.setattr(loader, "_QUANTIZE_ROWS", 128)
    by_rows = loader._quantize(weight, CPU)
    at_once = quantize_int8_blockwise(weight.float())
    assert torch.equal(by_rows[0], at_once[0])
    assert torch.equal(by_rows[1], at_once[1])


def test_hint_quantized_file(dit_state: State, write: Write, dit_config: DiTConfig) -> None:
    network = DenoiserLayout(dit_config, quant_linear=False).build()
    assert "this is a quantized file: set quant_linear" in _report(network, write(_float_and_int8(dit_state), "a.pth"))


def test_hint_not_quantized(dit_state: State, write: Write, dit_config: DiTConfig) -> None:
    network = DenoiserLayout(dit_config, quant_linear=True).build()
    assert "this file is not quantized" in _report(network, write(dit_state, "a.pth"))


def _meta_state(layout: DenoiserLayout | TextEncoderLayout | VAELayout) -> State:
    """Keys and first dimensions of a big network in a file of few bytes: only shapes matter to the report."""
    return {key: torch.zeros(1, dtype=dtype).expand(shape) for key, (shape, dtype) in layout.specs.items()}


class _Shapes:
    """Enough of a checkpoint to compare with: big shapes without their data."""

    def __init__(self, state: State) -> None:
        self.path = Path("big.pth")
        self._state = state

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._state)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._state[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._state[key].dtype


def _message(layout: DenoiserLayout | TextEncoderLayout | VAELayout, state: State) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_into(layout.build(), _Shapes(state), device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    return str(caught.value)


def test_hint_other_model() -> None:
    wanted = DenoiserLayout(MODELS["Wan2.1-1.3B"].dit, quant_linear=False)
    other = _meta_state(DenoiserLayout(MODELS["Wan2.1-14B"].dit, quant_linear=False))
    text = _message(wanted, other)
    assert "this file is a denoiser of Wan2.1-14B (dim 5120" in text
    assert "the configured network is a denoiser of Wan2.1-1.3B (dim 1536" in text
    i2v = _meta_state(DenoiserLayout(MODELS["Wan2.2-A14B"].dit, quant_linear=False))
    text = _message(DenoiserLayout(MODELS["Wan2.1-14B"].dit, quant_linear=False), i2v)
    assert "this file is a denoiser of Wan2.2-A14B" in text
    assert "patch_embedding.weight: file [5120, 144], network [5120, 64]" in text


def test_hint_other_network(dit_config: DiTConfig) -> None:
    wanted = DenoiserLayout(dit_config, quant_linear=False)
    vae = _meta_state(VAELayout(MODELS["Wan2.1-14B"].vae))
    assert "this file is a Wan VAE (base width 96, 16 latent channels); a denoiser" in _message(wanted, vae)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"condition_embedder.time_proj.weight": (4, 4)}, "a diffusers denoiser"),
        ({"encoder.down_blocks.0.conv1.weight": (4, 4, 3, 3, 3)}, "a diffusers VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}, "a transformers text encoder"),
        ({"blocks.0.self_attn.q.lora_A.weight": (4, 4)}, "a LoRA"),
        ({"img_emb.proj.0.weight": (4, 4)}, "image-to-video denoiser with CLIP"),
        ({"blocks.0.self_attn.q.weight_scale_inv": (4, 4)}, "another project"),
        ({"patch_embedding.weight": (4, 4, 1, 2, 2), "blocks.0.self_attn.q.weight": (4, 4)}, "original Wan release"),
        (
            {"encoder.conv1.weight": (160, 12, 3, 3, 3), "decoder.conv1.weight": (1024, 48, 3, 3, 3)},
            "the Wan2.2 VAE",
        ),
    ],
)
def test_foreign_layouts_are_named(keys: dict[str, tuple[int, ...]], what: str, dit_config: DiTConfig) -> None:
    text = _message(DenoiserLayout(dit_config, quant_linear=False), {key: torch.ones(s) for key, s in keys.items()})
    assert what in text
    assert "\n" not in text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quant_linear", [False, True])
def test_published_key_counts(name: str, quant_linear: bool) -> None:
    expected = {
        "tiny": (160, 210),
        "tiny-I2V": (160, 210),
        "Wan2.1-1.3B": (885, 1185),
        "Wan2.1-14B": (1175, 1575),
        "Wan2.2-A14B": (1175, 1575),
    }
    assert len(DenoiserLayout(MODELS[name].dit, quant_linear=quant_linear).specs) == expected[name][quant_linear]


def test_published_shapes() -> None:
    specs = DenoiserLayout(MODELS["Wan2.2-A14B"].dit, quant_linear=True).specs
    for key, shape in {
        "patch_embedding.weight": (5120, 144),
        "blocks.39.ffn.0.int8_weight": (13824, 5120),
        "blocks.39.ffn.0.scale": (108, 40),
        "blocks.0.ffn.2.scale": (40, 108),
        "blocks.7.cross_attn.v.scale": (40, 40),
        "blocks.7.modulation": (1, 6, 5120),
        "head.head.weight": (64, 5120),
        "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": (128, 128),
    }.items():
        assert specs[key][0] == shape
    text_encoder = TextEncoderLayout(MODELS["Wan2.1-1.3B"].text_encoder).specs
    assert len(text_encoder) == 242
    assert text_encoder["token_embedding.weight"][0] == (256384, 4096)
    assert text_encoder["blocks.23.pos_embedding.embedding.weight"][0] == (32, 64)
    assert len(VAELayout(MODELS["Wan2.1-1.3B"].vae).specs) == 194


@pytest.mark.parametrize(
    "layout",
    [
        TextEncoderLayout(TextEncoderConfig(vocab_size=32, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2)),
        VAELayout(VAEConfig(base_dim=4)),
    ],
    ids=["text encoder", "vae"],
)
def test_other_networks_load(layout: TextEncoderLayout | VAELayout, write: Write) -> None:
    network = layout.build()
    initialize_random(network, 5, device=CPU, dtype=torch.bfloat16)
    state = {key: tensor.detach() for key, tensor in network.state_dict().items()}
    loaded = layout.load(open_checkpoint(write(state, "a.pth")), device="cpu", dtype=torch.float32)
    assert network_specs(loaded) == {key: (tuple(t.shape), torch.float32) for key, t in state.items()}
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key].float()), key


def test_buffer_left_on_meta_is_our_own_error(small_net: nn.Module, small_state: State, write: Write) -> None:
    small_net.register_buffer("cache", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match="cache"):
        load_into(small_net, open_checkpoint(write(small_state, "a.pth")), device="cpu", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant_linear", [False, True])
def test_gpu_holds_the_same_weights(dit_state: State, write: Write, dit_config: DiTConfig, quant_linear: bool) -> None:
    layout = DenoiserLayout(dit_config, quant_linear=quant_linear)
    checkpoint = open_checkpoint(write(dit_state, "a.pth"))
    on_cpu = layout.load(checkpoint, device="cpu", dtype=torch.bfloat16).state_dict()
    for key, tensor in layout.load(checkpoint, device="cuda", dtype=torch.bfloat16).state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), on_cpu[key]), key
