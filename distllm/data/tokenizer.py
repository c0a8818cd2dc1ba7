"""Convert text to token ids and back; exact to the byte for byte-level tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from distllm.config.problems import user_error

Item = TypeVar("Item")

# The library's result takes some 100 bytes per token, and it encodes each text in one thread. So long
# documents are encoded in parts (a corpus may be one file of gigabytes), and few parts at a time.
CHARACTERS_PER_PART = 1 << 18
CHARACTERS_PER_BATCH = 1 << 23


class TextTokenizer:
    """A `tokenizers.Tokenizer` that reads documents as plain text and knows the bytes of each token.

    vocab_size: largest token id + 1. end_of_document: id of the token that closes a document.

    Text that spells a special token ("<|endoftext|>") is encoded as ordinary text, and special tokens decode
    to nothing. Byte-level tokenizers without a normalizer, such as those that we build, reproduce every byte
    string. Others (SentencePiece-like) return what their own decoder makes of the ids.
    """

    def __init__(self, library_tokenizer: Tokenizer, end_of_document: str) -> None:
        self.library_tokenizer = library_tokenizer
        self.end_of_document_text = end_of_document
        vocabulary = library_tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        if end_of_document not in vocabulary:
            special = [token.content for token in library_tokenizer.get_added_tokens_decoder().values()]
            raise user_error(
                "tokenizer.end_of_document",
                end_of_document,
                "the token that closes a document must be in the tokenizer's vocabulary",
                f"name one that is; its special tokens are {special[:20]}",
            )
        self.end_of_document: int = vocabulary[end_of_document]
        library_tokenizer.encode_special_tokens = True  # tokenizer.json does not store it
        # A published tokenizer.json may truncate or pad every text to some length: documents would be
        # damaged.
        library_tokenizer.no_truncation()
        library_tokenizer.no_padding()
        self._is_byte_level = "ByteLevel" in repr(library_tokenizer.decoder)
        self._byte_tokens = (
            byte_alphabet() if self._is_byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        )
        self._id_of_byte = [vocabulary.get(token) for token in self._byte_tokens]

    @classmethod
    def load(cls, folder: Path, end_of_document: str) -> TextTokenizer:
        """Load `folder`/tokenizer.json. User errors: no such file, a broken one, no such token.

        end_of_document: text of the token that closes a document.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise user_error(
                "tokenizer.path",
                folder,
                f"the folder must hold a tokenizer.json (looked for {file.absolute()})",
                "name a folder written by `distllm tokenizer` or by Hugging Face's save_pretrained",
            )
        try:
            library_tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            fix = "write the folder again with the tool that made it"
            raise user_error("tokenizer.path", folder, f"{file} must be readable: {error}", fix) from error
        return cls(library_tokenizer, end_of_document)

    def save(self, folder: Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` needs; reproducible bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        self.library_tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end_of_document_text,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return int32 [num_tokens] for each text, without special tokens; runs on all processor cores."""
        parts = [list(split_at_lines(text)) if self._is_byte_level else [text] for text in texts]
        encoded = []
        for batch in batched(chain.from_iterable(parts), len, CHARACTERS_PER_BATCH):
            encodings = self.library_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            encoded += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        remaining = iter(encoded)
        return [np.concatenate(list(islice(remaining, len(parts_of_text)))) for parts_of_text in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        if self._is_byte_level:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        return self.library_tokenizer.decode(list(ids), skip_special_tokens=True)

    def encode_bytes(self, content: bytes) -> list[int]:
        """Return token ids of any byte string: UTF-8 spans as text, other bytes as the token of that byte.

        ValueError: the tokenizer has no token for a byte that is needed (never for those that we build).
        """
        ids: list[int] = []
        # surrogateescape turns each byte that is not UTF-8 into one of U+DC80 to U+DCFF.
        for span in re.split("([\udc80-\udcff]+)", content.decode("utf-8", errors="surrogateescape")):
            if span and "\udc80" <= span[0] <= "\udcff":
                ids += [self._id_of_one_byte(byte) for byte in span.encode("utf-8", errors="surrogateescape")]
            elif span:
                ids += self.encode(span)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of token ids; the inverse of `encode_bytes`."""
        if self._is_byte_level:
            return b"".join(self._bytes_of_id[token] for token in ids)
        return self.decode(ids).encode()

    def token_byte_lengths(self) -> np.ndarray:
        """Return int32 [vocab_size]: bytes of UTF-8 that each token stands for; 0 for special tokens.

        Exact for byte-level tokenizers; for others an estimate from the spelling, with "▁" as a space.
        """
        return np.array([len(content) for content in self._bytes_of_id], dtype=np.int32)

    def _id_of_one_byte(self, byte: int) -> int:
        token = self._id_of_byte[byte]
        if token is None:
            raise ValueError(f"this tokenizer has no token for byte 0x{byte:02X} outside of UTF-8 text")
        return token

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        # Computed on first use: for a large vocabulary it takes a second, and encoding does not need it.
        byte_of_token = {token: bytes([byte]) for byte, token in enumerate(self._byte_tokens)}
        content = [b""] * self.vocab_size
        for token, token_id in self.library_tokenizer.get_vocab(with_added_tokens=True).items():
            if self._is_byte_level and all(character in byte_of_token for character in token):
                content[token_id] = b"".join(byte_of_token[character] for character in token)
            else:
                content[token_id] = byte_of_token.get(token) or token.replace("▁", " ").encode()
        # Added tokens are spelled in plain text, not in the byte alphabet of the model's own.
        for token_id, added in self.library_tokenizer.get_added_tokens_decoder().items():
            content[token_id] = b"" if added.special else added.content.encode()
        return content


def byte_alphabet() -> list[str]:
    """Return [256]: the character by which a byte-level vocabulary spells each byte (Radford et al. 2019).

    Printable Latin-1 stands for itself; the other bytes follow in order from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def split_at_lines(text: str, characters: int = CHARACTERS_PER_PART) -> Iterator[str]:
    """Split `text` into parts of at least `characters`, each but the last ending with a lone line break.

    Pre-tokenizers of the GPT family never join a lone "\n" with what follows, so the parts encode to the same
    tokens as the whole. After two line breaks that would not hold: GPT-2 splits between them.
    """
    lone_line_break = re.compile(r"(?<=\S)\n(?=\S)")
    start = 0
    while cut := lone_line_break.search(text, start + characters):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def batched(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Yield lists of consecutive items, each closed as soon as its sizes sum to `limit` or more."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
