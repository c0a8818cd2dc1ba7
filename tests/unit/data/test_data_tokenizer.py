from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from distllm.config.problems import UserError
from distllm.data.tokenizer import TextTokenizer, byte_alphabet, split_at_lines
from distllm.data.tokenizer_training import byte_tokenizer, train_bpe

END = "<|endoftext|>"
TEXTS = [
    inspect.getsource(argparse),
    "import os\n\n\ndef f(x):\n        return 1234567 + x\r\n\t\tpass   \n" * 200,
    "日本語の文章。नमस्ते दुनिया 🎉👩‍👩‍👧 naïve Übung\u2028\x85\x00" * 5,
]
BPE = train_bpe(iter(TEXTS), 600, ["<|pad|>"], END)
BYTES = byte_tokenizer(["<|pad|>"], END)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES])
@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda text: text.encode())))
@example(content=bytes(range(256)))
@example(content=b"\xed\xa0\x80 lone surrogate \xf0\x9f\x8e half an emoji \xff\xfe")
@example(content=TEXTS[2].encode())
@example(content=f"a{END}b<|pad|>".encode())
def test_every_byte_string_comes_back(tokenizer: TextTokenizer, content: bytes) -> None:
    ids = tokenizer.encode_bytes(content)
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.token_byte_lengths()[ids].sum() == len(content)
    assert max(ids, default=0) < 256 or tokenizer is BPE


@pytest.mark.parametrize("tokenizer", [BPE, BYTES])
@pytest.mark.parametrize("text", [*TEXTS, "", " ", "\n\n  \n", f"say {END} twice {END}<|pad|>"])
def test_text_comes_back_and_never_encodes_to_special_tokens(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.end_of_document, tokenizer.end_of_document + 1} & set(ids)


def test_byte_tokenizer_ids() -> None:
    assert BYTES.encode("aé") == [97, 195, 169]
    assert (BYTES.end_of_document, BYTES.vocab_size) == (256, 258)
    assert BYTES.token_byte_lengths().tolist() == [1] * 256 + [0, 0]
    assert BYTES.decode([104, 105, 256, 255]) == "hi\ufffd"


def test_bpe_vocabulary_and_its_splits() -> None:
    assert BPE.vocab_size == 600
    assert (BPE.end_of_document, BPE.token_byte_lengths()[598:].tolist()) == (598, [0, 0])
    assert BPE.token_byte_lengths().dtype == np.int32
    tokens = {BPE.decode([token]) for token in range(598)}
    assert {" return", " self", "def"} <= tokens
    assert any(len(token) > 4 and token.isspace() for token in tokens), "indentation is one token"
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert "123" in digits
    assert all(len(token) <= 3 for token in digits)


def test_long_texts_encode_like_their_parts() -> None:
    text = "\n".join([*TEXTS, "x\n\n\ny\n \nz\r\nw\n"]) * 3
    ids_whole = BPE.library_tokenizer.encode(text, add_special_tokens=False).ids
    for characters in (1, 50, 5000):
        parts = list(split_at_lines(text, characters))
        assert "".join(parts) == text
        assert len(parts) > 1
        assert [token for part in parts for token in BPE.encode(part)] == ids_whole


def test_batches_above_the_part_size_keep_texts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [BPE.encode(text) for text in [*TEXTS, ""]]
    monkeypatch.setattr("distllm.data.tokenizer.CHARACTERS_PER_BATCH", 100)
    monkeypatch.setattr(split_at_lines, "__defaults__", (30,))
    assert [ids.tolist() for ids in BPE.encode_batch([*TEXTS, ""])] == expected


def test_saved_tokenizer_is_read_by_us_and_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    BPE.save(tmp_path)
    ours, theirs = TextTokenizer.load(tmp_path, END), AutoTokenizer.from_pretrained(str(tmp_path))
    assert (ours.vocab_size, ours.end_of_document) == (len(theirs), theirs.eos_token_id) == (600, 598)
    assert theirs.eos_token == END
    for text in TEXTS:
        ids = BPE.encode(text)
        assert ours.encode(text) == ids == theirs(text)["input_ids"]
        assert theirs.decode(ids) == text
    assert END not in theirs.decode([1, 598], skip_special_tokens=True)
    assert ours.encode(END) == BPE.encode(END) != [598]


def test_training_gives_the_same_file_in_every_process(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from distllm.data.tokenizer_training import train_bpe
texts = [path.read_text() for path in sorted(Path(sys.argv[2]).glob('*.py'))]
train_bpe(iter(texts), 1000, [], '<|end|>').save(Path(sys.argv[1]))
"""
    for name, hash_seed, threads in [("a", "1", "1"), ("b", "2", "4")]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONHASHSEED": hash_seed,
            "RAYON_NUM_THREADS": threads,
        }
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name), str(Path(__file__).parent)],
            check=True,
            env=environment,
        )
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_published_truncation_padding_and_post_processing_are_ignored(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    BPE.save(tmp_path)
    published = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    published.enable_truncation(5)
    published.enable_padding(length=50)
    published.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 598)])
    published.save(str(tmp_path / "tokenizer.json"))
    for text in (TEXTS[1], "short"):
        assert TextTokenizer.load(tmp_path, END).encode(text) == BPE.encode(text)


def test_tokenizer_that_is_not_byte_level() -> None:
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    library_tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    library_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    library_tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = TextTokenizer(library_tokenizer, "</s>")
    text = "a a é日"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, 0]) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.token_byte_lengths()[[0, 1, 259]].tolist() == [0, 1, 2]
    assert tokenizer.encode_bytes(b"a\xff") == [*tokenizer.encode("a"), 1 + 255]


def test_byte_alphabet_is_the_librarys() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é \n\x7f")
    assert "".join(piece for piece, _ in spelled) == "".join(byte_alphabet()[b] for b in "é \n\x7f".encode())


def assert_problem(error: pytest.ExceptionInfo[UserError], setting: str, *words: str) -> None:
    assert error.value.problems[0].setting == setting
    for word in words:
        assert word in str(error.value)


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train_bpe(iter(TEXTS), 257, ["<|pad|>"], END)
    assert_problem(error, "tokenizer.vocab_size", "257", "tokenizer.vocab_size=258 or more")
    for special_tokens in (["<|a|>", "<|a|>"], [END]):
        with pytest.raises(UserError) as error:
            byte_tokenizer(special_tokens, END)
        assert_problem(error, "tokenizer.special_tokens", "twice", special_tokens[0])
    with pytest.raises(UserError) as error:
        train_bpe(iter(["return " * 50] * 9), 300, ["return"], END)
    assert_problem(error, "tokenizer.special_tokens", "ordinary text")
    with pytest.raises(UserError) as error:
        TextTokenizer.load(tmp_path, END)
    assert_problem(error, "tokenizer.path", "tokenizer.json", str(tmp_path))
    BPE.save(tmp_path)
    with pytest.raises(UserError) as error:
        TextTokenizer.load(tmp_path, "</s>")
    assert_problem(error, "tokenizer.end_of_document", "</s>", END)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError) as error:
        TextTokenizer.load(tmp_path, END)
    assert_problem(error, "tokenizer.path", "tokenizer.json")
