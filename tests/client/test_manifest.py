"""Replay manifests, and the MP4 reader that finds them in files that nobody vouches for."""

import contextlib
import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import av
import pytest
from fake_triton import MANIFEST, REPORT, make_mp4
from hypothesis import given
from hypothesis import strategies as st

from turbo_client import GenerationRequest, Manifest, ManifestError, read_manifest
from turbo_client._manifest import parse_manifest
from turbo_client._mp4 import Mp4Error, read_comment

MP4 = make_mp4(json.dumps(MANIFEST))
BOXES = MP4.index(b"moov") - 4  # from here on the file is metadata


def box(kind: bytes, body: bytes, *, size: int | None = None) -> bytes:
    return struct.pack(">I", len(body) + 8 if size is None else size) + kind + body


def tagged(text: bytes, *, flags: int = 1) -> bytes:
    """The smallest file with a comment tag."""
    data = box(b"data", struct.pack(">II", flags, 0) + text)
    meta = b"\0\0\0\0" + box(b"hdlr", bytes(25)) + box(b"ilst", box(b"\xa9nam", b"x") + box(b"\xa9cmt", data))
    return box(b"ftyp", b"isom") + box(b"moov", box(b"mvhd", bytes(4)) + box(b"udta", box(b"meta", meta)))


def comment(content: bytes) -> str:
    return read_comment(io.BytesIO(content), len(content))


def test_manifest_of_a_real_file(mp4: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(mp4)
    for source in (mp4, tmp_path / "a.mp4", str(tmp_path / "a.mp4")):
        manifest = read_manifest(source)
        assert isinstance(manifest, Manifest)
        assert manifest.prompt == "红色的狐狸 in the snow"
        assert (manifest.seed, manifest.model, manifest.ensemble) == (4242, "tiny", "text_to_video")
        assert manifest.raw == MANIFEST


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe+empty_moov"}])
def test_layouts_that_muxers_write(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options=options) as file:
        file.metadata["title"] = "another tag"
        file.metadata["comment"] = json.dumps(MANIFEST)
        stream = file.add_stream("libx264", rate=16, width=32, height=16, pix_fmt="yuv420p")
        file.mux(stream.encode(av.VideoFrame(32, 16, "yuv420p")))
        file.mux(stream.encode())
    assert read_manifest(path).raw == MANIFEST


def test_quicktime_layout_without_version() -> None:
    data = box(b"data", struct.pack(">II", 1, 0) + b"hello")
    meta = box(b"hdlr", bytes(25)) + box(b"ilst", box(b"\xa9cmt", data))
    assert comment(box(b"moov", box(b"udta", box(b"meta", meta) + bytes(4)))) == "hello"


def test_sizes_of_64_bits_and_to_the_end() -> None:
    moov = tagged(b"hello")[12:]
    wide = struct.pack(">I4sQ", 1, b"moov", len(moov) + 8) + moov[8:]
    assert comment(box(b"ftyp", b"isom") + wide) == "hello"
    assert comment(box(b"ftyp", b"isom") + struct.pack(">I", 0) + moov[4:]) == "hello"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut short"),
        (b"\x89PNG\r\n\x1a\n" * 4, "not an MP4"),
        (box(b"ftyp", b"isom"), "no comment tag"),
        (make_mp4(None), "no comment tag"),
        (tagged(b"x", flags=13), "not text"),
        (tagged(b"\xff\xfe"), "not UTF-8"),
        (box(b"ftyp", b"isom") + box(b"moov", b"", size=7), "impossible size"),
        (box(b"ftyp", b"isom") + box(b"moov", b"", size=10**6), "impossible size"),
        (box(b"ftyp", b"isom") + struct.pack(">I4sQ", 1, b"moov", 2**63), "impossible size"),
        (box(b"ftyp", b"isom") + box(b"free", b"") * 10_001, "more than 10000 boxes"),
        (tagged(b"x" * (5 * 2**20)), "at most 4194304"),
    ],
)
def test_damaged_files_say_what_is_wrong(content: bytes, says: str) -> None:
    with pytest.raises(Mp4Error, match=says):
        comment(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"turbodiffusion_manifest": 2}, "version 2; this client reads 1"),
        ({"turbodiffusion_manifest": True}, "version True"),
        ({"seed": "7"}, "'seed' is '7', not a int"),
        ({"seed": True}, "'seed' is True"),
        ({"prompt": None}, "'prompt' is None"),
        ({"parameters": []}, r"'parameters' is \[\]"),
        ({"weights": "x" * 500}, r"'weights' is '.{49}\.\.\."),
    ],
)
def test_manifests_that_cannot_be_understood(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        read_manifest(tagged(json.dumps(MANIFEST | change).encode()))


@pytest.mark.parametrize("text", [b"just words", b"[1]", b"{}", b"[" * 100_000, b'{"turbodiffusion_manifest": NaN}'])
def test_comments_that_are_no_manifest(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(tagged(text))
    with pytest.raises(ManifestError, match=r"a\.mp4 has a comment that is not a TurboDiffusion manifest"):
        read_manifest(tmp_path / "a.mp4")


def test_files_that_are_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        read_manifest("/nonexistent.mp4")


def test_request_of_a_manifest() -> None:
    assert parse_manifest(json.dumps(MANIFEST)).request() == GenerationRequest(
        "红色的狐狸 in the snow", seed=4242, model="text_to_video", num_steps=2, num_frames=5, resolution="144p",
        aspect_ratio="16:9", sigma_max=80.0, attention_type="sla", sla_topk=0.25, ode=True, fps=24,
    )  # fmt: skip


@pytest.mark.parametrize("parameters", [{"num_steps": "four"}, {"ode": 1}, {"num_frames": 2**40}])
def test_parameters_that_cannot_be_sent(parameters: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="cannot be replayed"):
        parse_manifest(json.dumps(MANIFEST | {"parameters": parameters})).request()


def test_differences_are_named() -> None:
    manifest = parse_manifest(json.dumps(MANIFEST))
    assert manifest.differences(REPORT) == []
    other = REPORT | {"model": "wan", "weights": {"denoiser": "sha256:bb", "vae": "sha256:cc"}, "versions": {}}
    assert manifest.differences(other) == [
        "model: tiny then, wan now",
        "weights.denoiser: sha256:aa then, sha256:bb now",
        "weights.vae: absent then, sha256:cc now",
        "versions.server: 0.1.0 then, absent now",
    ]
    assert len(manifest.differences({})) == 3


@given(st.binary(max_size=400))
def test_any_bytes_end_in_a_manifest_error(content: bytes) -> None:
    with pytest.raises(ManifestError):
        read_manifest(b"\0\0\0\x0cftypisom" + content)


@given(
    changes=st.lists(st.tuples(st.integers(BOXES, len(MP4) - 1), st.integers(0, 255)), min_size=1, max_size=8),
    end=st.integers(0, len(MP4)),
)
def test_any_damage_gives_a_manifest_or_a_manifest_error(changes: list[tuple[int, int]], end: int) -> None:
    content = bytearray(MP4)
    for place, value in changes:
        content[place] = value
    with contextlib.suppress(ManifestError):
        read_manifest(bytes(content[:end]))
    with contextlib.suppress(ManifestError):
        read_manifest(bytes(content))


@given(
    st.dictionaries(
        st.sampled_from(list(MANIFEST)) | st.text(max_size=3),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dictionaries(st.text(), st.integers()),
    )
)
def test_any_json_gives_a_request_or_a_manifest_error(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ManifestError):
        parse_manifest(json.dumps(MANIFEST | changes)).request()


IMAGE = b"an image file"
WITH_IMAGE = MANIFEST | {
    "ensemble": "image_to_video",
    "parameters": {**MANIFEST["parameters"], "boundary": 0.8, "adaptive_resolution": True, "fit": "crop"},
    "image": {"sha256": hashlib.sha256(IMAGE).hexdigest(), "format": "PNG", "width": 40, "height": 30},
}


def test_replay_asks_for_the_very_image(tmp_path: Path) -> None:
    manifest = parse_manifest(json.dumps(WITH_IMAGE))
    (tmp_path / "a.png").write_bytes(IMAGE)
    for image in (IMAGE, tmp_path / "a.png"):
        request = manifest.request(image=image)
        assert (request.image, request.model) == (IMAGE, "image_to_video")
        assert (request.boundary, request.adaptive_resolution, request.fit) == (0.8, True, "crop")
    with pytest.raises(ManifestError, match=r"an image \(PNG, 40x30 pixels, sha256 .*give it with --image"):
        manifest.request()
    with pytest.raises(ManifestError, match="not the image that the video started from"):
        manifest.request(image=b"another")
    with pytest.raises(ManifestError, match="it takes no image"):
        parse_manifest(json.dumps(MANIFEST)).request(image=IMAGE)


@pytest.mark.parametrize("image", [None, [], {}, {"sha256": 3}])
def test_damaged_facts_of_an_image(image: object) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(json.dumps(MANIFEST | {"image": image}))
