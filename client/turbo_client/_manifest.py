"""The replay manifest: everything needed to ask for the same video again, carried by the video's own file."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbo_client._errors import ManifestError
from turbo_client._mp4 import Mp4Error, read_comment
from turbo_client._requests import IMAGE_INPUTS, INPUTS, GenerationRequest

_VERSION_KEY = "turbodiffusion_manifest"
_VERSION = 1
#: Parameters that a replay asks for; the others that a manifest lists (width, height, ...) follow from them.
_REPLAYED = (*(name for name in (*INPUTS, *IMAGE_INPUTS) if name not in ("prompt", "seed", "image")), "fps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """How a video was made.

    Attributes:
        model: network that the server had loaded.
        ensemble: model name to call.
        prompt: as sent.
        seed: the seed used.
        parameters: every parameter, defaults filled in.
        weights: hashes of the weight files by role.
        versions: software that made the video.
        image: of the image that the video started from, its `sha256` among others; None for a video from text alone.
        raw: the whole manifest as read.
    """

    model: str
    ensemble: str
    prompt: str
    seed: int
    parameters: Mapping[str, Any]
    weights: Mapping[str, Any]
    versions: Mapping[str, Any]
    image: Mapping[str, Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    def request(self, *, image: bytes | str | os.PathLike[str] | None = None) -> GenerationRequest:
        """The request that makes the same video: `client.generate(**manifest.request().arguments())`.

        Args:
            image: the image that the video started from, which a manifest holds by its hash alone.

        Raises:
            ManifestError: a parameter has a type that cannot be sent, or the image is absent, another one, or too much.
            OSError: the image file cannot be read.
        """
        image = self._checked(image)
        chosen = {name: self.parameters[name] for name in _REPLAYED if self.parameters.get(name) is not None}
        try:
            return GenerationRequest(self.prompt, seed=self.seed, model=self.ensemble, image=image, **chosen)
        except (TypeError, ValueError) as error:
            raise ManifestError(f"the manifest cannot be replayed: {error}") from None

    def _checked(self, image: bytes | str | os.PathLike[str] | None) -> bytes | None:
        if self.image is None:
            if image is not None:
                raise ManifestError("the video was made from text alone: it takes no image")
            return None
        facts = f"{self.image.get('format')}, {self.image.get('width')}x{self.image.get('height')} pixels"
        then = self.image["sha256"]
        if image is None:
            raise ManifestError(f"the video started from an image ({facts}, sha256 {then}): give it with --image")
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        now = hashlib.sha256(content).hexdigest()
        if now != then:
            raise ManifestError(f"not the image that the video started from ({facts}): sha256 {now}, not {then}")
        return content

    def differences(self, report: Mapping[str, Any]) -> list[str]:
        """What differs between this manifest and a new video's REPORT, one line each; empty means the same set-up."""
        found = []
        if report.get("model") != self.model:
            found.append(f"model: {self.model} then, {report.get('model')} now")
        for name in ("weights", "versions"):
            then, now = getattr(self, name), report.get(name)
            now = now if isinstance(now, Mapping) else {}
            found += [
                f"{name}.{key}: {then.get(key, 'absent')} then, {now.get(key, 'absent')} now"
                for key in sorted({*then, *now})
                if then.get(key) != now.get(key)
            ]
        return found


def read_manifest(source: str | os.PathLike[str] | bytes) -> Manifest:
    """Reads the replay manifest out of an MP4, given as a path or as its bytes.

    Raises:
        ManifestError: no MP4, no manifest in it, or one that cannot be understood.
        OSError: the file cannot be read.
    """
    try:
        if isinstance(source, bytes):
            return parse_manifest(read_comment(io.BytesIO(source), len(source)))
        with open(source, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            return parse_manifest(read_comment(file, size))
    except (Mp4Error, ManifestError) as error:
        name = "the video" if isinstance(source, bytes) else os.fspath(source)
        raise ManifestError(f"{name} {error}") from None


def parse_manifest(text: str) -> Manifest:
    """Reads a manifest's JSON. Messages go on after a file's name: "has ...", "is ..."."""
    try:
        raw = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ManifestError("has a comment that is not a TurboDiffusion manifest") from None
    if not isinstance(raw, dict) or _VERSION_KEY not in raw:
        raise ManifestError("has a comment that is not a TurboDiffusion manifest")
    if raw[_VERSION_KEY] != _VERSION or isinstance(raw[_VERSION_KEY], bool):
        raise ManifestError(f"has a manifest of version {_shown(raw[_VERSION_KEY])}; this client reads {_VERSION}")
    image = None if "image" not in raw else _typed(raw, "image", dict)
    if image is not None:
        _typed(image, "sha256", str)
    return Manifest(
        model=_typed(raw, "model", str),
        ensemble=_typed(raw, "ensemble", str),
        prompt=_typed(raw, "prompt", str),
        seed=_typed(raw, "seed", int),
        parameters=_typed(raw, "parameters", dict),
        weights=_typed(raw, "weights", dict),
        versions=_typed(raw, "versions", dict),
        image=image,
        raw=raw,
    )


def _typed(raw: dict[str, Any], name: str, kind: type) -> Any:
    value = raw.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ManifestError(f"has a manifest whose {name!r} is {_shown(value)}, not a {kind.__name__}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
