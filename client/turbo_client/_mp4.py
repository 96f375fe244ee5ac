"""The comment tag of an MP4 file, found by walking its boxes.

ISO/IEC 14496-12 box: 32-bit size (1: a 64-bit size follows the type; 0: to the end), 4-byte type, body.
The tag sits at moov / udta / meta / ilst / ©cmt / data, as iTunes and FFmpeg write it. Nothing in the file is trusted:
sizes are checked against the box around them, the boxes looked at and the bytes read are limited.
"""

from __future__ import annotations

from typing import BinaryIO

_MAX_BOXES = 10_000
_MAX_COMMENT_BYTES = 4 * 2**20
_PATH = (b"moov", b"udta", b"meta", b"ilst", b"\xa9cmt", b"data")
_UTF8 = 1


class Mp4Error(ValueError):
    """The file is not an MP4, is damaged, or has no comment; the message says which."""


def read_comment(file: BinaryIO, size: int) -> str:
    """The comment tag of the MP4 in `file`, which is `size` bytes long and seekable.

    Raises:
        Mp4Error: see there.
        OSError: the file cannot be read.
    """
    return _Walk(file, size).comment()


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._boxes_left = _MAX_BOXES

    def comment(self) -> str:
        if self._read(4, 4, self._size) not in (b"ftyp", b"moov", b"free", b"skip", b"wide", b"mdat"):
            raise Mp4Error("is not an MP4 file")
        start, end = 0, self._size
        for kind in _PATH:
            if kind == b"ilst":
                start = self._skip_version(start, end)
            body = self._find(kind, start, end)
            if body is None:
                raise Mp4Error("has no comment tag")
            start, end = body
        return self._text(start, end)

    def _read(self, start: int, count: int, end: int) -> bytes:
        if start + count > end:
            raise Mp4Error("is damaged: a box is cut short")
        self._file.seek(start)
        content = self._file.read(count)
        if len(content) != count:
            raise Mp4Error("is damaged: it ends early")
        return content

    def _find(self, kind: bytes, start: int, end: int) -> tuple[int, int] | None:
        """Body (start, end) of the first box of `kind` between two positions."""
        # Fewer than 8 bytes are no box: QuickTime closes some lists with a 32-bit zero.
        while end - start >= 8:
            self._boxes_left -= 1
            if self._boxes_left < 0:
                raise Mp4Error(f"is damaged: more than {_MAX_BOXES} boxes")
            header = self._read(start, 8, end)
            length, head = int.from_bytes(header[:4], "big"), 8
            if length == 1:
                length, head = int.from_bytes(self._read(start + 8, 8, end), "big"), 16
            elif length == 0:
                length = end - start
            if length < head or start + length > end:
                raise Mp4Error(f"is damaged: box {header[4:]!r} at byte {start} has an impossible size")
            if header[4:] == kind:
                return start + head, start + length
            start += length
        return None

    def _skip_version(self, start: int, end: int) -> int:
        """`meta` begins with a version and flags in MP4, and directly with a box in QuickTime."""
        return start if self._read(start + 4, 4, end) == b"hdlr" else start + 4

    def _text(self, start: int, end: int) -> str:
        if end - start > _MAX_COMMENT_BYTES:
            raise Mp4Error(f"has a comment tag of {end - start} bytes; at most {_MAX_COMMENT_BYTES} are read")
        body = self._read(start, end - start, end)
        if len(body) < 8 or int.from_bytes(body[:4], "big") != _UTF8:
            raise Mp4Error("has a comment tag that is not text")
        try:
            return body[8:].decode()
        except UnicodeDecodeError:
            raise Mp4Error("has a comment tag that is not UTF-8") from None
