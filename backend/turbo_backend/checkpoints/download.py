"""Fetching published files from the Hugging Face hub, only when asked to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_backend.checkpoints.fingerprint import file_sha256
from turbo_backend.checkpoints.published import PublishedFile
from turbo_backend.checkpoints.writer import require_free_space
from turbo_backend.errors import CheckpointError

_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """What the hub says of a file: its size, and its SHA-256 where it is stored as a large file."""

    file: PublishedFile
    size: int
    sha256: str | None


def endpoint() -> str:
    """The hub to ask: HF_ENDPOINT, else huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def ask_hub(files: Sequence[PublishedFile]) -> list[RemoteFile]:
    """Size and hash of each file, before anything is fetched.

    Raises:
        CheckpointError: the hub cannot be reached, or does not have a file (or not for this user).
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = []
    for file in files:
        url = hf_hub_url(file.repository, file.name, endpoint=endpoint())
        try:
            answer = get_hf_file_metadata(url)
        except Exception as error:
            raise CheckpointError(_explain(file, error)) from error
        if answer.size is None:
            raise CheckpointError(f"{file.repository}/{file.name}: {endpoint()} does not tell its size")
        etag = answer.etag or ""
        found.append(RemoteFile(file=file, size=answer.size, sha256=etag if len(etag) == _SHA256_DIGITS else None))
    return found


def fetch(remote: RemoteFile, folder: Path) -> Path:
    """Downloads one file to `folder / name`.

    It appears under its name only when whole, and an interrupted download goes on where it stopped (the part lies
    in `folder/.cache/huggingface`). Progress goes to stderr. The contents are compared with the hub's SHA-256.

    Raises:
        CheckpointError: the connection failed, the disk is too full, or the contents are not those announced.
    """
    from huggingface_hub import hf_hub_download

    file = remote.file
    require_free_space(folder, remote.size)
    try:
        path = Path(hf_hub_download(file.repository, file.name, local_dir=folder, endpoint=endpoint()))
    except Exception as error:
        raise CheckpointError(_explain(file, error)) from error
    expected = file.sha256 or remote.sha256
    if path.stat().st_size != remote.size or (expected is not None and file_sha256(path) != expected):
        path.unlink()
        raise CheckpointError(f"{file.name}: what {endpoint()} sent is not the published file; it was removed")
    return path


def _explain(file: PublishedFile, error: Exception) -> str:
    """One line for whatever the hub's client raises."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    name = f"{file.repository}/{file.name}"
    if isinstance(error, GatedRepoError):
        return f"{name}: needs permission: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{name}: {endpoint()} has no such repository (or not for this user: see HF_TOKEN)"
    if isinstance(error, EntryNotFoundError) and isinstance(error, HfHubHTTPError):
        return f"{name}: {endpoint()} has no such file"
    text = str(error).strip().splitlines()
    return f"{name}: cannot be fetched from {endpoint()}: {text[0][:200] if text else type(error).__name__}"
