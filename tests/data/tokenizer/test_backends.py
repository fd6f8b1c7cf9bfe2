import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data.tokenizer.backends import HuggingFace, SentencePiece, open_backend

TEXTS = ["def f(x):\n    return x + 12", "", "  two  spaces ", "déjà vu 日本\x00"]


@pytest.fixture(scope="module")
def model(tokenizer_directory) -> bytes:
    return (Path(tokenizer_directory) / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_is_the_library_itself(model, text):
    backend, library = SentencePiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = library.encode(text)
    assert backend.encode(text) == backend.encode_array(text).tolist() == ids
    assert backend.decode(ids) == text and backend.vocab_size == library.vocab_size()


def test_bytes_and_scores_are_those_of_the_model(model):
    backend, library = SentencePiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [library.id_to_piece(i) for i in backend.byte_ids()] == [f"<0x{byte:02X}>" for byte in range(256)]
    scores = backend.scores()
    assert not any(piece.startswith("<0x") for piece in scores)
    assert all(library.get_score(i) == score for i, score in scores.values()) and len(scores) > 100


def test_hugging_face_takes_special_tokens_in_a_text_as_text(documents):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.ByteLevel(False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|x|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(documents, trainer)
    backend = HuggingFace(library.to_str().encode())
    assert library.encode("a<|x|>b").ids.count(0) == 1, "what the library does unless told otherwise"
    ids = backend.encode("a<|x|>b")
    assert 0 not in ids and backend.decode(ids) == "a<|x|>b" and backend.encode_array("a<|x|>b").tolist() == ids


@pytest.mark.parametrize("kind, words", [("sentencepiece", "not a sentencepiece"), ("huggingface", "not a Hugging Face")])
def test_other_files_are_refused(kind, words):
    with pytest.raises(ValueError, match=words):
        open_backend(kind, b"no model")


def test_an_unknown_kind_names_the_legal_ones():
    with pytest.raises(ValueError, match="sentencepiece or huggingface"):
        open_backend("bytes", b"")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs the package `tokenizers`: pip install 'tiglon\[huggingface\]'"):
        HuggingFace(b"{}")
