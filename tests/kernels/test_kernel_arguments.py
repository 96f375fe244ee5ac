"""What the kernels refuse, and how providers are chosen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

import turbo_kernels as kernels
from turbo_kernels.block_map import num_selected_blocks
from turbo_kernels.qk_norm_rope_gather import qk_norm_rope_gather
from turbo_kernels.residual_norm import residual_norm

Q = torch.randn(1, 100, 2, 64)
EYE, ZEROS = torch.eye(64), torch.zeros(64)
MAP = kernels.block_map(Q, Q, block_q=128, block_k=64, topk=0.5)
X, GATE = torch.randn(2, 10, 128), torch.randn(2, 128)
ROPE = torch.ones(10, 32, 2)
INT8, SCALE = torch.ones(64, 128, dtype=torch.int8), torch.ones(1, 1)


def sla(**changes: object) -> torch.Tensor:
    arguments = {"attention_type": "sla", "topk": 0.1, **changes}
    return kernels.sla_attention(Q, Q, Q, EYE, ZEROS, **arguments)


REFUSED: list[tuple[str, Callable[[], object]]] = [
    (r"topk is 0", lambda: kernels.block_map(Q, Q, block_q=128, block_k=64, topk=0.0)),
    (r"topk is 1.5", lambda: sla(topk=1.5)),
    (r"topk is nan", lambda: sla(topk=float("nan"))),
    (r"blocks are 32 x 64", lambda: kernels.block_map(Q, Q, block_q=32, block_k=64, topk=0.5)),
    (r"head_dim is 32", lambda: kernels.linear_attention(Q[..., :32], Q[..., :32], Q[..., :32])),
    (r"must be \[B, L, H, D\]", lambda: kernels.dense_attention(Q[0], Q[0], Q[0])),
    (r"one shape", lambda: kernels.dense_attention(Q, Q[:, :50], Q)),
    (r"one dtype", lambda: kernels.dense_attention(Q, Q.half(), Q)),
    (r"float32, float16 or bfloat16", lambda: kernels.dense_attention(Q.double(), Q.double(), Q.double())),
    (r"empty", lambda: kernels.dense_attention(Q[:0], Q[:0], Q[:0])),
    (r"last dimension", lambda: kernels.dense_attention(*(Q.transpose(1, 3)[:, :64],) * 3)),
    (r"attention type 'dense'", lambda: sla(attention_type="dense")),
    (r"proj_l has shapes", lambda: kernels.sla_attention(Q, Q, Q, EYE[:3], ZEROS, attention_type="sla", topk=0.1)),
    (r"unknown provider 'cuda'", lambda: sla(provider="cuda")),
    (r"does not offer", lambda: sla(provider="spargeattn")),
    (r"needs a CUDA device", lambda: sla(provider="spargeattn", attention_type="sagesla")),
    (r"block map is", lambda: kernels.sparse_attention(Q[:, :, :1], Q[:, :, :1], Q[:, :, :1], MAP)),
    (r"scale and shift", lambda: residual_norm(X, scale_BD=GATE, eps=1e-6)),
    (r"scale is", lambda: residual_norm(X, scale_BD=GATE[:1], shift_BD=GATE[:1], eps=1e-6)),
    (r"3 heads", lambda: kernels.rms_norm_rope(X, GATE[0], None, num_heads=3, eps=1e-6)),
    (r"rope is", lambda: kernels.rms_norm_rope(X, GATE[0], torch.ones(9, 32, 2), num_heads=2, eps=1e-6)),
    (r"rows whole", lambda: kernels.rms_norm_rope(X.mT, GATE[0, :10], None, num_heads=1, eps=1e-6)),
    (r"gate is \(1, 128\)", lambda: residual_norm(X, X, GATE[:1], eps=1e-6)),
    (r"gate needs a y", lambda: residual_norm(X, None, GATE, eps=1e-6)),
    (
        r"must be alike",
        lambda: qk_norm_rope_gather(X, X, GATE[0], GATE[0].half(), ROPE, num_heads=2, eps=1e-6, int8=True),
    ),
    (
        r"bfloat16.* must be alike",
        lambda: qk_norm_rope_gather(X, X.bfloat16(), *GATE, ROPE, num_heads=2, eps=1e-6, int8=False),
    ),
    (r"must be torch.int8", lambda: kernels.int8_linear(X, INT8.float(), SCALE, None)),
    (r"weight_scale is", lambda: kernels.int8_linear(X, INT8, torch.ones(2, 1), None)),
    (r"bias is", lambda: kernels.int8_linear(X, INT8, SCALE, torch.ones(3))),
    (r"must be \[M, K\]", lambda: kernels.quantize_int8_blockwise(X)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbo_kernels.providers.INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        sla(provider="triton")


@pytest.mark.skipif(importlib.util.find_spec("spas_sage_attn") is not None, reason="spas_sage_attn is installed")
def test_spargeattn_says_how_to_install_it() -> None:
    from turbo_kernels.spargeattn import load_spargeattn

    with pytest.raises(ValueError, match="pip install --no-build-isolation git"):
        load_spargeattn()


def test_default_provider() -> None:
    assert kernels.default_provider("cpu") == "reference"
    assert kernels.default_provider(torch.device("cuda", 1)) == "triton"


def test_geometry_on_the_cpu() -> None:
    assert kernels.attention_geometry("sla", "cpu") == kernels.attention_geometry("sagesla", "cpu") == (128, 64)


@pytest.mark.parametrize(
    ("topk", "num_k_blocks", "expected"),
    [(0.1, 512, 51), (0.1, 256, 25), (0.1, 1182, 118), (0.1, 591, 59), (0.15, 512, 76), (0.1, 9, 1), (1.0, 7, 7)],
)
def test_number_of_selected_blocks(topk: float, num_k_blocks: int, expected: int) -> None:
    assert num_selected_blocks(topk, num_k_blocks) == expected
