"""A small corpus and its tokenizer, made once for the tests of this room."""

import json
import random

import pytest

from data.tokenizer.train import train_tokenizer

WORDS = ["the", "model", "reads", "text,", "def", "f(x):", "x", "+", "12", "数据", "和", "模型", "naïve", "№42", "!=", "😀🎉"]
SYLLABLES = ["ka", "to", "mi", "ren", "sol", "ve", "lin", "dor", "pa", "shi", "quo", "bel", "ark", "ust", "ing", "ed"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of mixed scripts with whitespace that must survive."""
    draw = random.Random(seed)

    words = WORDS + ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(200)]

    def line() -> str:
        indent, space = draw.choice(["", "    ", "\t", "        "]), draw.choice([" ", "  "])
        return indent + space.join(draw.choices(words, k=draw.randint(1, 12)))

    return [f"{number}\n" + "\n".join(line() for _ in range(draw.randint(1, 30))) for number in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def corpus_jsonl(tmp_path_factory, documents) -> str:
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory, corpus_jsonl) -> str:
    directory = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer([corpus_jsonl], directory, vocab_size=400)
    return directory
