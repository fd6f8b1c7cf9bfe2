import json

import pytest

from data.corpus.audit import audit_corpus
from data.ingest.prepare import prepare
from data.tokenizer.import_model import import_tokenizer
from data.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, documents):
    """A Hugging Face byte-level BPE in a folder as published ones have it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("published")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(documents, vocab_size=500, special_tokens=["<|endoftext|>", "<|pad|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder


def test_hugging_face_tokenizer(tmp_path, byte_level, documents, corpus_jsonl):
    tokenizer = import_tokenizer(str(byte_level), str(tmp_path / "tokenizer"))
    again = Tokenizer.load(str(tmp_path / "tokenizer"))
    assert tokenizer.description == again.description and again.description.lossless
    assert (again.vocab_size, again.end_of_text, again.has_scores) == (500, 0, False)
    text = documents[0] + "<|endoftext|>"
    assert again.decode(again.encode(text)) == text and again.end_of_text not in again.encode(text)
    assert again.decode([*again.encode("a"), again.end_of_text]) == "a"
    with pytest.raises(ValueError, match="lone surrogate"):
        again.encode("\ud800")
    prepare([corpus_jsonl], str(tmp_path / "tokenizer"), str(tmp_path / "out"))
    assert not audit_corpus(str(tmp_path / "out" / "train")).faults
    assert import_tokenizer(str(byte_level), str(tmp_path / "pad"), "<|pad|>").end_of_text == 1


def test_sentencepiece_tokenizer(tmp_path, tokenizer_directory):
    ours = Tokenizer.load(tokenizer_directory)
    taken = import_tokenizer(f"{tokenizer_directory}/tokenizer.model", str(tmp_path))
    assert taken.fingerprint == ours.fingerprint and taken.end_of_text == ours.end_of_text
    assert not taken.description.lossless, "without our care for U+2581, and it says so"
    assert taken.encode("a b\n" * 9000) == taken.backend.encode("a b\n" * 9000), "a foreign model gets its text whole"


def test_wrong_tokenizers_are_refused(tmp_path, byte_level):
    with pytest.raises(FileNotFoundError, match="neither"):
        import_tokenizer(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        import_tokenizer(str(tmp_path / "nowhere.model"), str(tmp_path / "out"))
    for name in ("x.model", "x.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match="is not a"):
            import_tokenizer(str(tmp_path / name), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no separator '<end>'"):
        import_tokenizer(str(byte_level), str(tmp_path / "out"), "<end>")
