"""A prepared corpus of given tokens, without text or tokenizer."""

from pathlib import Path

import numpy as np

from data.corpus.shards import CorpusManifest, ShardDraft, write_corpus_manifest, write_shard


def write_corpus(
    directory: Path, tokens: np.ndarray, vocab_size: int = 60_000, tokenizer: str = "t", shards: int = 3,
    lengths: list[int] | None = None,
) -> str:  # fmt: skip
    """Write tokens (id 1 ends a document) as `shards` shards, or as one of documents of these lengths; the directory."""
    written = []
    for number, part in enumerate([tokens] if lengths else np.array_split(tokens, shards)):
        draft = ShardDraft(np.dtype(np.uint16))
        draft._buffer += part.astype(np.uint16).tobytes()
        draft.lengths += lengths or [len(part)]
        written.append(write_shard(str(directory / f"part-{number}.arrow"), draft))
    write_corpus_manifest(str(directory), CorpusManifest(tokenizer, vocab_size, 1, "uint16", written).sealed())
    return str(directory)
