"""Prompts to token ids: cleaning as upstream does, then a UMT5 tokenizer from a local folder."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import ftfy
import sentencepiece
import tokenizers

from turbo_backend.errors import CheckpointError

END_OF_TEXT = "</s>"


def clean_prompt(text: str) -> str:
    """Repairs encoding accidents, resolves HTML entities and collapses white space.

    ftfy.fix_text, html.unescape twice, then every run of white space to one space and none at the ends: the
    "whitespace" cleaning of Wan2.1.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A tokenizer read from a folder; nothing is ever fetched.

    Special tokens written out in a prompt (`</s>`, `<pad>`) are text like any other.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1.
        end_id: id of </s>.
    """

    def __init__(self, encode_text: Callable[[str], list[int]], *, vocab_size: int, end_id: int) -> None:
        self._encode_text = encode_text
        self.vocab_size = vocab_size
        self.end_id = end_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer in `folder`: its `tokenizer.json`, else its `spiece.model`.

        Raises:
            CheckpointError: neither is there, or the one there cannot be read or has no </s>.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            return cls._from_json(folder / "tokenizer.json")
        if (folder / "spiece.model").is_file():
            return cls._from_sentencepiece(folder / "spiece.model")
        state = "holds neither" if folder.is_dir() else "is not a folder; needed there:"
        raise CheckpointError(f"tokenizer: {folder} {state} tokenizer.json nor spiece.model")

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it is, then </s>; the empty text is </s> alone."""
        return [*self._encode_text(text), self.end_id]

    @classmethod
    def _from_json(cls, path: Path) -> Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"tokenizer: {path} cannot be read: {error}") from error
        end_id = tokenizer.token_to_id(END_OF_TEXT)
        if end_id is None:
            raise CheckpointError(f"tokenizer: {path} has no token {END_OF_TEXT}")
        # Files may ask for both; the length is the caller's to judge.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True

        def encode_text(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        # Not their number: added tokens may leave gaps.
        vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        return cls(encode_text, vocab_size=vocab_size, end_id=end_id)

    @classmethod
    def _from_sentencepiece(cls, path: Path) -> Tokenizer:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # RuntimeError or OSError, depending on what is wrong
            raise CheckpointError(f"tokenizer: {path} cannot be read: {error}") from error
        end_id = processor.eos_id()
        if end_id < 0:
            raise CheckpointError(f"tokenizer: {path} has no token {END_OF_TEXT}")

        def encode_text(text: str) -> list[int]:
            return list(processor.encode(text, out_type=int))

        return cls(encode_text, vocab_size=processor.get_piece_size(), end_id=end_id)
