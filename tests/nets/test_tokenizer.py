"""Prompt cleaning and tokenizers from a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from turbo_backend.checkpoints import tiny_checkpoint_folder
from turbo_backend.config import MODELS
from turbo_backend.errors import CheckpointError
from turbo_backend.tokenizer import Tokenizer, clean_prompt

PROMPTS = (
    "",
    "a cat",
    "一只猫在草地上奔跑，阳光明媚",
    "A cat 一只猫 walks über die Straße",
    "🐈‍⬛ e\u0301 \U0001f1e9\U0001f1ea",
    "two  spaces, a tab\tand\nlines",
    "</s> <pad> <unk>",
)


@pytest.fixture(scope="module")
def tiny_folder() -> Path:
    return tiny_checkpoint_folder() / MODELS["tiny"].tokenizer


@pytest.fixture(scope="module")
def spiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat walks over the grass", "the grass is green", "一只猫在草地上奔跑"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  a   cat \n\t walks ", "a cat walks"),
        ("a\u3000cat\u00a0walks\u2003far", "a cat walks far"),
        ("schÃ¶n, the mÃ©lange", "schön, the mélange"),
        ("it\u00e2\u20ac\u2122s a cat", "it's a cat"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("&lt;cat&gt; &quot;black&quot;", '<cat> "black"'),
        ("a&nbsp;&nbsp;cat&#32;", "a cat"),
        ("一只猫，在草地上　奔跑", "一只猫,在草地上 奔跑"),
        ("A cat 一只猫 🐈", "A cat 一只猫 🐈"),
        ("\u201cquoted\u201d", '"quoted"'),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        (" \n\u3000 ", ""),
        ("", ""),
    ],
)
def test_clean_prompt(raw: str, cleaned: str) -> None:
    assert clean_prompt(raw) == cleaned
    assert clean_prompt(cleaned) == cleaned


@given(st.text(max_size=60))
def test_clean_prompt_leaves_single_spaces(text: str) -> None:
    cleaned = clean_prompt(text)
    assert cleaned == " ".join(cleaned.split())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tiny_tokenizer_loses_nothing(tiny_folder: Path, prompt: str) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder)
    assert tokenizer.vocab_size == MODELS["tiny"].text_encoder.vocab_size
    assert tokenizer.end_id == 1
    token_ids = tokenizer.encode(prompt)
    assert len(token_ids) <= len(prompt.encode()) + 1
    assert token_ids[-1] == 1
    assert all(3 <= token_id < tokenizer.vocab_size for token_id in token_ids[:-1])
    decoder = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert decoder.decode(token_ids) == prompt


def test_tiny_file_is_read_alike_by_the_library(tiny_folder: Path) -> None:
    reader = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert reader.encode("A cat 一只猫").ids == Tokenizer.from_folder(tiny_folder).encode("A cat 一只猫")
    assert [reader.token_to_id(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


def test_truncation_and_padding_of_the_file_are_ignored(tiny_folder: Path, tmp_path: Path) -> None:
    reader = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    reader.enable_truncation(8)
    reader.enable_padding(length=16)
    reader.save(str(tmp_path / "tokenizer.json"))
    for prompt in ("cat", "a very long prompt about a cat"):
        assert Tokenizer.from_folder(tmp_path).encode(prompt) == Tokenizer.from_folder(tiny_folder).encode(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_sentencepiece(spiece_folder: Path, prompt: str) -> None:
    tokenizer = Tokenizer.from_folder(str(spiece_folder))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    token_ids = tokenizer.encode(prompt)
    assert tokenizer.vocab_size == processor.get_piece_size()
    assert token_ids == [*processor.encode(prompt), 1]
    assert token_ids.count(1) == 1
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)


def test_sentencepiece_knows_its_text(spiece_folder: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spiece_folder / "spiece.model"))
    for prompt in ("a cat walks", "一只猫在草地上奔跑 a cat"):
        assert processor.decode(Tokenizer.from_folder(spiece_folder).encode(prompt)) == prompt


def test_json_goes_before_sentencepiece(tiny_folder: Path, spiece_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    (tmp_path / "spiece.model").write_bytes((spiece_folder / "spiece.model").read_bytes())
    assert Tokenizer.from_folder(tmp_path).vocab_size == Tokenizer.from_folder(tiny_folder).vocab_size
    assert Tokenizer.from_folder(spiece_folder).vocab_size != Tokenizer.from_folder(tiny_folder).vocab_size


def test_refusals(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither tokenizer\.json nor spiece\.model"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        Tokenizer.from_folder(tmp_path / "absent")
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"spiece\.model cannot be read"):
        Tokenizer.from_folder(tmp_path)
    content = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]
    del content["model"]["vocab"]["</s>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no token </s>"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
