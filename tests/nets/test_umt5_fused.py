"""The text encoder as a GPU runs it: same numbers as the plain layers, padding without effect, e4m3, CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from turbo_backend.config import MODELS, TextEncoderConfig
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.umt5_fused import PADDING, FusedEncoder
from turbo_backend.quantization import Fp8Linear, quantize_to_fp8

CONFIG = TextEncoderConfig(vocab_size=199, dim=256, dim_attn=256, dim_ffn=320, num_heads=4, num_layers=3)
CPU = torch.device("cpu")
LENGTHS = (1, 31, 32, 33, 64, 100)


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    net = UMT5Encoder(CONFIG)
    initialize_random(net, 0)
    return net.eval().requires_grad_(False)


def draw_tokens(length: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(length))


def relative_rmse(x: Tensor, exact: Tensor) -> float:
    return float((x.float().cpu() - exact).norm() / exact.norm())


@pytest.mark.oracle
def test_plain_layers_are_the_oracle(encoder: UMT5Encoder) -> None:
    net = deepcopy(encoder)
    fused = FusedEncoder(net, provider="reference")
    for length in LENGTHS:
        tokens = draw_tokens(length)
        assert relative_rmse(fused(tokens), encoder(tokens[None], [length])[0]) < 1e-6
    assert list(net.state_dict()) == list(encoder.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name


def test_a_prompt_does_not_depend_on_those_before(encoder: UMT5Encoder) -> None:
    """The padding of one prompt holds what is left of another."""
    fresh, used = (FusedEncoder(deepcopy(encoder), provider="reference") for _ in range(2))
    used(draw_tokens(PADDING))
    tokens = draw_tokens(5)
    assert torch.equal(fresh(tokens), used(tokens))


@pytest.mark.oracle
def test_e4m3_rows(encoder: UMT5Encoder) -> None:
    """Relative RMSE: a product of e4m3 rows carries 3.7 %, of which the residual stream keeps a part in each layer."""
    net = deepcopy(encoder).bfloat16()
    quantize_to_fp8(net, CPU)
    fused = FusedEncoder(net, provider="reference")
    linears = [module for module in net.blocks.modules() if isinstance(module, Fp8Linear)]
    assert len(linears) == 7 * CONFIG.num_layers
    tokens = draw_tokens(40)
    exact = encoder(tokens[None], [40])[0]
    assert 1e-3 < relative_rmse(fused(tokens), exact) < 0.08


def test_on_the_cpu_nothing_changes(encoder: UMT5Encoder) -> None:
    net = deepcopy(encoder)
    net.prepare_for_inference(CPU)
    net.warm_up(64)
    tokens = draw_tokens(40)
    assert torch.equal(net(tokens[None], [40]), encoder(tokens[None], [40]))


@pytest.mark.gpu
@pytest.mark.oracle
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quantize", [False, True])
def test_recorded_on_the_gpu(encoder: UMT5Encoder, quantize: bool) -> None:
    """bf16: at most twice the error of the plain layers in bf16. e4m3: as on the CPU. Alone as in a batch."""
    device = torch.device("cuda", 0)
    plain = deepcopy(encoder).bfloat16().to(device)
    net = deepcopy(encoder).bfloat16()
    net.prepare_for_inference(device, quantize=quantize)
    net.warm_up(64)
    tokens = [draw_tokens(length) for length in LENGTHS]
    batched = net(_padded(tokens), LENGTHS)
    for one, length, row in zip(tokens, LENGTHS, batched, strict=True):
        exact = encoder(one[None], [length])[0]
        plain_error = relative_rmse(plain(one[None], [length])[0], exact)
        assert relative_rmse(row[:length], exact) <= (0.08 if quantize else 2 * plain_error)
        assert torch.equal(net(one[None], [length])[0], row[:length])
        assert not bool(row[length:].any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_heads_that_the_kernels_do_not_take_run_plain() -> None:
    device = torch.device("cuda", 0)
    net = UMT5Encoder(MODELS["tiny"].text_encoder)
    initialize_random(net, 0)
    plain, net = deepcopy(net).bfloat16().to(device), net.bfloat16()
    net.prepare_for_inference(device)
    net.warm_up(64)
    tokens = draw_tokens(40)
    assert torch.equal(net(tokens[None], [40]), plain(tokens[None], [40]))


def _padded(tokens: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
