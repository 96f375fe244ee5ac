"""Triton adapter of the jobs: one unary call an operation; the jobs themselves run in threads, through the ensemble."""

from turbo_backend import triton_adapter as triton
from turbo_backend.cancellation import Cancellations
from turbo_backend.errors import TurboError
from turbo_backend.jobs.ensemble import generate
from turbo_backend.jobs.lifecycle import JobsLifecycle
from turbo_backend.jobs.service import Call, JobService
from turbo_backend.jobs.standstill import StandstillGuard
from turbo_backend.settings import Settings


class TritonPythonModel:
    @triton.tells_failure
    def initialize(self, args):
        self._guard = StandstillGuard()
        settings = Settings.from_environment()
        self._counters = {
            "resume": triton.Counter("turbo_job_resumes", "Jobs that went on after an interruption", "ensemble"),
            "cancel": triton.Counter("turbo_job_cancels", "Jobs that were cancelled", "ensemble"),
        }
        self._by_state = triton.Gauge("turbo_jobs", "Jobs in the store", "state")
        self._bytes = triton.Gauge("turbo_job_store_bytes", "Bytes that the jobs take in the store")
        self._cancellations = Cancellations.of_server()

        def count(what, ensemble):
            self._counters[what].increment(ensemble)

        self._lifecycle = JobsLifecycle(settings, generate, self._cancellations, count, self._observe)
        self._service = JobService(self._lifecycle.runner, settings.ensembles, self._cancellations.request)

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def finalize(self):
        self._lifecycle.stop()
        self._guard.stop()
        self._cancellations.close()

    def _observe(self, runner):
        for state, number in runner.counts().items():
            self._by_state.set(number, state.value)
        self._bytes.set(runner.num_bytes())

    def _answer(self, request):
        try:
            return _respond(self._service.answer(_read(request)))
        except TurboError as error:
            return triton.error_response(error, request.request_id())
        except OSError as error:  # of the cancellations' folder
            return triton.error_response(TurboError(f"cancelling failed: {error}"), request.request_id())


def _read(request):
    def read(name):
        return triton.read_scalar(request, name)

    return Call(
        operation=read("OPERATION"),
        job_id=read("JOB_ID"),
        cursor=read("CURSOR") or 0,
        model=read("MODEL"),
        prompt=read("PROMPT"),
        image=triton.read_optional_bytes(request, "IMAGE"),
        values=triton.read_values(request),
        parameters=triton.read_parameters(request),
    )


def _respond(answer):
    jobs = [(job.request, job.progress) for job in answer.jobs]
    latest, events = answer.latest, answer.events
    return triton.response(
        triton.write_texts("JOB_ID", [request.job_id for request, _ in jobs]),
        triton.write_texts("STATE", [progress.state.value for _, progress in jobs]),
        triton.write_texts("STAGE", [event.stage for event in latest]),
        triton.write_numbers("STEP", [event.step for event in latest], "int32"),
        triton.write_numbers("STEP_COUNT", [event.step_count for event in latest], "int32"),
        triton.write_numbers("SEED", [request.seed for request, _ in jobs], "int64"),
        triton.write_numbers("PRIORITY_LEVEL", [request.priority_level for request, _ in jobs], "int32"),
        triton.write_numbers("RESUMES", [progress.resumes for _, progress in jobs], "int32"),
        triton.write_numbers("SUBMITTED_AT", [request.submitted_at for request, _ in jobs], "float64"),
        triton.write_numbers("ENDED_AT", [progress.ended_at or 0.0 for _, progress in jobs], "float64"),
        triton.write_numbers("VIDEO_BYTES", [progress.video_bytes for _, progress in jobs], "int64"),
        triton.write_texts("ERROR_CODE", [progress.error_code for _, progress in jobs]),
        triton.write_texts("ERROR", [progress.error for _, progress in jobs]),
        triton.write_texts("EVENT_STAGE", [event.stage for event in events]),
        triton.write_numbers("EVENT_STEP", [event.step for event in events], "int32"),
        triton.write_numbers("EVENT_STEP_COUNT", [event.step_count for event in events], "int32"),
        triton.write_numbers("EVENT_SECONDS", [event.seconds for event in events], "float64"),
        triton.write_texts("EVENT_PREVIEW", [event.preview for event in events]),
        triton.write_numbers("CURSOR", [answer.cursor], "int64"),
        triton.write_bytes("VIDEO", answer.video),
        triton.write_bytes("REPORT", answer.report),
    )
