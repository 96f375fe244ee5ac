"""Contact sheets: frames of clips beside their captions, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_COLUMNS, _LINE = 6, 14


def write_sheet(clips: Sequence[Tensor], captions: Sequence[str], path: Path) -> None:
    """One row a clip: its caption over six frames from first to last.

    Args:
        clips: uint8 [F, H, W, 3] each.
        captions: one a clip. Letters that Pillow's own font lacks (Chinese) show as boxes: such sheets want a reader
            who has the captions in the text file that is written beside the picture.
        path: of the PNG; a `.txt` of the same name holds the captions.
    """
    height, width = clips[0].shape[1:3]
    sheet = Image.new("RGB", (_COLUMNS * width, len(clips) * (height + _LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        top = row * (height + _LINE)
        draw.text((4, top + 1), caption if caption.isascii() else f"({row + 1}) see {path.stem}.txt", fill="black")
        for column in range(_COLUMNS):
            frame = clip[round(column * (len(clip) - 1) / (_COLUMNS - 1))]
            sheet.paste(Image.fromarray(frame.cpu().numpy()), (column * width, top + _LINE))
    sheet.save(path)
    path.with_suffix(".txt").write_text("".join(f"{i + 1}. {c}\n" for i, c in enumerate(captions)), encoding="utf-8")


def to_clip(frames_CFHW: Tensor) -> Tensor:
    """Frames [3, F, H, W] in [-1, 1] to uint8 [F, H, W, 3]."""
    return ((frames_CFHW.float().clamp(-1, 1) + 1) * 127.5 + 0.5).floor().to(torch.uint8).permute(1, 2, 3, 0)


def to_video(clips: Tensor) -> Tensor:
    """uint8 [B, F, H, W, 3] to float32 [B, 3, F, H, W] in [-1, 1]."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
