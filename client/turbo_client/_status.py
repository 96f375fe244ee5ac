"""What a server says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """One model of the server's repository.

    Attributes:
        name: as requests name it.
        ready: whether any version serves.
        state: Triton's word for the newest version: "READY", "LOADING", "UNAVAILABLE", ...
        versions: versions in the order that the server lists them.
        reason: why it is not ready, where the server says so.
    """

    name: str
    ready: bool
    state: str
    versions: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """A server's health.

    Attributes:
        live: it answers.
        ready: it and all of its models serve.
        name, version: of the server software.
        models: by name.
    """

    live: bool
    ready: bool
    name: str
    version: str
    models: tuple[ModelStatus, ...]

    @classmethod
    def of(cls, live: Any, ready: Any, metadata: Any, index: Any) -> ServerStatus:
        """Assembles the answers to ServerLive, ServerReady, ServerMetadata and RepositoryIndex."""
        by_name: dict[str, list[Any]] = {}
        for entry in index.models:
            by_name.setdefault(entry.name, []).append(entry)
        models = tuple(
            ModelStatus(
                name=name,
                ready=any(entry.state == "READY" for entry in entries),
                state=entries[-1].state or "UNLOADED",
                versions=tuple(entry.version for entry in entries if entry.version),
                reason=entries[-1].reason,
            )
            for name, entries in sorted(by_name.items())
        )
        return cls(live=live.live, ready=ready.ready, name=metadata.name, version=metadata.version, models=models)
