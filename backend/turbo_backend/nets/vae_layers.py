"""The layers that the encoder and the decoder of the Wan2.1 VAE share.

Shapes: T frames, H, W height and width at the layer's own resolution, C channels. Activations belong to one
sample and lie channels last (`x_THWC`, contiguous): convolutions run fastest so, norms reduce over the last
dimension, and a frame is one block of memory. Parameters keep the published shapes, channels first.

Every convolution of the network goes through `convolve`, every norm with its SiLU through `norm_silu`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo_kernels import norm_silu as norm_silu_kernel

#: Lower bound of the norm that RMS normalisation divides by (Wan2.1).
_SMALLEST_NORM = 1e-12

#: Past frames in a ring: what a causal convolution of three time taps sees.
RING_PAST = 2


def convolve(
    frames_THWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: tuple[int, int],
    stride: int = 1,
    time_stride: int = 1,
) -> Tensor:
    """Convolution over frames, padded in space and never in time.

    out[t] = bias + sum_k conv2d(frames[t * time_stride + k], weight[:, :, k])

    A single frame given to a kernel of several time taps stands for that frame after zeros: the last tap alone
    then sees anything.

    On the CPU the sum is taken literally: one channels-last 2-D convolution a time tap. PyTorch's CPU conv3d
    falls off oneDNN's fast paths below about 96 channels and is up to 12 times slower there.

    Args:
        frames_THWC: [T, H, W, C_in].
        weight: [C_out, C_in, kt, kh, kw], or [C_out, C_in, kh, kw] for kt = 1.
        bias: [C_out].
        padding: zeros on either side of height and width.
        stride: step in height and width.
        time_stride: step in time.

    Returns:
        [T_out, H_out, W_out, C_out] with T_out = (T - kt) // time_stride + 1.
    """
    if weight.dim() == 4:
        weight = weight.unsqueeze(2)
    num_frames = frames_THWC.shape[0]
    if num_frames == 1:
        weight = weight[:, :, -1:]
    num_taps = weight.shape[2]
    frames_TCHW = frames_THWC.permute(0, 3, 1, 2)
    if num_taps > 1 and frames_THWC.device.type != "cpu":
        frames_1CTHW = frames_TCHW.transpose(0, 1).unsqueeze(0)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        strides = (time_stride, stride, stride)
        out = F.conv3d(frames_1CTHW, weight, bias, stride=strides, padding=(0, *padding))
        return out[0].permute(1, 2, 3, 0)
    span = num_frames - num_taps + 1
    out_TCHW: Tensor | None = None
    for i_tap in range(num_taps):
        tap = weight[:, :, i_tap].contiguous(memory_format=torch.channels_last)
        seen = frames_TCHW[i_tap : i_tap + span : time_stride]
        if out_TCHW is None:
            out_TCHW = F.conv2d(seen, tap, bias, stride=stride, padding=padding)
        else:
            out_TCHW += F.conv2d(seen, tap, stride=stride, padding=padding)
    assert out_TCHW is not None
    return out_TCHW.permute(0, 2, 3, 1)


def rms_norm(x_THWC: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x / max(|x|_C, 1e-12) * sqrt(C) * gamma, the norm taken in fp32 over channels (Wan2.1 VAE).

    Args:
        x_THWC: [T, H, W, C].
        gamma: C values in any shape.
        out: where to write, of the shape and dtype of `x_THWC`; a new tensor by default.
    """
    num_channels = x_THWC.shape[-1]
    norm_THW1 = torch.linalg.vector_norm(x_THWC, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(_SMALLEST_NORM)
    weight_C = gamma.view(num_channels).float() * math.sqrt(num_channels)
    if torch.is_grad_enabled():
        y_THWC = (x_THWC / norm_THW1 * weight_C).to(x_THWC.dtype)
        return y_THWC if out is None else out.copy_(y_THWC)
    if out is None:
        out = torch.empty_like(x_THWC)
    return torch.div(x_THWC, norm_THW1, out=out).mul_(weight_C)


def norm_silu(x_THWC: Tensor, gamma: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(rms_norm(x)), written to `out` where given."""
    if torch.is_grad_enabled():
        y_THWC = F.silu(rms_norm(x_THWC, gamma))
        return y_THWC if out is None else out.copy_(y_THWC)
    if x_THWC.is_cuda:
        return norm_silu_kernel.norm_silu(x_THWC, gamma.view(-1), out=out)
    return F.silu(rms_norm(x_THWC, gamma, out=out), inplace=True)


@dataclass(slots=True, eq=False)
class FrameRing:
    """Input of a running causal convolution, [R, H, W, C]: frame i lies at i mod R, the newest from `begin` on."""

    frames: Tensor
    begin: int


class FrameHistory:
    """The state of one running encode or decode: the last input frames of each causal convolution.

    A chunk of frames followed by the next one with the same history gives exactly what both at once would have
    given, since a causal convolution sees no other frames of its past.
    """

    __slots__ = ("_frames", "_keeping", "_rings")

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}
        self._rings: dict[nn.Module, FrameRing] = {}
        self._keeping = True

    def finish(self) -> None:
        """Announces the last chunk: each layer's frames are freed when it has used them, and no more are kept."""
        self._keeping = False

    def has_started(self, layer: nn.Module) -> bool:
        """Whether the layer has seen a chunk."""
        return layer in self._frames

    def keep(self, layer: nn.Module, frames_THWC: Tensor) -> None:
        """Remembers `frames_THWC` (none, to start from zeros) as the past of the layer's next chunk."""
        if self._keeping:
            # A copy: a view would hold on to the whole window.
            self._frames[layer] = frames_THWC.clone()

    def advance_ring(self, layer: nn.Module, frames_THWC_shape: Sequence[int], like: Tensor) -> FrameRing:
        """The ring of a layer's input frames, its newest T frames to be written next.

        Args:
            layer: a convolution that sees two past frames.
            frames_THWC_shape: of the frames to be written; the same in each call.
            like: gives dtype and device.
        """
        ring = self._rings.get(layer)
        num_frames, *frame_shape = frames_THWC_shape
        if ring is None:
            past_THWC = self._frames.pop(layer, None)
            num_past = 0 if past_THWC is None else past_THWC.shape[0]
            frames_RHWC = like.new_empty(RING_PAST + num_frames, *frame_shape)
            frames_RHWC[: RING_PAST - num_past].zero_()
            if past_THWC is not None:
                frames_RHWC[RING_PAST - num_past : RING_PAST] = past_THWC
            ring = self._rings[layer] = FrameRing(frames_RHWC, RING_PAST)
        else:
            assert tuple(ring.frames.shape) == (RING_PAST + num_frames, *frame_shape)
            ring.begin += num_frames
        return ring

    def open_window(self, layer: nn.Module, x_THWC: Tensor, depth: int) -> Tensor:
        """Memory for the layer's past and its new frames, the past filled in.

        Args:
            layer: whose past.
            x_THWC: new frames; gives the sizes alone.
            depth: number of past frames that the layer's kernel sees.

        Returns:
            [depth + T, H, W, C] whose last T frames are to be written, zeros where the past is shorter than
            `depth`; or [1, H, W, C] for a single frame without any past, as `convolve` takes it.
        """
        past_THWC = self._frames.pop(layer, None)
        num_frames, *frame_shape = x_THWC.shape
        num_past = 0 if past_THWC is None else past_THWC.shape[0]
        if num_past == 0 and num_frames == 1:
            return x_THWC.new_empty(1, *frame_shape)
        window_THWC = x_THWC.new_empty(depth + num_frames, *frame_shape)
        window_THWC[: depth - num_past].zero_()
        if past_THWC is not None:
            window_THWC[depth - num_past : depth] = past_THWC
        return window_THWC


class RMSNorm(nn.Module):
    """The scale `gamma` of an RMS norm over channels; `shape` is the published one, [C, 1, 1, 1] or [C, 1, 1]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))


class Convolution(nn.Module):
    """Weight and bias of a convolution in the published shape; kernel (kt, kh, kw) or (kh, kw)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1.0 / math.sqrt(in_channels * math.prod(kernel))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.padding = (kernel[-2] // 2, kernel[-1] // 2)


class FrameConv(Convolution):
    """A convolution of each frame alone, kernel (kh, kw) or (1, kh, kw), that keeps height and width."""

    def forward(self, x_THWC: Tensor) -> Tensor:
        return convolve(x_THWC, self.weight, self.bias, padding=self.padding)


class CausalConv3d(Convolution):
    """A convolution over space and time that sees frames t - kt + 1 .. t; optionally with the norm before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__(in_channels, out_channels, kernel)
        self.depth = kernel[0] - 1

    def forward(self, x_THWC: Tensor, history: FrameHistory, norm: RMSNorm | None = None) -> Tensor:
        """Convolves silu(norm(x)), or x itself without a norm; [T, H, W, C_in] to [T, H, W, C_out]."""
        window_THWC = history.open_window(self, x_THWC, self.depth)
        new_THWC = window_THWC[-x_THWC.shape[0] :]
        if norm is None:
            new_THWC.copy_(x_THWC)
        else:
            norm_silu(x_THWC, norm.gamma, out=new_THWC)
        history.keep(self, window_THWC[-self.depth :])
        return convolve(window_THWC, self.weight, self.bias, padding=self.padding)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1x1x1 convolution where the widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The numbers are the published places; 1, 4 (SiLU) and 5 (dropout) hold no parameters.
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels, 1, 1, 1),
                "2": CausalConv3d(in_channels, out_channels),
                "3": RMSNorm(out_channels, 1, 1, 1),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = FrameConv(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        y_THWC = self.residual["2"](x_THWC, history, self.residual["0"])
        y_THWC = self.residual["6"](y_THWC, history, self.residual["3"])
        y_THWC += x_THWC if self.shortcut is None else self.shortcut(x_THWC)
        return y_THWC  # type: ignore[no-any-return]


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame: x + proj(softmax(q k^T / sqrt(C)) v)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 1, 1)
        self.to_qkv = FrameConv(channels, 3 * channels, (1, 1))
        self.proj = FrameConv(channels, channels, (1, 1))

    def forward(self, x_THWC: Tensor) -> Tensor:
        num_frames, height, width, channels = x_THWC.shape
        qkv_THWC = self.to_qkv(rms_norm(x_THWC, self.norm.gamma))
        q, k, v = qkv_THWC.reshape(num_frames, 1, height * width, 3 * channels).chunk(3, dim=-1)
        attended = attend_by_convolution(q, k, v) if _is_tf32(q) else F.scaled_dot_product_attention(q, k, v)
        y_THWC: Tensor = self.proj(attended.reshape(num_frames, height, width, channels))
        return y_THWC.add_(x_THWC)


def _is_tf32(x: Tensor) -> bool:
    """Whether convolutions of x round its factors to TF32, as cuDNN does unless told otherwise."""
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def attend_by_convolution(q_T1PC: Tensor, k_T1PC: Tensor, v_T1PC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v frame by frame, its products in the precision of the convolutions around it.

    PyTorch's float32 attention of one head this wide takes ten times as long (9.6 ms a frame of 720p).
    """
    frames = []
    for q_PC, k_PC, v_PC in zip(q_T1PC[:, 0], k_T1PC[:, 0], v_T1PC[:, 0], strict=True):
        scores_PS = _multiply_by_convolution(q_PC * q_PC.shape[1] ** -0.5, k_PC)
        frames.append(_multiply_by_convolution(scores_PS.softmax(-1), v_PC.t().contiguous()))
    return torch.stack(frames).unsqueeze(1)


def _multiply_by_convolution(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x weight^T as a 1x1 convolution."""
    x_1KM1 = x_MK.contiguous().t()[None, :, :, None]  # channels last in memory
    weight = weight_NK[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return F.conv2d(x_1KM1, weight)[0, :, :, 0].t().contiguous()


class MiddleBlocks(nn.ModuleList):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
        )

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        before, attention, after = self
        return after(attention(before(x_THWC, history)), history)  # type: ignore[no-any-return]


class Head(nn.ModuleDict):
    """conv(silu(norm(x))): the last layer of either net."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__({"0": RMSNorm(in_channels, 1, 1, 1), "2": CausalConv3d(in_channels, out_channels)})

    def forward(self, x_THWC: Tensor, history: FrameHistory) -> Tensor:
        return self["2"](x_THWC, history, self["0"])  # type: ignore[no-any-return]
