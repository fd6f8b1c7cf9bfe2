import hashlib
import json
import shutil
import sys
from pathlib import Path

import mistral_common
import pytest
import tokenizers
import transformers
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

from data.config import DataConfig
from data.corpus.audit import audit_corpus
from data.corpus.stream import check_tokenizers, open_corpora
from data.ingest.prepare import PrepareOptions, prepare
from data.tokenizer.import_model import VERSIONED, import_tokenizer, read_foreign
from data.tokenizer.tokenizer import Tokenizer
from tests.data.tokenizer.published import BEGIN, GAP, HOLE, SETTINGS, SIZE, write_published


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


def test_a_sentencepiece_model_needs_no_other_library(tmp_path, tokenizer_directory, byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    import_tokenizer(tokenizer_directory, str(tmp_path / "in"))
    again = import_tokenizer(str(tmp_path / "in"), str(tmp_path / "again"))
    assert again.encode("def a") == Tokenizer.load(str(tmp_path / "in")).encode("def a")
    with pytest.raises(ValueError, match=r"needs the package `tokenizers`: pip install 'tiglon\[huggingface\]'"):
        import_tokenizer(str(byte_level), str(tmp_path / "out"))


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


TEXTS = (
    "def f(x):\n    return x + 12", " two  spaces ", "déjà vu 日本\x00", "x<|end_of_text|>y<eos></s><|middle|>", "<tool_call>1",
    "the model reads text, 数据 和 模型 !=", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory, documents):
    """Style -> folder of a published tokenizer."""
    folder = tmp_path_factory.mktemp("styles")
    for style in SETTINGS:
        write_published(style, folder / style, documents)
    return {style: folder / style for style in SETTINGS}


@pytest.mark.parametrize("style", SETTINGS)
def test_ids_are_those_of_transformers(style, published, tmp_path):
    import_tokenizer(str(published[style]), str(tmp_path))
    ours = Tokenizer.load(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(published[style], split_special_tokens=True)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        if BEGIN[style]:
            assert ours.prompt(text) == theirs(text).input_ids == [theirs.convert_tokens_to_ids(BEGIN[style]), *ids]
        else:
            assert ours.begin_of_text is None and ours.prompt(text) == [ours.end_of_text, *ids]
            assert theirs(text).input_ids == ids
    assert ours.end_of_text == theirs.eos_token_id


def test_ids_that_no_token_has(published, tmp_path):
    tokenizer = import_tokenizer(str(published["holes"]), str(tmp_path))
    assert tokenizer.unused_ids() == (HOLE, HOLE + 1, HOLE + 3, HOLE + 4)
    assert tokenizer.vocab_size == SIZE + GAP


def test_what_begins_a_document(published, tmp_path):
    folder = tmp_path / "llama-3"
    shutil.copytree(published["llama-3"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())

    def begin(asked: str = "", **changed) -> int | None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | changed))
        return read_foreign(str(folder), "", asked).begin_of_text

    first = SIZE - 3
    assert begin() == first
    assert begin(add_bos_token=False) is None, "though its post-processor adds one"
    assert begin(add_bos_token=True, bos_token={"content": "<|eot_id|>"}) == first + 2
    assert begin("<|eot_id|>") == first + 2 and begin("none") is None
    assert begin("<|eot_id|>", add_bos_token=False) == first + 2
    with pytest.raises(ValueError, match="no piece '<x>' to begin documents with: give the name of one"):
        begin("<x>")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ["<|begin_of_text|>", "<|eot_id|>"]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{names[0]} {names[1]} $A", special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="puts 2 tokens before a text"):
        begin()


def test_a_beginning_is_part_of_the_fingerprint(published, tmp_path, corpus_jsonl):
    """A corpus prepared with a beginning is not mixed with one prepared without."""
    made = [import_tokenizer(str(published["llama-3"]), str(tmp_path / asked), "", asked) for asked in ("<|eot_id|>", "none")]
    assert made[0].fingerprint != made[1].fingerprint == hashlib.sha256(made[1].model).hexdigest()
    for asked in ("<|eot_id|>", "none"):
        prepare([corpus_jsonl], str(tmp_path / asked), str(tmp_path / f"shards {asked}"), PrepareOptions(0))
    corpora = open_corpora([str(tmp_path / f"shards {asked}/train") for asked in ("<|eot_id|>", "none")])
    with pytest.raises(ValueError, match="prepare them with the same tokenizer"):
        check_tokenizers(DataConfig(tokenizer=str(tmp_path / "none")), corpora)
    assert corpora[0].tokens == corpora[1].tokens + corpora[0].manifest.counts["documents"]


def test_special_tokens_beyond_an_embedding_are_left_out(published):
    tokenizer = read_foreign(str(published["llama-3"]), rows=SIZE - 1)
    assert tokenizer.vocab_size == SIZE - 1, "<|eot_id|>, which no text encodes to"
    assert read_foreign(str(published["llama-3"]), rows=999).vocab_size == SIZE
    with pytest.raises(ValueError, match=f"has token {SIZE - 4} and the embedding {SIZE - 4} rows: give the tokenizer of"):
        read_foreign(str(published["llama-3"]), rows=SIZE - 4)
    with pytest.raises(ValueError, match=f"has token {SIZE} and"):
        read_foreign(str(published["qwen"]), rows=SIZE)


MISTRAL = Path(mistral_common.__file__).parent / "data"
MISTRAL_MODELS = sorted(MISTRAL.glob(VERSIONED))


@pytest.mark.parametrize("model", MISTRAL_MODELS, ids=lambda path: path.name)
def test_mistrals_models(model, tmp_path):
    theirs = SentencePieceTokenizer(model)
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(model, folder / f"tokenizer.model{model.suffix}")
    for source in (model, folder):
        ours = import_tokenizer(str(source), str(tmp_path / "out"))
        assert (ours.begin_of_text, ours.end_of_text) == (theirs.bos_id, theirs.eos_id) == (1, 2)
        assert ours.vocab_size == theirs.n_words
        for text in (*TEXTS, "[INST] Bonjour [/INST]", "12,345.6\t\n\r\n", "👩‍👩‍👧 ﷽"):
            ids = theirs.encode(text, bos=False, eos=False)
            assert Tokenizer.load(str(tmp_path / "out")).encode(text) == ids
            assert ours.prompt(text) == theirs.encode(text, bos=True, eos=False)
            assert ours.decode([1, *ids, 2]) == theirs.decode(ids)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert read_foreign(str(folder)).begin_of_text is None
    with pytest.raises(ValueError, match=r"out' holds another tiglon_tokenizer\.json, which would be replaced"):
        import_tokenizer(str(folder), str(tmp_path / "out"))
    assert Tokenizer.load(str(tmp_path / "out")).begin_of_text == 1


def test_there_are_models_of_mistral():
    assert {model.suffix for model in MISTRAL_MODELS} >= {".v1", ".v2", ".v3"}


def test_tekken_is_refused_by_name(tmp_path):
    file = next(MISTRAL.glob("tekken*.json"))
    shutil.copy(file, tmp_path / "tekken.json")
    shutil.copy(file, tmp_path / "other.json")
    for source in (tmp_path, tmp_path / "tekken.json", tmp_path / "other.json"):
        with pytest.raises(
            ValueError, match="is a Tekken tokenizer, Mistral's format for tiktoken, which tiglon does not read"
        ):
            import_tokenizer(str(source), str(tmp_path / "out"))


def test_a_folder_with_damaged_settings_is_named(published, tmp_path):
    shutil.copy(published["qwen"] / "tokenizer.json", tmp_path)
    for content, words in (("<html>", "is not JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer_config.json'? {words}"):
            import_tokenizer(str(tmp_path), str(tmp_path / "out"))
    for name in ("x.model", "x.json"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=f"{name}: the file is not a"):
            import_tokenizer(str(tmp_path / name), str(tmp_path / "out"))


@pytest.mark.parametrize("style", SETTINGS)
def test_a_continuation_keeps_the_space_at_its_beginning(style, published, tmp_path):
    tokenizer = import_tokenizer(str(published[style]), str(tmp_path))
    ids = tokenizer.prompt("the model reads text, 数据 和")
    cuts = [cut for cut in range(1, len(ids)) if "\ufffd" not in tokenizer.decode(ids[:cut])]
    assert len(cuts) > 8
    for cut in cuts:
        assert tokenizer.decode(ids[:cut]) + tokenizer.continuation(ids[:cut], ids[cut:]) == tokenizer.decode(ids)
