"""Durable jobs of an asyncio client: `client.jobs`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from turbo_client._errors import InternalError, TurboDiffusionError, UnavailableError, UnreachableError
from turbo_client._generation import Progress
from turbo_client._jobs import JobsAnswer, JobStatus, decode_answer, encode_call
from turbo_client._requests import GenerationRequest
from turbo_client._session import takes
from turbo_client._video import Video

if TYPE_CHECKING:
    from turbo_client._async_client import AsyncClient


class AsyncJobs:
    """Requests that the server keeps and runs by itself: over lost connections, and over its own restarts.

        job = await client.jobs.submit("a red fox", seed=7, request_id="fox-7")
        async for progress in client.jobs.watch(job.job_id):
            print(progress.stage, progress.step)
        (await client.jobs.result(job.job_id)).save("fox.mp4")

    Every method raises what `turbo_client._errors` lists; for an id without a job, NotFoundError.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @takes(GenerationRequest)
    async def submit(self, request: GenerationRequest) -> JobStatus:
        """Submits a job and returns at once. Parameters are those of `GenerationRequest`; `request_id` names the job.

        Sent again with the same parameters it names the same job, so a lost connection costs nothing: it is retried.

        Raises:
            AlreadyExistsError: the id is that of a job with other parameters.
        """
        _, message = self._client._submission(request)
        attempt = 0
        while True:
            attempt += 1
            try:
                return (await self._send(message)).job
            except (UnreachableError, UnavailableError, InternalError):
                if attempt >= self._client.retries.max_attempts:
                    raise
            await asyncio.sleep(self._client.retries.delay(attempt))

    async def status(self, job_id: str) -> JobStatus:
        """How far a job is."""
        return (await self._send(encode_call("status", job_id=job_id))).job

    async def list(self) -> list[JobStatus]:
        """Every job that the server keeps, in the order of submission."""
        found: list[JobStatus] = []
        cursor = 0
        while True:
            answer = await self._send(encode_call("list", cursor=cursor))
            if not answer.jobs:
                return found
            found += answer.jobs
            cursor = answer.cursor

    async def watch(self, job_id: str, *, timeout: float | None = None) -> AsyncIterator[Progress]:
        """Yields what a job reports until it is done, over lost connections and restarts of the server.

        Args:
            timeout: seconds; None for the client's, `math.inf` for none.

        Raises:
            CancelledError: the job was cancelled.
            DeadlineExceededError: it did not end in time.
            TurboDiffusionError: it failed, in the class of its error.
        """
        wait = self._client._wait(job_id, "watch", timeout)
        while True:
            try:
                answer = await self._send(wait.message(), timeout=self._client.timeout.status)
            except TurboDiffusionError as error:
                wait.fail(error)
            else:
                for progress in wait.receive(answer):
                    yield progress
                if wait.has_ended():
                    return
            await asyncio.sleep(wait.pause())

    async def result(self, job_id: str, *, timeout: float | None = None) -> Video:
        """Waits for a job's end and returns its video; arguments and errors as in `watch`."""
        wait = self._client._wait(job_id, "result", timeout)
        while True:
            try:
                wait.receive(await self._send(wait.message(), timeout=wait.remaining()))
            except TurboDiffusionError as error:
                wait.fail(error)
            else:
                if wait.video is not None:
                    return wait.video
                wait.has_ended()
            await asyncio.sleep(wait.pause())

    async def cancel(self, job_id: str) -> JobStatus:
        """Cancels a job: a queued one at once, a running one within its next step; what has ended stays as it is."""
        return (await self._send(encode_call("cancel", job_id=job_id))).job

    async def resume(self, job_id: str) -> JobStatus:
        """Goes on with an interrupted, failed or cancelled job after its last finished step."""
        return (await self._send(encode_call("resume", job_id=job_id))).job

    async def delete(self, job_id: str) -> JobStatus:
        """Removes a job that is not queued or running, with its video; returns how it was."""
        return (await self._send(encode_call("delete", job_id=job_id))).job

    async def _send(self, message: Any, *, timeout: float | None = None) -> JobsAnswer:
        limit = self._client.timeout.status if timeout is None else timeout
        return decode_answer(await self._client._call("ModelInfer", message, timeout=limit))
