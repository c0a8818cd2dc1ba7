"""Make new tokenizers: a byte-level BPE trained on documents, and one token per byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from distllm.config.problems import user_error
from distllm.data.tokenizer import TextTokenizer, byte_alphabet

# Merges never cross the boundary of a match; the first alternative that fits wins. The idea is that of
# GPT-4's tokenizer.
PRE_TOKENS = "|".join(
    [
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word and the space or sign before it: " the", ".join"
        r"\p{N}{1,3}",  # digits, three at most, so that long numbers have few forms
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # a run of signs, with the end of its line: "):\n"
        r"\s*[\r\n]+",  # blank lines
        r"\s+(?!\S)",  # indentation; its last space goes with the word that follows
        r"\s+",
    ]
)


def train_bpe(
    texts: Iterator[str], vocab_size: int, special_tokens: Sequence[str], end_of_document: str
) -> TextTokenizer:
    """Train a byte-level BPE of `vocab_size` tokens: 256 bytes, merges, `end_of_document`, `special_tokens`.

    The same texts in the same order give the same tokenizer. Few texts can give fewer tokens than asked: a
    merge needs a pair that occurs twice. User errors: vocab_size below 257 + len(special_tokens), a special
    token listed twice or equal to a token that was learnt.
    """
    added = _added_tokens(special_tokens, end_of_document)
    if vocab_size < 256 + len(added):
        raise user_error(
            "tokenizer.vocab_size",
            vocab_size,
            f"a byte-level vocabulary holds 256 bytes and {len(added)} special tokens at least",
            f"tokenizer.vocab_size={256 + len(added)} or more",
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _with_added_tokens(tokenizer, added, end_of_document)


def byte_tokenizer(special_tokens: Sequence[str], end_of_document: str) -> TextTokenizer:
    """Build a tokenizer where byte b is token b, `end_of_document` is token 256, `special_tokens` follow.

    User errors: a special token listed twice, or of one character.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=[]))
    return _with_added_tokens(tokenizer, _added_tokens(special_tokens, end_of_document), end_of_document)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(special_tokens: Sequence[str], end_of_document: str) -> list[str]:
    added = [end_of_document, *special_tokens]
    twice = [token for token in dict.fromkeys(added) if added.count(token) > 1]
    if twice:
        raise user_error(
            "tokenizer.special_tokens",
            list(special_tokens),
            f"special tokens, with tokenizer.end_of_document={end_of_document}, must differ; twice: {twice}",
            "list each of them once, and not the end of document",
        )
    if "" in added:
        raise user_error("tokenizer.special_tokens", added, "a special token needs a name", "drop the ''")
    return added


def _with_added_tokens(tokenizer: Tokenizer, added: list[str], end_of_document: str) -> TextTokenizer:
    # Last in the vocabulary, so that the ids of bytes and merges do not depend on how many they are.
    ordinary = [token for token in added if tokenizer.token_to_id(token) is not None]
    if ordinary:
        raise user_error(
            "tokenizer.special_tokens",
            added,
            f"a special token must not be ordinary text of the vocabulary: {ordinary}",
            "mark it, as in '<|name|>'",
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return TextTokenizer(tokenizer, end_of_document)
