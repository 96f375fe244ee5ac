"""The Wan transformer against diffusers, and against a restatement that shares nothing with it but the weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from turbo_backend.config import DiTConfig
from turbo_backend.nets.attention import AttentionSettings
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.nets.rope import rope_table
from turbo_kernels import rms_norm_rope

pytestmark = pytest.mark.oracle

TEXT_LEN = 24
ORIGINAL = AttentionSettings(attention_type="original", provider="reference")


def make_config(head_dim, in_channels=16):
    return DiTConfig(
        dim=2 * head_dim,
        ffn_dim=5 * head_dim,
        num_heads=2,
        num_layers=2,
        in_channels=in_channels,
        text_dim=48,
        text_len=TEXT_LEN,
    )


def make_net(config, seed=0):
    net = WanDiT(config)
    initialize_random(net, seed)
    return net


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_difference(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_diffusers_twin(net):
    """WanTransformer3DModel with the weights of `net`, strictly loaded."""
    config = net.config
    twin = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
    )
    renames = (
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.modulation", "scale_shift_table"),
        ("head.head", "proj_out"),
        (".modulation", ".scale_shift_table"),
        ("ffn.0", "ffn.net.0.proj"),
        ("ffn.2", "ffn.net.2"),
        ("norm3", "norm2"),  # diffusers numbers the norms in the order they are called
        ("self_attn", "attn1"),
        ("cross_attn", "attn2"),
        *((f".{x}.", f".to_{x}.") for x in "qkv"),
        (".o.", ".to_out.0."),
    )
    state = {}
    for key, tensor in net.state_dict().items():
        if "proj_l" in key:
            continue
        for old, new in renames:
            key = key.replace(old, new)
        state[key] = tensor
    weight = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = weight.view(config.dim, config.in_channels, *config.patch_size)
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("in_channels", [16, 36], ids=["t2v", "i2v"])
def test_dense_equals_diffusers(head_dim, in_channels):
    """diffusers attends to all padding rows; the collapsed one must do the same."""
    net = make_net(make_config(head_dim, in_channels))
    twin = make_diffusers_twin(net)
    lengths = [5, TEXT_LEN, TEXT_LEN - 1, 0]
    latents = randn(len(lengths), in_channels, 3, 10, 14, seed=1)
    text = randn(len(lengths), TEXT_LEN, net.config.text_dim, seed=2)
    padded = text * (torch.arange(TEXT_LEN) < torch.tensor(lengths)[:, None])[..., None]
    timesteps = torch.tensor([988.0, 932.0, 852.0, 608.0], dtype=torch.float64)

    actual = net(latents, timesteps, net.prepare_context(text, lengths), attention=ORIGINAL)
    with torch.no_grad():
        expected = twin(latents, timesteps, padded, return_dict=False)[0]
    assert actual.dtype == torch.float32
    assert actual.shape == (len(lengths), 16, 3, 10, 14)
    assert relative_difference(actual, expected) < 2e-5


# --- a plain restatement, one sample at a time, with SLA written as masked dense attention ---


def naive_block_mask(q_HLD, k_HLD, block_q, block_k, topk):
    """bool [H, L, L]: which keys each query's sparse branch sees."""
    H, L, _ = q_HLD.shape
    smooth = k_HLD - k_HLD.mean(1, keepdim=True)
    q_block, k_block = torch.arange(L) // block_q, torch.arange(L) // block_k
    num_q, num_k = int(q_block.max()) + 1, int(k_block.max()) + 1
    selected = torch.zeros(H, num_q, num_k, dtype=torch.bool)
    for h in range(H):
        for i in range(num_q):
            q_mean = q_HLD[h, q_block == i].mean(0)
            scores = torch.stack([smooth[h, k_block == j].mean(0) @ q_mean for j in range(num_k)])
            selected[h, i, scores.topk(max(1, min(num_k, int(topk * num_k)))).indices] = True
    return selected[:, q_block][:, :, k_block]


def naive_int8(x_LD, block):
    """int8 codes by block, halves to even, and the scale of each row.

    amax * (1 / 127), not amax / 127: one ulp of the scale already turns some codes over.
    """
    codes, scales = [], []
    for tile in x_LD.split(block):
        scale = tile.abs().max() * (1 / 127) + 1e-7
        lower = torch.floor(tile / scale)
        above = tile / scale - lower
        codes.append(lower + ((above > 0.5) | ((above == 0.5) & (lower % 2 == 1))))
        scales.append(scale.expand(len(tile)))
    return torch.cat(codes), torch.cat(scales)


def naive_sage(q_LD, k_LD, v_LD, mask, block_k):
    """The 8-bit branch of one head, key block by key block: P is rounded against the running maximum of its row."""
    L, D = q_LD.shape
    q8, q_scale = naive_int8(q_LD, 1)  # a scale a token
    k8, k_scale = naive_int8(k_LD - k_LD.mean(0), block_k)
    v_scale = v_LD.abs().amax(0) * (1 / 448)
    v8 = (v_LD / v_scale).half().float()
    row_max, row_sum, out = torch.full((L, 1), -math.inf), torch.zeros(L, 1), torch.zeros(L, D)
    for keys in torch.arange(L).split(block_k):
        rows = mask[:, keys[0]]
        logits = (q8[rows] @ k8[keys].T) * (q_scale[rows, None] * k_scale[keys] * (D**-0.5 * math.log2(math.e)))
        new_max = torch.maximum(row_max[rows], logits.amax(-1, keepdim=True))
        p, shrink = torch.exp2(logits - new_max), torch.exp2(row_max[rows] - new_max)
        row_sum[rows] = row_sum[rows] * shrink + p.sum(-1, keepdim=True)
        out[rows] = out[rows] * shrink + p.half().float() @ v8[keys]
        row_max[rows] = new_max
    return out / row_sum * v_scale


def naive_sla(q_HLD, k_HLD, v_HLD, weight, bias, attention):
    """o = softmax over the selected keys + proj_l(linear attention over all keys)."""
    block_q, block_k = 128, 64
    mask = naive_block_mask(q_HLD, k_HLD, block_q, block_k, attention.sla_topk)
    if attention.attention_type == "sagesla":
        heads = zip(q_HLD, k_HLD, v_HLD, mask, strict=True)
        sparse = torch.stack([naive_sage(q, k, v, seen, block_k) for q, k, v, seen in heads])
    else:
        logits = q_HLD @ k_HLD.transpose(1, 2) / math.sqrt(q_HLD.shape[-1])
        sparse = logits.masked_fill(~mask, -math.inf).softmax(-1) @ v_HLD
    phi_q, phi_k = q_HLD.softmax(-1), k_HLD.softmax(-1)
    weights = phi_q @ phi_k.transpose(1, 2)
    linear = weights @ v_HLD / (1e-5 + weights.sum(-1, keepdim=True))
    return sparse + linear @ weight.T + bias


def naive_forward(net, latents, timestep, text_SC, attention):
    """The published formulas for one sample; the text is padded with zero rows to its full length."""
    config, w = net.config, net.state_dict()
    H, head_dim = config.num_heads, config.head_dim
    T, h, w_ = latents.shape[1:]
    grid = (T, h // 2, w_ // 2)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def heads(x):
        return x.view(-1, H, head_dim).transpose(0, 1)

    def rotate(x_HLD):
        dim_side = head_dim // 6 * 2
        rates, positions = [], []
        for axis, dim in enumerate((head_dim - 2 * dim_side, dim_side, dim_side)):
            rates += [(axis, 10000 ** (-2 * j / dim)) for j in range(dim // 2)]
        for t in range(grid[0]):
            for y in range(grid[1]):
                positions += [(t, y, x) for x in range(grid[2])]
        angles = torch.tensor([[p[axis] * rate for axis, rate in rates] for p in positions], dtype=torch.float64)
        turned = torch.view_as_complex(x_HLD.double().unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2).float()

    sinusoid = [timestep * 10000 ** (-i / 128) for i in range(128)]
    sinusoid = torch.tensor([*map(math.cos, sinusoid), *map(math.sin, sinusoid)])
    time = linear(F.silu(linear(sinusoid, "time_embedding.0")), "time_embedding.2")
    time6 = linear(F.silu(time), "time_projection.1").view(6, -1)
    text = F.pad(text_SC, (0, 0, 0, TEXT_LEN - text_SC.shape[0]))
    text = linear(F.gelu(linear(text, "text_embedding.0"), approximate="tanh"), "text_embedding.2")

    patches = [
        latents[:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten()
        for t in range(grid[0])
        for y in range(grid[1])
        for x in range(grid[2])
    ]
    x = linear(torch.stack(patches), "patch_embedding")
    for n in range(config.num_layers):
        shift1, scale1, gate1, shift2, scale2, gate2 = w[f"blocks.{n}.modulation"][0] + time6
        name = f"blocks.{n}.self_attn"
        y = layer_norm(x) * (1 + scale1) + shift1
        q, k = (rotate(heads(rms(linear(y, f"{name}.{p}"), f"{name}.norm_{p}"))) for p in "qk")
        proj_l = f"{name}.attn_op.local_attn.proj_l"
        y = naive_sla(q, k, heads(linear(y, f"{name}.v")), w[f"{proj_l}.weight"], w[f"{proj_l}.bias"], attention)
        x = x + gate1 * linear(y.transpose(0, 1).flatten(1), f"{name}.o")

        name = f"blocks.{n}.cross_attn"
        y = layer_norm(x) * w[f"blocks.{n}.norm3.weight"] + w[f"blocks.{n}.norm3.bias"]
        q = heads(rms(linear(y, f"{name}.q"), f"{name}.norm_q"))
        k = heads(rms(linear(text, f"{name}.k"), f"{name}.norm_k"))
        weights = (q @ k.transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
        y = weights @ heads(linear(text, f"{name}.v"))
        x = x + linear(y.transpose(0, 1).flatten(1), f"{name}.o")

        y = layer_norm(x) * (1 + scale2) + shift2
        y = F.gelu(linear(y, f"blocks.{n}.ffn.0"), approximate="tanh")
        x = x + gate2 * linear(y, f"blocks.{n}.ffn.2")

    shift, scale = w["head.modulation"][0] + time
    out_LP = linear(layer_norm(x) * (1 + scale) + shift, "head.head")
    out = torch.empty(config.out_channels, T, h, w_)
    for i, patch in enumerate(out_LP):
        t, rest = divmod(i, grid[1] * grid[2])
        y, x_ = divmod(rest, grid[2])
        out[:, t, 2 * y : 2 * y + 2, 2 * x_ : 2 * x_ + 2] = patch.view(2, 2, -1).permute(2, 0, 1)
    return out


def run_sparse(head_dim, attention, seed=0):
    """Our network's answer and the plain one's, at L = 550: eight key blocks and a ragged ninth."""
    net = make_net(make_config(head_dim), seed)
    latents = randn(1, 16, 5, 20, 22, seed=3 + seed)
    text = randn(1, 7, net.config.text_dim, seed=4)
    actual = net(latents, torch.tensor([852.0]), net.prepare_context(text, [7]), attention=attention)
    return actual[0], lambda plain: naive_forward(net, latents[0], 852.0, text[0], plain)


def settings(attention_type, topk):
    return AttentionSettings(attention_type=attention_type, sla_topk=topk, provider="reference")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("topk", [0.05, 0.35])
def test_sla_equals_naive(head_dim, topk):
    """Top-k 0.05 of nine blocks is less than one block, and becomes one."""
    attention = settings("sla", topk)
    actual, naive = run_sparse(head_dim, attention)
    assert relative_difference(actual, naive(attention)) < 2e-5


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("topk", [0.05, 0.35])
def test_sagesla_attention_equals_naive(head_dim, topk):
    """Self-attention on the very same q, k, v, so that both sides make the same rounding decisions.

    Then they agree to 3e-7. Another order of the same arithmetic (exp for exp2, a scale one ulp away) turns a few
    decisions over and costs up to 9e-5 of the sparse branch.
    """
    config = make_config(head_dim)
    self_attn = make_net(config).blocks[1].self_attn
    x = randn(1, 550, config.dim, seed=5)
    rope = rope_table((5, 10, 11), head_dim, torch.device("cpu"))
    attention = settings("sagesla", topk)
    q, k, v = self_attn.project_qkv(x, provider="reference")
    q = rms_norm_rope(q, self_attn.norm_q.weight, rope, num_heads=2, eps=1e-6, provider="reference")
    k = rms_norm_rope(k, self_attn.norm_k.weight, rope, num_heads=2, eps=1e-6, provider="reference")
    q_HLD, k_HLD, v_HLD = (y.view(550, 2, head_dim).transpose(0, 1) for y in (q, k, v))
    proj_l = self_attn.attn_op.local_attn.proj_l
    out = naive_sla(q_HLD, k_HLD, v_HLD, proj_l.weight, proj_l.bias, attention).transpose(0, 1).flatten(1)
    expected = out @ self_attn.o.weight.T + self_attn.o.bias
    assert relative_difference(self_attn(x, rope, attention)[0], expected) < 1e-4


def relative_rmse(actual, expected):
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sagesla_network_equals_naive(head_dim):
    """A whole network with 8-bit roundings inside, by relative RMSE.

    A largest difference says little here: fp32 noise of 1e-6 in q or k flips single int8 codes, which moves the op's
    own output by up to 2e-3 at one place, and a network of the size below by up to 1.2e-4. Over 16 networks the
    RMSE was at most 1.3e-5, and at least 4.7e-4 when the plain side left the 8-bit roundings out; 5e-5 lies between.
    Exactness is the business of `test_sagesla_attention_equals_naive`, and of `sla` for all that surrounds it.
    """
    attention = settings("sagesla", 0.35)
    actual, naive = run_sparse(head_dim, attention)
    assert relative_rmse(actual, naive(attention)) < 5e-5
    assert relative_rmse(actual, naive(settings("sla", 0.35))) > 2e-4
