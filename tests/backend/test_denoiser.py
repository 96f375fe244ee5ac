"""The denoiser as a queue of turns, with the tiny network: the same latents whatever runs beside a request; requests
that are cancelled, late, too many, broken or resumed. Turns are taken one by one, and the tests tell the time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbo_backend.cancellation import Cancellations
from turbo_backend.checkpoints import DenoiserLayout, find_files, open_checkpoint, tiny_checkpoint_folder
from turbo_backend.config import MODELS
from turbo_backend.errors import Cancelled, DeadlineExceeded, InvalidArgument, ResourceExhausted, TurboError
from turbo_backend.nets.dit import WanDiT
from turbo_backend.nets.random_weights import initialize_random
from turbo_backend.parameters import Scheduling
from turbo_backend.stages.denoiser import COUNTERS, DenoiserStage
from turbo_backend.stages.denoiser_request import DenoisedStep, DenoiseRequest
from turbo_backend.stages.experts import ResidentExperts

TINY = MODELS["tiny"]
CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when a test says so, and one with each step of the network."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched(ResidentExperts):
    """Counts forwards, tells the time by them, and does what a test wants in the middle of one."""

    def __init__(self, net: WanDiT, clock: Clock) -> None:
        super().__init__([net])
        self._clock = clock
        self.num_forwards = 0
        self.during_step: Callable[[], None] = lambda: None

    def select(self, expert: int) -> WanDiT:
        self.num_forwards += 1
        self._clock.now += 1.0
        self.during_step()
        return super().select(expert)


class Box:
    """Takes the updates of one request."""

    def __init__(self) -> None:
        self.updates: list[DenoisedStep | TurboError] = []
        self.ended = threading.Event()

    def __call__(self, update: DenoisedStep | TurboError) -> None:
        assert not self.ended.is_set(), "nothing comes after the end"
        self.updates.append(update)
        if isinstance(update, TurboError) or update.latents is not None:
            self.ended.set()

    @property
    def error(self) -> TurboError:
        assert isinstance(self.updates[-1], TurboError), self.updates[-1]
        return self.updates[-1]

    @property
    def steps(self) -> list[int]:
        return [update.step for update in self.updates if isinstance(update, DenoisedStep)]

    @property
    def latents(self) -> torch.Tensor:
        assert isinstance(self.updates[-1], DenoisedStep), self.updates[-1]
        assert self.updates[-1].latents is not None
        return self.updates[-1].latents

    @property
    def log(self) -> dict[str, object]:
        assert isinstance(self.updates[-1], DenoisedStep)
        assert self.updates[-1].report is not None
        log: dict[str, object] = self.updates[-1].report["stages"]["denoiser"]  # type: ignore[index]
        return log


class Bench:
    """A stage and what a test does to it."""

    def __init__(self, net: WanDiT, **options: object) -> None:
        self.clock = Clock()
        self.experts = Watched(net, self.clock)
        defaults = {
            "device": CPU,
            "dtype": torch.float32,
            "provider": "reference",
            "max_batch_size": 8,
            "max_batch_tokens": 1 << 20,
        }
        self.stage = DenoiserStage(
            self.experts,
            TINY,
            fingerprint="",
            identity={},
            clock=self.clock,
            **{**defaults, **options},  # type: ignore[arg-type]
        )

    def submit(self, request: DenoiseRequest) -> Box:
        box = Box()
        self.stage.submit(request, box)
        return box

    def run_out(self, *boxes: Box) -> None:
        while not all(box.ended.is_set() for box in boxes):
            self.stage.turn()


MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def net() -> WanDiT:
    path = find_files(TINY, tiny_checkpoint_folder(), quant_linear=False, dit=None).dit[0]
    net: WanDiT = DenoiserLayout(TINY.dit, quant_linear=False).load(
        open_checkpoint(path), device=CPU, dtype=torch.float32
    )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def make_bench(net: WanDiT) -> MakeBench:
    return lambda **options: Bench(net, **options)


def ask(
    *, length: int = 5, request_id: str = "", scheduling: Scheduling | None = None, **values: object
) -> DenoiseRequest:
    """A request of two steps and five frames in dense attention, unless `values` say otherwise."""
    generator = torch.Generator().manual_seed(length)
    return DenoiseRequest(
        text_embeddings=torch.randn(length, TINY.dit.text_dim, generator=generator),
        text_length=length,
        values={"NUM_STEPS": 2, "NUM_FRAMES": 5, "SEED": 7, "ATTENTION_TYPE": "original", **values},
        report={"stages": {}},
        request_id=request_id,
        scheduling=scheduling or Scheduling(),
    )


DRAFT = {"NUM_STEPS": 2, "NUM_FRAMES": 1}
FINAL = {"NUM_STEPS": 4, "NUM_FRAMES": 5}

#: Unlike requests, some of which can share a forward.
CROWD = [
    ask(SEED=1),
    ask(SEED=2, NUM_STEPS=4, length=12),
    ask(SEED=3, NUM_STEPS=3, SIGMA_MAX=120.0),
    ask(SEED=4, NUM_STEPS=4, ODE=True, length=1),
    ask(SEED=5, NUM_STEPS=1),
    ask(SEED=6, NUM_FRAMES=1, NUM_STEPS=3),
    ask(SEED=7, ATTENTION_TYPE="sagesla", SLA_TOPK=0.3),
    ask(SEED=8, ATTENTION_TYPE="sagesla", SLA_TOPK=0.3, NUM_STEPS=4),
]


@pytest.fixture(scope="module")
def alone(make_bench: MakeBench) -> list[torch.Tensor]:
    """What each request of the crowd gives when nothing else runs."""
    boxes = []
    for request in CROWD:
        bench = make_bench()
        boxes.append(bench.submit(request))
        bench.run_out(boxes[-1])
    return [box.latents for box in boxes]


class TestTheSameLatents:
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(order=st.permutations(range(len(CROWD))), random=st.randoms(use_true_random=False))
    def test_whenever_a_request_joins(
        self, make_bench: MakeBench, alone: list[torch.Tensor], order: list[int], random: object
    ) -> None:
        bench = make_bench(max_batch_size=random.choice([2, 3, 8]))  # type: ignore[attr-defined]
        boxes: dict[int, Box] = {}
        for index in order:
            for _ in range(random.choice([0, 0, 1, 2])):  # type: ignore[attr-defined]
                bench.stage.turn()
            level = random.randint(4, 6)  # type: ignore[attr-defined]
            request = dataclasses.replace(CROWD[index], scheduling=Scheduling(priority_level=level))
            boxes[index] = bench.submit(request)
        bench.run_out(*boxes.values())
        for index, box in boxes.items():
            assert box.steps == list(range(1, int(CROWD[index].values["NUM_STEPS"]) + 1))  # type: ignore[call-overload]
            assert torch.equal(box.latents, alone[index])

    def test_requests_at_different_steps_share_a_forward(self, make_bench: MakeBench) -> None:
        bench = make_bench()
        early = bench.submit(ask(NUM_STEPS=4))
        bench.stage.turn()
        late = bench.submit(ask(NUM_STEPS=3, ODE=True, SIGMA_MAX=120.0))
        bench.run_out(early, late)
        assert bench.experts.num_forwards == 4
        assert (early.log["batch_size"], late.log["batch_size"]) == (2, 2)

    @pytest.mark.parametrize("index", [1, 3, 7])
    def test_from_any_step_on(self, make_bench: MakeBench, alone: list[torch.Tensor], index: int) -> None:
        store = Store()
        request = dataclasses.replace(CROWD[index], request_id="job", scheduling=Scheduling(durable=True))
        bench = make_bench(store=store)
        bench.run_out(bench.submit(request))
        bench.stage.close()
        assert [step for _, step, _ in store.saved][-1] == 4
        for _, step, state in store.saved:
            again = make_bench()
            first = again.submit(dataclasses.replace(CROWD[index], reached=(step, state)))
            beside = again.submit(ask())
            again.run_out(first, beside)
            assert first.steps == (list(range(step + 1, 5)) or [4])
            assert torch.equal(first.latents, alone[index])
            assert first.log["resumed_after"] == step
            assert len(first.log["step_milliseconds"]) == 4 - step  # type: ignore[arg-type]


class TestPriorities:
    def test_a_draft_passes_finals_between_their_steps(self, make_bench: MakeBench) -> None:
        bench = make_bench(max_batch_size=1)
        finals = [bench.submit(ask(**FINAL, SEED=seed)) for seed in (1, 2, 3)]
        bench.stage.turn()
        draft = bench.submit(ask(**DRAFT))
        bench.run_out(draft)
        assert bench.experts.num_forwards <= 1 + 2 + 1
        assert sum(len(final.steps) for final in finals) <= 2
        assert draft.log["turns_waited"] == bench.experts.num_forwards - 1 - 2
        bench.run_out(*finals)
        assert draft.log["queue_milliseconds"] <= 1000.0  # type: ignore[operator]
        assert [final.log["queue_milliseconds"] for final in finals][-1] == pytest.approx(10_000.0)

    def test_an_urgent_final_passes_drafts(self, make_bench: MakeBench) -> None:
        bench = make_bench(max_batch_size=1)
        drafts = [bench.submit(ask(**DRAFT, SEED=seed)) for seed in (1, 2, 3, 4)]
        final = bench.submit(ask(**FINAL, scheduling=Scheduling(priority_level=0)))
        bench.run_out(final)
        assert sum(len(draft.steps) for draft in drafts) == 1, "the oldest had its fourth turn"


class TestCancelling:
    @pytest.fixture
    def cancellations(self, tmp_path: Path) -> Cancellations:
        return Cancellations(tmp_path)

    @pytest.mark.parametrize("by", ["id", "token"])
    def test_takes_effect_at_the_end_of_the_running_step(
        self, make_bench: MakeBench, cancellations: Cancellations, alone: list[torch.Tensor], by: str, tmp_path: Path
    ) -> None:
        bench = make_bench(cancellations=cancellations)
        box = bench.submit(ask(NUM_STEPS=4, request_id="mine"))
        neighbour = bench.submit(CROWD[1])
        bench.stage.turn()
        (step,) = box.updates
        assert isinstance(step, DenoisedStep)
        bench.experts.during_step = lambda: cancellations.request("mine" if by == "id" else step.cancel_token)
        bench.stage.turn()
        bench.experts.during_step = lambda: None
        assert isinstance(box.error, Cancelled)
        assert str(box.error) == "the request was cancelled after 2 of 4 steps"
        assert box.steps == [1], "the cancelled step is not told: it would still be on its way when the error comes"
        bench.run_out(neighbour)
        assert torch.equal(neighbour.latents, alone[1])
        assert bench.experts.num_forwards == 4
        assert not list(tmp_path.iterdir()), "a cancellation that was carried out is forgotten"

    def test_one_that_waits_costs_no_step(self, make_bench: MakeBench, cancellations: Cancellations) -> None:
        bench = make_bench(cancellations=cancellations)
        cancellations.request("early")
        box = bench.submit(ask(request_id="early"))
        other = bench.submit(ask(request_id="other"))
        bench.run_out(box, other)
        assert isinstance(box.error, Cancelled)
        assert other.log["batch_size"] == 1

    def test_one_that_waits_is_told_while_another_runs(
        self, make_bench: MakeBench, cancellations: Cancellations
    ) -> None:
        bench = make_bench(cancellations=cancellations, max_batch_size=1)
        bench.stage.start()
        running, waiting = Box(), Box()

        def cancel_and_wait() -> None:
            bench.experts.during_step = lambda: None
            bench.stage.submit(ask(request_id="waiting"), waiting)
            cancellations.request("waiting")
            assert waiting.ended.wait(60), "told before this step is over"

        bench.experts.during_step = cancel_and_wait
        bench.stage.submit(ask(), running)
        assert running.ended.wait(60)
        bench.stage.close()
        assert isinstance(waiting.error, Cancelled)
        assert running.latents.isfinite().all()

    def test_a_caller_that_stops_listening_leaves(self, make_bench: MakeBench) -> None:
        bench = make_bench()
        for _ in bench.stage.denoise([ask(NUM_STEPS=4), ask(NUM_STEPS=4)]):
            break
        box = bench.submit(ask(NUM_STEPS=1))
        bench.run_out(box)
        assert box.log["batch_size"] == 1
        assert bench.experts.num_forwards == 2


class TestDeadlines:
    """Each step takes a second of the tests' clock."""

    @pytest.fixture
    def bench(self, make_bench: MakeBench) -> Bench:
        bench = make_bench(max_batch_size=1)
        bench.run_out(bench.submit(ask(NUM_STEPS=3)))  # so that the time of a step is known
        return bench

    def test_what_cannot_be_done_in_time_is_refused_on_arrival(self, bench: Bench) -> None:
        others = [bench.submit(ask(NUM_STEPS=4)) for _ in range(2)]
        # Three turns were taken before, so the next one is the oldest's.
        late, in_time = (
            bench.submit(ask(NUM_STEPS=2, scheduling=Scheduling(deadline_ms=deadline))) for deadline in (2999, 3000)
        )
        assert isinstance(late.error, DeadlineExceeded)
        assert str(late.error) == "[DEADLINE_EXCEEDED] deadline_ms = 2999: its steps would be done after 3000 ms"
        bench.run_out(in_time, *others)
        assert in_time.latents.isfinite().all()

    def test_the_running_step_and_the_more_urgent_count(self, bench: Bench) -> None:
        verdicts: list[Box] = []
        urgent = bench.submit(ask(NUM_STEPS=3, scheduling=Scheduling(priority_level=0)))

        def arrive() -> None:
            """A second into the first of the urgent one's three steps; two are left, and then its own."""
            bench.experts.during_step = lambda: None
            limits = [Scheduling(deadline_ms=deadline) for deadline in (2999, 3000)]
            verdicts.extend(bench.submit(ask(NUM_STEPS=1, scheduling=limit)) for limit in limits)

        bench.experts.during_step = arrive
        bench.run_out(urgent, *verdicts)
        bench.run_out(*verdicts)
        assert isinstance(verdicts[0].error, DeadlineExceeded)
        assert verdicts[1].latents.isfinite().all()

    def test_what_is_passed_after_all_ends_when_its_time_is_over(self, bench: Bench) -> None:
        box = bench.submit(ask(NUM_STEPS=4, scheduling=Scheduling(deadline_ms=4000)))
        urgent = bench.submit(ask(NUM_STEPS=2, scheduling=Scheduling(priority_level=0)))
        bench.run_out(box, urgent)
        assert isinstance(box.error, DeadlineExceeded)
        assert "passed after" in str(box.error)
        assert urgent.latents.isfinite().all()

    def test_nothing_is_refused_before_any_step_was_timed(self, make_bench: MakeBench) -> None:
        bench = make_bench()
        box = bench.submit(ask(NUM_STEPS=1, scheduling=Scheduling(deadline_ms=1)))
        assert not box.updates


def test_a_full_queue_refuses_and_goes_on(make_bench: MakeBench) -> None:
    bench = make_bench(max_queue_size=3)
    held = [bench.submit(ask(SEED=seed)) for seed in (1, 2, 3)]
    refused = bench.submit(ask())
    assert isinstance(refused.error, ResourceExhausted)
    assert str(refused.error).startswith("[RESOURCE_EXHAUSTED] 3 requests wait or run already")
    bench.run_out(*held)
    again = bench.submit(ask())
    bench.run_out(again)
    assert again.latents.isfinite().all()


class TestFailures:
    def test_what_fails_together_runs_alone_and_one_alone_ends(
        self, make_bench: MakeBench, alone: list[torch.Tensor]
    ) -> None:
        bench = make_bench()
        boxes = [bench.submit(CROWD[index]) for index in (0, 1, 2)]
        bench.stage.turn()

        def fail() -> None:
            raise RuntimeError("the device is in a bad mood")

        bench.experts.during_step = fail
        bench.stage.turn()  # all three
        bench.stage.turn()  # one of them
        bench.experts.during_step = lambda: None
        bench.run_out(*boxes)
        errors = [box.updates[-1] for box in boxes if isinstance(box.updates[-1], TurboError)]
        assert [str(error) for error in errors] == ["denoiser failed: RuntimeError: the device is in a bad mood"]
        for box, expected in zip(boxes, alone, strict=False):
            if not isinstance(box.updates[-1], TurboError):
                assert torch.equal(box.latents, expected), "a step that failed is taken again from the same state"

    def test_a_broken_request_harms_no_neighbour(self, make_bench: MakeBench, alone: list[torch.Tensor]) -> None:
        bench = make_bench()
        good = bench.submit(CROWD[0])
        huge = bench.submit(dataclasses.replace(CROWD[0], text_embeddings=torch.full((5, TINY.dit.text_dim), 3e38)))
        wrong = bench.submit(ask(NUM_STEPS=9))
        bench.run_out(good, huge)
        assert torch.equal(good.latents, alone[0])
        assert "not finite" in str(huge.error)
        assert isinstance(wrong.error, InvalidArgument)


class Store:
    """Keeps steps in memory; `begun` blocks until the test lets it go on."""

    def __init__(self, reached: tuple[int, torch.Tensor] | None = None) -> None:
        self.reached = reached
        self.saved: list[tuple[str, int, torch.Tensor]] = []
        self.may_save = threading.Event()
        self.may_save.set()

    def load(self, request_id: str) -> tuple[int, torch.Tensor] | None:
        return self.reached

    def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
        assert self.may_save.wait(60)
        self.saved.append((request_id, step, state))


class TestDurable:
    DURABLE = Scheduling(durable=True)

    def run(self, bench: Bench, request: DenoiseRequest) -> Box:
        box = Box()
        for _, update in bench.stage.denoise([request]):
            box(update)
        bench.stage.close()
        return box

    def test_goes_on_from_what_the_store_holds(self, make_bench: MakeBench, alone: list[torch.Tensor]) -> None:
        request = dataclasses.replace(CROWD[1], request_id="job 1", scheduling=self.DURABLE)
        whole = Store()
        self.run(make_bench(store=whole), request)
        for request_id, step, state in whole.saved:
            assert request_id == "job 1"
            bench = make_bench(store=Store((step, state)))
            box = self.run(bench, request)
            assert torch.equal(box.latents, alone[1])
            assert bench.experts.num_forwards == 4 - step

    @pytest.mark.parametrize(
        "reached",
        [
            (0, torch.zeros(16, 2, 18, 32, dtype=torch.float64)),
            (5, torch.zeros(16, 2, 18, 32, dtype=torch.float64)),
            (1, torch.zeros(16, 2, 18, 30, dtype=torch.float64)),
            (1, torch.zeros(16, 2, 18, 32)),
            (1, torch.full((16, 2, 18, 32), torch.nan, dtype=torch.float64)),
        ],
        ids=["no step", "too many", "shape", "dtype", "nan"],
    )
    def test_what_cannot_be_its_state_is_not_used(
        self,
        make_bench: MakeBench,
        alone: list[torch.Tensor],
        reached: tuple[int, torch.Tensor],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        request = dataclasses.replace(CROWD[1], request_id="job", scheduling=self.DURABLE)
        box = self.run(make_bench(store=Store(reached)), request)
        assert torch.equal(box.latents, alone[1])
        assert box.steps == [1, 2, 3, 4]
        assert "request job begins anew" in caplog.text

    def test_a_store_that_fails_costs_nothing(
        self, make_bench: MakeBench, alone: list[torch.Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Store):
            def load(self, request_id: str) -> None:
                raise OSError("input/output error")

            def save(self, request_id: str, step: int, state: torch.Tensor) -> None:
                raise OSError("no space left on device")

        request = dataclasses.replace(CROWD[1], request_id="job", scheduling=self.DURABLE)
        box = self.run(make_bench(store=Broken()), request)
        assert torch.equal(box.latents, alone[1])
        assert "cannot be read" in caplog.text
        assert "cannot be kept" in caplog.text

    def test_a_slow_store_gets_the_newest_step_and_holds_nobody_up(self, make_bench: MakeBench) -> None:
        store = Store()
        store.may_save.clear()
        bench = make_bench(store=store)
        box = Box()
        for _, update in bench.stage.denoise(
            [dataclasses.replace(CROWD[1], request_id="job", scheduling=self.DURABLE)]
        ):
            box(update)
        assert box.steps == [1, 2, 3, 4], "all done while the first is still being saved"
        store.may_save.set()
        bench.stage.close()
        steps = [step for _, step, _ in store.saved]
        assert steps[-1] == 4
        assert len(steps) <= 2

    def test_others_are_not_stored(self, make_bench: MakeBench) -> None:
        store = Store()
        self.run(make_bench(store=store), ask(request_id="not durable"))
        assert not store.saved

    @pytest.mark.parametrize(("request_id", "seed", "field"), [("", 7, "request id"), ("job", 0, "SEED")])
    def test_what_could_not_be_found_or_made_again_is_refused(
        self, make_bench: MakeBench, request_id: str, seed: int, field: str
    ) -> None:
        box = make_bench(store=Store()).submit(ask(request_id=request_id, SEED=seed, scheduling=self.DURABLE))
        assert isinstance(box.error, InvalidArgument)
        assert box.error.field == field


class TestThreads:
    def test_a_server_gives_what_one_process_gives(self, make_bench: MakeBench, alone: list[torch.Tensor]) -> None:
        counts: dict[tuple[str, str], float] = {}

        def count(name: str, label: str, amount: float) -> None:
            counts[name, label] = counts.get((name, label), 0.0) + amount

        bench = make_bench(max_queue_size=len(CROWD))
        bench.stage.start(count)
        boxes = [Box() for _ in CROWD]
        callers = [
            threading.Thread(target=bench.stage.submit, args=(request, box))
            for request, box in zip(CROWD, boxes, strict=True)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        bench.stage.close()
        for box, expected in zip(boxes, alone, strict=True):
            assert torch.equal(box.latents, expected)
        assert {name for name, _ in counts} <= set(COUNTERS)
        assert counts["turbo_denoiser_requests", "done"] == len(CROWD)
        steps = {int(label): amount for (name, label), amount in counts.items() if name == "turbo_denoiser_steps"}
        num_steps = sum(int(request.values["NUM_STEPS"]) for request in CROWD)  # type: ignore[call-overload]
        assert sum(size * amount for size, amount in steps.items()) == num_steps
        assert sum(steps.values()) == bench.experts.num_forwards

    def test_an_answer_that_cannot_be_given_harms_no_other(
        self, make_bench: MakeBench, alone: list[torch.Tensor], caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(update: DenoisedStep | TurboError) -> None:
            raise RuntimeError("nobody listens")

        bench = make_bench()
        bench.stage.start()
        box = Box()
        bench.stage.submit(CROWD[0], refuse)
        bench.stage.submit(CROWD[1], box)
        assert box.ended.wait(60)
        bench.stage.close()
        assert torch.equal(box.latents, alone[1])
        assert "an answer could not be given" in caplog.text

    def test_several_threads_may_denoise_in_one_process(self, make_bench: MakeBench, alone: list[torch.Tensor]) -> None:
        bench = make_bench()
        found: dict[int, torch.Tensor] = {}

        def run(index: int) -> None:
            for _, update in bench.stage.denoise([CROWD[index]]):
                if isinstance(update, DenoisedStep) and update.latents is not None:
                    found[index] = update.latents

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(CROWD))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, expected in enumerate(alone):
            assert torch.equal(found[index], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("quant_linear", [False, True])
def test_the_same_latents_on_the_gpu_whatever_runs_beside(quant_linear: bool) -> None:
    """As a server runs there: a forward for each request. Alone, in a crowd that arrives bit by bit, and resumed."""
    device = torch.device("cuda", 0)
    layout = DenoiserLayout(TINY.dit, quant_linear=quant_linear)
    net = layout.build()
    initialize_random(net, 1, device=device, dtype=torch.bfloat16, keep_fp32=layout.keep_fp32)
    net.eval().requires_grad_(False)
    net.prepare_for_inference()
    options = {"device": device, "dtype": torch.bfloat16, "provider": "triton", "max_batch_size": 1}
    store = Store()
    alone = []
    for number, request in enumerate(CROWD):
        bench = Bench(net, store=store, **options)
        durable = dataclasses.replace(request, request_id=str(number), scheduling=Scheduling(durable=True))
        for _, update in bench.stage.denoise([durable]):
            assert isinstance(update, DenoisedStep), update
        assert update.latents is not None
        alone.append(update.latents)
        bench.stage.close()
    for seed in range(4):
        order = torch.randperm(len(CROWD), generator=torch.Generator().manual_seed(seed)).tolist()
        bench, boxes = Bench(net, **options), {}
        for index in order:
            boxes[index] = bench.submit(CROWD[index])
            for _ in range(seed):
                bench.stage.turn()
        bench.run_out(*boxes.values())
        for index, box in boxes.items():
            assert torch.equal(box.latents, alone[index])
    for request_id, step, state in store.saved:
        bench = Bench(net, **options)
        resumed = bench.submit(dataclasses.replace(CROWD[int(request_id)], reached=(step, state)))
        beside = bench.submit(CROWD[0])
        bench.run_out(resumed, beside)
        assert torch.equal(resumed.latents, alone[int(request_id)])
