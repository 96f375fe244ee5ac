"""A byte-level BPE tokenizer learned from captions: every text has tokens, and the world's words are short."""

from __future__ import annotations

import random
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from turbo_backend.tokenizer import clean_prompt
from turbo_training.captions import LANGUAGES, TASKS, caption
from turbo_training.scene import sample_scene

_SPECIALS = ("<pad>", "</s>", "<unk>")


def train_tokenizer(folder: Path, *, vocab_size: int, num_captions: int = 20_000, seed: int = 0) -> Path:
    """Writes `tokenizer.json` into `folder`; ids are <pad> 0, </s> 1, <unk> 2, bytes, then merges.

    Words are kept apart (a space belongs to the word after it), Chinese is cut at punctuation alone.

    Returns:
        The path of the file.
    """
    generator = random.Random(seed)
    texts = (
        clean_prompt(caption(scene, generator.choice(LANGUAGES), generator, task=task, free=True))
        for _ in range(num_captions // len(TASKS))
        for task in TASKS
        for scene in [sample_scene(generator, changing_light=0.3)]
    )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+| ?[0-9]+|[^\sA-Za-z0-9\p{P}]+|\p{P}|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(token, special=True, normalized=False) for token in _SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    return path
