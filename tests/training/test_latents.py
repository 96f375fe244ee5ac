"""Latents that the denoiser's stages train on: captions of any length lie in one bank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_backend.nets.umt5 import UMT5Encoder
from turbo_backend.nets.vae import WanVAE
from turbo_backend.tokenizer import Tokenizer
from turbo_training import latents
from turbo_training.latents import load_bank, write_latents
from turbo_training.shapes import SMOKE
from turbo_training.text_forward import TextSource
from turbo_training.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.training


def test_groups_whose_longest_captions_differ_make_one_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "_ROWS", 8)  # each group is as long as its own longest caption
    monkeypatch.setattr(latents, "_RENDERED", 1)
    train_tokenizer(tmp_path / "tokenizer", vocab_size=SMOKE.model.text_encoder.vocab_size)
    tokenizer = Tokenizer.from_folder(tmp_path / "tokenizer")
    path, vae = tmp_path / "latents.pt", WanVAE(SMOKE.model.vae)
    write_latents(path, vae, tokenizer, SMOKE, task="t2v", num_clips=6, minutes=5, seed=0)
    lengths = torch.load(path, weights_only=True)["lengths"].view(6, -1)
    assert len({-(-int(longest) // 8) for longest in lengths.amax(1)}) > 1, "or this test shows nothing"
    texts = TextSource(UMT5Encoder(SMOKE.model.text_encoder), tokenizer, torch.device("cpu"))
    bank = load_bank(path, texts)
    assert bank.text.shape[:2] == (6, 4)
    assert bank.text.shape[2] == bank.nothing.embeddings.shape[1] == -(-int(lengths.max()) // 8) * 8
    is_text = torch.arange(bank.text.shape[2]) < bank.lengths[..., None]
    assert torch.equal(bank.text.abs().sum(-1) > 0, is_text)
    drawn, condition, weight = bank.draw(3, dropped=0.5, on_subjects=5)
    assert drawn.shape[0] == condition.text.embeddings.shape[0] == 3
    assert weight.shape == (3, 1, *drawn.shape[2:])
    assert float(weight.mean()) == pytest.approx(1, abs=1e-5)
    assert float(weight.max() / weight.min()) == pytest.approx(6 * latents._FIRST_FRAME)
    _, _, plain = bank.draw(3)
    assert plain[:, :, 1:].unique().numel() == plain[:, :, 0].unique().numel() == 1


def test_a_latent_frame_covers_what_any_of_its_frames_shows() -> None:
    is_there = torch.zeros(1, 9, 2, 2, dtype=torch.bool)
    is_there[0, 0, 0, 0] = is_there[0, 3, 0, 1] = is_there[0, 8, 1, 1] = True
    covers = latents._by_latent_frame(is_there)
    assert covers.nonzero().tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 2, 1, 1]]
