# ruff: noqa: RUF001 - other scripts have letters that look like Latin ones
"""Corpora of many scripts and of code: from a file through tokenizer and token files, and back."""

from __future__ import annotations

import json
import random
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest

from distllm.config import schema
from distllm.data.preparation.prepare import prepare
from distllm.data.prepared import Split
from distllm.data.token_stream import TokenStream
from distllm.data.tokenizer import TextTokenizer

SENTENCES = {
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "Japanese": "すべての人間は、生まれながらにして自由であり、カタカナも混ざる。",
    "Korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق\u200f.",
    "Hebrew": "כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है।",
    "Thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "Russian": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Vietnamese": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.",
    "German": "Alle Menschen sind frei und gleich an Würde geboren; Straße, Übung, ẞ.",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇯🇵🇧🇷 ☝🏽 1️⃣ 🎉",
    "combining": "e\u0301 a\u030a\u0323 \u1100\u1161\u11a8 x\u0336",
    "rare": "𓀀 𝕏 \U0010fffd \ufdfd \u2028 \u0085 \x00 \x7f",
}
BPE = schema.Tokenizer("bpe", 600, None, [], "<|endoftext|>")
BYTES = schema.Tokenizer("bytes", None, None, [], "<|endoftext|>")


@pytest.fixture(scope="module")
def texts() -> set[str]:
    """Two hundred documents of mixed sentences, and real code with its tabs, line ends and quotes."""
    generator = random.Random(0)
    found = {
        generator.choice(["\n", " ", "\r\n", "\n\n\n", "\t"]).join(
            generator.choices(list(SENTENCES.values()), k=generator.randrange(1, 9))
        )
        for _ in range(200)
    }
    library = Path(sysconfig.get_paths()["stdlib"])
    return found | {
        (library / name).read_bytes().decode() for name in ("tabnanny.py", "this.py", "html/entities.py")
    }


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_every_document_comes_back_as_it_was(
    texts: set[str], tokenizer: schema.Tokenizer, tmp_path: Path
) -> None:
    lines = [
        json.dumps({"text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(sorted(texts))
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="\n")
    data = schema.Data("jsonl", str(tmp_path / "corpus.jsonl"), "text", 0.2, str(tmp_path / "cache"))
    prepared = prepare(data, schema.Preparation(1, "stop", None), tokenizer, lambda _: None)
    (source,) = prepared.sources.values()
    assert source.validation is not None
    made = TextTokenizer.load(prepared.tokenizer_folder, tokenizer.end_of_document)
    found = [text for split in (source.train, source.validation) for text in decoded(split, made)]
    assert len(found) == len(texts)
    assert set(found) == texts


def decoded(split: Split, tokenizer: TextTokenizer) -> list[str]:
    stream = TokenStream(split.prefix)
    edges = stream.offsets(0, stream.num_documents + 1).tolist()
    contents = [stream.read(start, end).tolist() for start, end in pairwise(edges)]
    assert all(tokens[-1] == tokenizer.end_of_document for tokens in contents)
    return [tokenizer.decode_bytes(tokens[:-1]).decode("utf-8") for tokens in contents]


def test_every_language_shares_in_the_vocabulary(texts: set[str], tmp_path: Path) -> None:
    """A tokenizer that fell back to bytes for some script would give it one token per byte."""
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sorted(texts)))
    data = schema.Data("jsonl", str(tmp_path / "corpus.jsonl"), "text", 0.0, str(tmp_path / "cache"))
    larger = schema.Tokenizer("bpe", 2000, None, [], "<|endoftext|>")
    prepared = prepare(data, schema.Preparation(1, "stop", None), larger, lambda _: None)
    made = TextTokenizer.load(prepared.tokenizer_folder, larger.end_of_document)
    for language, sentence in SENTENCES.items():
        if language not in ("rare", "combining"):
            assert len(made.encode(sentence)) < len(sentence.encode()) / 2, language
