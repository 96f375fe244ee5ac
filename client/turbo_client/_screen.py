"""What people see: progress, summaries and messages, all on stderr; stdout belongs to results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from turbo_client._generation import Progress
from turbo_client._jobs import JobStatus
from turbo_client._manifest import Manifest
from turbo_client._status import ServerStatus
from turbo_client._video import Video

_STAGE_NAMES = {
    "text_encoder": "text encoder",
    "image_encoder": "image encoder",
    "denoiser": "denoiser",
    "vae_decoder": "decoder",
    "video_encoder": "encoder",
}
_BAR_WIDTH = 28


def printable(text: str) -> str:
    """Text from a server or a file without the control characters that could drive a terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else f"\\x{ord(character):02x}" for character in text
    )


def seconds_text(seconds: float) -> str:
    """Such as "0.8 s" or "2 min 05 s"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def stage_text(milliseconds: float) -> str:
    """Such as "35 ms" or "1.2 s"."""
    return f"{milliseconds:.0f} ms" if milliseconds < 950 else seconds_text(milliseconds / 1000)


def bytes_text(count: int) -> str:
    """Such as "214 kB"."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit != "MB" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class Screen:
    """Messages on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet

    def error(self, message: str) -> None:
        self.console.print(Text.assemble(("error: ", "bold red"), printable(message).replace("\n", " ")))

    def warn(self, message: str) -> None:
        self.console.print(Text.assemble(("warning: ", "bold yellow"), printable(message).replace("\n", " ")))

    def note(self, message: str) -> None:
        self.console.print(Text(printable(message), style="dim"))

    def progress(self) -> ProgressScreen:
        return ProgressScreen(self.console, quiet=self.quiet)

    def summary(self, video: Video, seconds: float) -> None:
        """Two quiet lines about a finished video."""
        if self.quiet:
            return
        facts = [f"{video.width}×{video.height}", f"{video.num_frames} frames"]
        if video.data is not None:
            facts += [f"{video.fps} fps", bytes_text(len(video.data))]
        facts += [f"seed {video.seed}", seconds_text(seconds)]
        self.console.print(Text(" · ".join(facts)))
        stages = video.report.get("stages")
        if isinstance(stages, dict):
            parts = [
                f"{_STAGE_NAMES.get(name, name)} {stage_text(stage['milliseconds'])}"
                for name, stage in stages.items()
                if isinstance(stage, dict) and isinstance(stage.get("milliseconds"), (int, float))
            ]
            if parts:
                self.console.print(Text(printable(" · ".join(parts)), style="dim"))
        notes = video.report.get("notes")
        for note in notes if isinstance(notes, list) else ():
            self.warn(str(note))


class ProgressScreen:
    """A line a stage while a generation runs: redrawn in place on a terminal, appended elsewhere."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._started = time.monotonic()
        self._changed = self._started
        self._lines: list[_StageLine] = []
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        if console.is_terminal and not quiet:
            self._live = Live(
                get_renderable=self._draw, console=console, refresh_per_second=10, transient=True, redirect_stdout=False
            )

    def __enter__(self) -> ProgressScreen:
        self._started = self._changed = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Takes a step into account."""
        if progress.stage == "done" or self._quiet:
            return
        now = time.monotonic()
        if not self._lines or self._lines[-1].stage != progress.stage:
            # A stage begins where the one before it ended.
            self._lines.append(_StageLine(progress.stage, self._changed))
        self._lines[-1].take(progress, now)
        self._changed = now
        if self._live is None:
            name = _STAGE_NAMES.get(progress.stage, printable(progress.stage))
            line = f"{name} {progress.step}/{progress.num_steps}  {seconds_text(progress.seconds)}"
            if progress.eta_seconds:
                line += f"  about {seconds_text(progress.eta_seconds)} left"
            self._console.print(Text(line))

    def _draw(self) -> RenderableType:
        now = time.monotonic()
        table = Table.grid(padding=(0, 1))
        table.add_column(width=1)
        table.add_column(min_width=12)
        table.add_column(width=_BAR_WIDTH)
        table.add_column(justify="right", min_width=4)
        table.add_column(justify="right", min_width=6, style="dim")
        table.add_column(style="dim")
        if not self._lines:
            table.add_row(self._spinner, "waiting", "", "", seconds_text(now - self._started), "")
        for line in self._lines:
            current = line is self._lines[-1] and not line.complete
            table.add_row(
                self._spinner if current else Text("✓", style="green"),
                _STAGE_NAMES.get(line.stage, printable(line.stage)),
                ProgressBar(total=max(1, line.num_steps), completed=line.step, width=_BAR_WIDTH),
                f"{line.step}/{line.num_steps}",
                seconds_text((now if current else line.changed) - line.started),
                line.remaining(now) if current else "",
            )
        return table


class _StageLine:
    def __init__(self, stage: str, started: float) -> None:
        self.stage = stage
        self.started = started
        self.changed = started
        self.step = 0
        self.num_steps = 0
        self.complete = False
        self._ends: float | None = None

    def take(self, progress: Progress, now: float) -> None:
        self.step, self.num_steps, self.changed = progress.step, progress.num_steps, now
        self.complete = progress.step >= progress.num_steps
        self._ends = None if progress.eta_seconds is None else now + progress.eta_seconds

    def remaining(self, now: float) -> str:
        return "" if self._ends is None else f"about {seconds_text(max(0.1, self._ends - now))} left"


def status_table(status: ServerStatus) -> RenderableType:
    """A server's models, for stdout."""
    table = Table.grid(padding=(0, 2))
    for model in status.models:
        mark = Text("✓", style="green") if model.ready else Text("✗", style="red")
        reason = "" if model.ready else printable(model.reason)
        state = Text(printable(model.state.lower()), style="" if model.ready else "red")
        table.add_row(mark, printable(model.name), state, Text(reason, style="dim"))
    return table


def jobs_table(jobs: Sequence[JobStatus]) -> RenderableType:
    """Jobs as lines of id, state, what was reported last, size of the video, and what went wrong; for stdout."""
    table = Table.grid(padding=(0, 2))
    styles = {"done": "green", "failed": "red", "cancelled": "yellow", "interrupted": "yellow"}
    for job in jobs:
        last = f"{_STAGE_NAMES.get(job.stage, job.stage)} {job.step}/{job.num_steps}" if job.stage else ""
        table.add_row(
            printable(job.job_id),
            Text(printable(job.state), style=styles.get(job.state, "")),
            printable("" if job.state == "done" else last),
            bytes_text(job.video_bytes) if job.video_bytes else "",
            Text(printable(job.error).replace("\n", " "), style="dim"),
        )
    return table


def manifest_table(manifest: Manifest) -> RenderableType:
    """A manifest as names and values, for stdout."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    rows: list[tuple[str, object]] = [
        ("prompt", manifest.prompt),
        ("seed", manifest.seed),
        ("model", manifest.model),
        ("ensemble", manifest.ensemble),
        *manifest.parameters.items(),
        *((f"image {name}", value) for name, value in (manifest.image or {}).items()),
        *((f"weights {name}", value) for name, value in manifest.weights.items()),
        *((f"version {name}", value) for name, value in manifest.versions.items()),
    ]
    for name, value in rows:
        table.add_row(Text(printable(str(name))), Text(printable(str(value))))
    return table


def stdout_console() -> Console:
    """The console of results."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)
