"""UMT5 encoder: published parameters, transformers as oracle, padding, independence of prompts, refusals."""

from __future__ import annotations

import pytest
import torch
from reference_nets import umt5_of_transformers
from torch import Tensor
from transformers import UMT5EncoderModel

from turbo_backend.config import MODELS, TextEncoderConfig
from turbo_backend.errors import InvalidArgument
from turbo_backend.nets.umt5 import UMT5Encoder, relative_buckets

CONFIG = TextEncoderConfig(vocab_size=199, dim=48, dim_attn=64, dim_ffn=80, num_heads=4, num_layers=3)


@pytest.fixture(scope="module")
def encoder() -> UMT5Encoder:
    torch.manual_seed(0)
    net = UMT5Encoder(CONFIG)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def oracle(encoder: UMT5Encoder) -> UMT5EncoderModel:
    net = umt5_of_transformers(encoder)
    assert isinstance(net, UMT5EncoderModel)
    return net


def draw_tokens(batch: int, size: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, size), generator=torch.Generator().manual_seed(size))


def test_published_parameters() -> None:
    with torch.device("meta"):
        net = UMT5Encoder(MODELS["Wan2.1-1.3B"].text_encoder)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 242
    assert sum(parameter.numel() for parameter in net.parameters()) == 5_680_910_336
    published = {
        "token_embedding.weight": (256384, 4096),
        "norm.weight": (4096,),
        "blocks.0.norm1.weight": (4096,),
        "blocks.0.attn.q.weight": (4096, 4096),
        "blocks.23.attn.o.weight": (4096, 4096),
        "blocks.23.pos_embedding.embedding.weight": (32, 64),
        "blocks.7.norm2.weight": (4096,),
        "blocks.7.ffn.gate.0.weight": (10240, 4096),
        "blocks.7.ffn.fc1.weight": (10240, 4096),
        "blocks.7.ffn.fc2.weight": (4096, 10240),
    }
    assert {name: shapes[name] for name in published} == published


def test_buckets_of_chosen_distances() -> None:
    buckets = relative_buckets(200, num_buckets=32, max_distance=128)
    by_offset = {
        offset: int(buckets[offset + 199]) for offset in (0, -1, 1, -7, 7, -8, 8, -15, -16, 31, 32, -64, -199, 199)
    }
    assert by_offset == {
        0: 0, -1: 1, 1: 17, -7: 7, 7: 23, -8: 8, 8: 24, -15: 9, -16: 10, 31: 27, 32: 28, -64: 14, -199: 15, 199: 31,
    }  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("lengths", [(1, 2), (7, 20), (300, 131)])
def test_against_transformers(encoder: UMT5Encoder, oracle: UMT5EncoderModel, lengths: tuple[int, ...]) -> None:
    size = max(lengths) + 3
    token_ids = draw_tokens(len(lengths), size)
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        expected = oracle(input_ids=token_ids, attention_mask=mask).last_hidden_state * mask[..., None]
    actual = encoder(token_ids, lengths)
    assert actual.shape == (len(lengths), size, CONFIG.dim)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(actual[mask == 0], torch.zeros_like(actual[mask == 0]))


def test_prompts_do_not_depend_on_their_batch(encoder: UMT5Encoder) -> None:
    lengths = [*range(1, 21), 60]
    token_ids = draw_tokens(len(lengths), 64)
    batched = encoder(token_ids, torch.tensor(lengths))
    for i_sample, length in enumerate(lengths):
        alone = encoder(token_ids[i_sample : i_sample + 1, :length], [length])
        assert torch.equal(alone[0], batched[i_sample, :length]), length
        assert not bool(batched[i_sample, length:].any())


def test_what_stands_in_the_padding_is_not_looked_at(encoder: UMT5Encoder) -> None:
    token_ids = draw_tokens(1, 12)
    spoilt = token_ids.clone()
    spoilt[:, 5:] = -7
    assert torch.equal(encoder(token_ids, [5]), encoder(spoilt, [5]))


@pytest.mark.oracle
def test_bfloat16_is_as_exact_as_pytorch(encoder: UMT5Encoder, oracle: UMT5EncoderModel) -> None:
    """RMSE against fp32 at most that of transformers in bf16 and a quarter."""
    net = UMT5Encoder(CONFIG).bfloat16()
    net.load_state_dict(encoder.state_dict())
    token_ids = draw_tokens(2, 40)
    exact = encoder(token_ids, [40, 40])
    actual = net(token_ids, [40, 40])
    assert actual.dtype == torch.bfloat16
    plain_net = UMT5EncoderModel(oracle.config).bfloat16().eval()
    plain_net.load_state_dict(oracle.state_dict())
    with torch.no_grad():
        plain = plain_net(input_ids=token_ids).last_hidden_state
    error, plain_error = ((x.float() - exact).square().mean().sqrt() for x in (actual, plain))
    assert error <= 1.25 * plain_error


def test_refusals(encoder: UMT5Encoder) -> None:
    token_ids = draw_tokens(2, 6)
    with pytest.raises(InvalidArgument, match=r"token_ids = .*: must be integers \[B, S\]"):
        encoder(token_ids[0], [6])
    with pytest.raises(InvalidArgument, match="token_ids"):
        encoder(token_ids.float(), [6, 6])
    for lengths in ([6], [0, 6], [6, 7]):
        with pytest.raises(InvalidArgument, match=r"lengths = .*: must be 2 of 1 to 6 tokens"):
            encoder(token_ids, lengths)
    for outside in (-1, CONFIG.vocab_size):
        token_ids[1, 2] = outside
        with pytest.raises(InvalidArgument, match=r"token_ids = .*: must be within 0 \.\. 198"):
            encoder(token_ids, [6, 6])
