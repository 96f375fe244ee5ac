"""The memory planner: weights to the byte, what is chosen for how much memory, and what a refusal offers instead."""

from __future__ import annotations

import pytest
import torch

from turbo_backend.checkpoints import DenoiserLayout
from turbo_backend.config import MODELS
from turbo_backend.errors import ResourceExhausted
from turbo_backend.memory import (
    FreeMemory,
    denoiser_bytes,
    gpu_memory,
    pack_together,
    plan_with_gpu_memory,
    release_workspace,
    settle_gpu,
)
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.parameters import GenerationParameters, make_parameters
from turbo_backend.planner import (
    CONFIGURATIONS,
    check_request,
    choose_configuration,
    choose_placement,
    nearest_fitting,
    plan_memory,
    weight_bytes,
    whole_bytes,
    workspace_bytes,
)
from turbo_backend.quantization import Fp8Linear, LinearWeights, lay_side_by_side
from turbo_kernels.fp8_linear import Fp8Rows

GIB = 2**30
WAN, A14B, TINY = MODELS["Wan2.1-14B"], MODELS["Wan2.2-A14B"], MODELS["tiny"]


def denoising(parameters: GenerationParameters) -> int:
    return denoiser_bytes(WAN.dit, parameters, torch.bfloat16, provider="triton", device=torch.device("cuda"))


@pytest.mark.parametrize("quant_linear", [False, True])
def test_weights_are_those_of_the_loaded_network(quant_linear: bool) -> None:
    layout = DenoiserLayout(TINY.dit, quant_linear=quant_linear)
    net = layout.build()
    cpu = torch.device("cpu")
    initialize_random(net, 0, device=cpu, dtype=torch.bfloat16, keep_fp32=layout.keep_fp32)
    loaded = sum(tensor.nbytes for tensor in net.state_dict().values())
    assert weight_bytes(layout.specs, torch.bfloat16, keep_fp32=layout.keep_fp32) == loaded


def test_published_sizes() -> None:
    """28.6 GB in bfloat16 and 14.5 GB quantized, as published files of 14B are."""
    for quant_linear, gigabytes in ((False, 28.6), (True, 14.5)):
        layout = DenoiserLayout(WAN.dit, quant_linear=quant_linear)
        size = weight_bytes(layout.specs, torch.bfloat16, keep_fp32=layout.keep_fp32)
        assert size / 1e9 == pytest.approx(gigabytes, rel=0.03)


def test_room_for_the_others_is_that_of_the_largest_preset() -> None:
    plans = [
        plan_memory(
            A14B, make_parameters(A14B, {"RESOLUTION": preset}, seed=1), dtype=torch.bfloat16, quant_linear=True
        )
        for preset in ("480p", "720p")
    ]
    small, large = (sum(stage.workspace for stage in plan.values()) for plan in plans)
    assert workspace_bytes(A14B, torch.bfloat16) == large > small
    weights = sum(stage.weights for stage in plans[1].values())
    assert whole_bytes(plans[1]) > weights + large


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_workspace_goes_back_only_where_others_have_no_room() -> None:
    device = torch.device("cuda", 0)
    torch.empty(GIB, dtype=torch.uint8, device=device)
    held = torch.cuda.memory_reserved(device)
    assert held >= GIB
    release_workspace(device, room=0)
    assert torch.cuda.memory_reserved(device) == held
    release_workspace(device, room=2 * torch.cuda.mem_get_info(device)[1])
    assert torch.cuda.memory_reserved(device) <= held - GIB


def test_a_gpu_is_planned_with_as_far_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GiB with 50 free, 30 are held by somebody."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50 * GIB, 80 * GIB))
    try:
        for told, found in ((0, (50, 80)), (40, (10, 40)), (24, (0, 24)), (100, (50, 80))):
            plan_with_gpu_memory(told * GIB)
            assert gpu_memory(device) == (found[0] * GIB, found[1] * GIB)
    finally:
        plan_with_gpu_memory(0)


def test_what_another_stage_works_in_is_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 6 GiB come back that are 1 while another stage works; what was free before the begin does not."""
    seen = iter([60, 6, 1, 3] * 2)
    monkeypatch.setattr("turbo_backend.memory.free_bytes", lambda _: next(seen) * GIB)
    for device, counted_on in (("cuda", [6, 6, 6]), ("cpu", [6, 1, 3])):
        memory = FreeMemory(torch.device(device))
        assert memory.look() == memory.bytes == 60 * GIB
        memory.begin()
        assert [memory.look() // GIB for _ in range(3)] == counted_on
        assert memory.bytes == counted_on[-1] * GIB


def _pair(device: torch.device) -> tuple[torch.nn.ModuleList, torch.Tensor]:
    """Two linears side by side in joint memory, in e4m3 as on a GPU, and the bytes they hold."""
    drawn = torch.randint(256, (2, 256, 256), dtype=torch.uint8, device=device)
    scale = torch.ones(256, device=device)
    linears = [Fp8Linear(Fp8Rows(values.clone().view(torch.float8_e4m3fn), scale), None) for values in drawn]
    lay_side_by_side(linears)
    return torch.nn.ModuleList(linears), drawn


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packing_moves_tensors_and_changes_nothing(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    linears, drawn = _pair(torch.device(kind))
    before = [linear.fp8_weight.data_ptr() for linear in linears]
    pack_together(linears, drawn.device)
    assert LinearWeights.joined(list(linears)) is not None  # side by side still
    assert torch.equal(torch.stack([linear.fp8_weight.view(torch.uint8) for linear in linears]), drawn)
    if kind == "cpu":  # an allocator of a GPU may give the same place again
        assert [linear.fp8_weight.data_ptr() for linear in linears] != before


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_keeps_the_memory_that_packing_moves_from(kind: str) -> None:
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    linears, drawn = _pair(torch.device(kind))
    before = [tensor.untyped_storage()._weak_ref() for tensor in linears.buffers()]  # type: ignore[attr-defined]
    pack_together(linears, drawn.device)
    assert all(torch.UntypedStorage._expired(storage) for storage in before)  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packing_gives_gaps_back() -> None:
    """Of 4 MB pieces every second goes: half of what they took is in gaps."""
    device = torch.device("cuda", 0)

    def count_gaps() -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    other_gaps = count_gaps()
    pieces = [torch.zeros(4 << 20, dtype=torch.uint8, device=device) for _ in range(128)]
    module = torch.nn.Module()
    for index, piece in enumerate(pieces[::2]):
        module.register_buffer(f"piece{index}", piece)
    del pieces, piece
    assert count_gaps() - other_gaps > 200 << 20
    pack_together(module, device)
    assert count_gaps() - other_gaps < 40 << 20


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_a_gpu_beside_is_waited_for_before_its_memory_goes_back() -> None:
    """What is freed while kernels read it is read from a GPU that is not the current one."""
    beside = torch.device("cuda", 1)
    factor = torch.randn(8192, 8192, device=beside)
    exact = float((factor @ factor).sum())
    read = factor.clone()
    products = [read @ factor for _ in range(20)]
    del read
    settle_gpu(beside)
    assert float(products[-1].sum()) == exact


def test_stages_of_a_plan() -> None:
    parameters = make_parameters(A14B, {}, seed=1)
    resident = plan_memory(A14B, parameters, dtype=torch.bfloat16, quant_linear=False)
    swapped = plan_memory(A14B, parameters, dtype=torch.bfloat16, quant_linear=False, placement="swapped")
    assert set(resident) == {"text_encoder", "image_encoder", "denoiser", "vae_decoder"}
    assert resident["denoiser"].weights == 2 * swapped["denoiser"].weights
    text_alone = make_parameters(WAN, {}, seed=1)
    stages = plan_memory(WAN, text_alone, dtype=torch.bfloat16, quant_linear=False, text_encoder_on_cpu=True)
    assert set(stages) == {"denoiser", "vae_decoder"}


@pytest.mark.parametrize(
    ("gib", "quant_linear", "placement"),
    [(80, True, "resident"), (80, False, "swapped"), (139, False, "resident"), (40, True, "swapped")],
)
def test_placement_of_two_experts(gib: int, quant_linear: bool, placement: str) -> None:
    parameters = make_parameters(A14B, {}, seed=1)
    chosen = choose_placement(A14B, parameters, dtype=torch.bfloat16, quant_linear=quant_linear, free=int(gib * GIB))
    assert chosen == placement


@pytest.mark.parametrize(
    ("gib", "beside", "placement"),
    [(80, 80, "spread"), (80, 20, "swapped"), (40, 80, "swapped"), (139, 80, "resident")],
)
def test_two_gpus_hold_an_expert_each(gib: int, beside: int, placement: str) -> None:
    chosen = choose_placement(
        A14B,
        make_parameters(A14B, {}, seed=1),
        dtype=torch.bfloat16,
        quant_linear=False,
        free=gib * GIB,
        free_beside=beside * GIB,
    )
    assert chosen == placement


#: Most bytes of tensors of each stage's process, GiB, as reported by requests of 81 frames on one H100 80GB.
@pytest.mark.parametrize(
    ("model", "quant_linear", "quant_text_encoder", "measured"),
    [
        ("Wan2.1-1.3B", False, False, {"text_encoder": 10.74, "denoiser": 3.81, "vae_decoder": 5.81}),
        ("Wan2.1-1.3B", True, True, {"text_encoder": 4.47, "denoiser": 2.47, "vae_decoder": 5.81}),
        ("Wan2.1-14B", True, True, {"text_encoder": 4.53, "denoiser": 21.46, "vae_decoder": 12.94}),
        (
            "Wan2.2-A14B",
            True,
            True,
            {"text_encoder": 4.47, "image_encoder": 11.13, "denoiser": 35.38, "vae_decoder": 12.94},
        ),
    ],
)
def test_prediction_is_within_a_tenth_of_what_was_measured(
    model: str, quant_linear: bool, quant_text_encoder: bool, measured: dict[str, float]
) -> None:
    stages = plan_memory(
        MODELS[model],
        make_parameters(MODELS[model], {}, seed=1),
        dtype=torch.bfloat16,
        quant_linear=quant_linear,
        quant_text_encoder=quant_text_encoder,
    )
    assert stages.keys() == measured.keys()
    for name, stage in stages.items():
        assert stage.weights + stage.workspace == pytest.approx(measured[name] * GIB, rel=0.1), name


@pytest.mark.parametrize(
    ("gib", "models", "resolution", "num_steps"),
    [
        (11.5, {"Wan2.1-1.3B"}, "480p", 2),
        (15.5, {"Wan2.1-1.3B"}, "480p", 2),
        (23.5, {"Wan2.1-1.3B", "Wan2.1-14B"}, "480p", 4),
        (39.4, {"Wan2.1-14B"}, "720p", 4),
        (79.2, {"Wan2.1-14B"}, "720p", 4),
    ],
)
def test_configuration_by_memory(gib: float, models: set[str], resolution: str, num_steps: int) -> None:
    chosen = choose_configuration(int(gib * GIB))
    assert chosen.model in models
    assert (chosen.resolution, chosen.num_steps) == (resolution, num_steps)
    assert chosen.quant_linear == (gib < 60)
    assert chosen.memory <= gib * GIB


def test_more_memory_never_means_less() -> None:
    chosen = [CONFIGURATIONS.index(choose_configuration(gib * GIB)) for gib in range(11, 90)]
    assert chosen == sorted(chosen, reverse=True)
    with pytest.raises(ResourceExhausted, match=r"\[RESOURCE_EXHAUSTED\] 4\.0 GiB of GPU memory are free"):
        choose_configuration(4 * GIB)


def test_refusal_names_what_fits() -> None:
    parameters = make_parameters(WAN, {}, seed=1)
    free = 5 * GIB
    with pytest.raises(ResourceExhausted) as caught:
        check_request(WAN, parameters, denoising, free=free, what="denoising")
    message = str(caught.value)
    assert "denoising 1280x720, 81 frames needs 7." in message
    fewer, smaller = nearest_fitting(WAN, parameters, lambda p: denoising(p) <= free)
    assert f"what fits: {fewer.num_frames} frames at 720p or 81 frames at {smaller.resolution}" in message
    assert fewer.num_frames % 4 == 1
    more = make_parameters(WAN, {"NUM_FRAMES": fewer.num_frames + 4}, seed=1)
    assert denoising(more) > free >= denoising(fewer)
    assert smaller.width * smaller.height < 1280 * 720


def test_nothing_fits() -> None:
    parameters = make_parameters(WAN, {"RESOLUTION": "480"}, seed=1)
    with pytest.raises(ResourceExhausted, match="nothing at this aspect ratio"):
        check_request(WAN, parameters, denoising, free=1000, what="decoding")
