"""One task of a preparation: the documents of some parts of files become at most one shard for each split, and a record."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b, sha256
from typing import Any

import numpy as np

from data import storage
from data.corpus.shards import ShardDraft, ShardInfo, token_dtype, write_shard
from data.ingest.deduplicate import KEY, keep_name, keys_name, text_key
from data.text.documents import read_documents
from data.text.formats import InputPart, RejectedDocuments, TextFormat
from data.tokenizer.segmentation import encode_sampled
from data.tokenizer.tokenizer import Tokenizer

RECORDS, KEYS = "tasks", "keys"
SPLITS = ("train", "validation")
LARGEST_ALPHA = 1e6
"""Above it, sums of scores of a segment are no longer exact to a thousandth of a nat, and one segmentation has all of the
probability anyway."""


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes shards."""

    validation_fraction: float = 0.005
    """Share of the documents held out, chosen by a hash of their text; 0 = no validation part."""
    text_format: TextFormat = field(default_factory=TextFormat)
    deduplicate: bool = False
    """Keep only the first of documents with equal text."""
    sampling_alpha: float = 0.0
    """Above 0: draw each document's segmentation with exact probabilities exp(alpha * score) (Su 2023,
    kexue.fm/archives/9811); 0 = the best segmentation."""
    seed: int = 0

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for what no shards can be made with."""
        check_validation_fraction(self.validation_fraction)
        if not 0 <= self.sampling_alpha <= LARGEST_ALPHA:
            raise ValueError(
                f"sampling_alpha = {self.sampling_alpha}: give a positive number up to {LARGEST_ALPHA:,.0f}, "
                "or 0 for the one best segmentation"
            )
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: give a whole number from 0 on")
        if self.sampling_alpha and not tokenizer.has_scores:
            raise ValueError(
                "sampling_alpha needs a unigram tokenizer, whose pieces have probabilities: train with --model unigram"
            )


def check_validation_fraction(share: float) -> None:
    """Raises ValueError for a share of the documents that leaves none to train on, or is no share."""
    if not 0 <= share < 1:  # nan is neither
        raise ValueError(f"validation_fraction = {share}: give a share of at least 0 and below 1")


@dataclass(frozen=True)
class Preparation:
    """What a worker must know: options, and where things are."""

    tokenizer: str
    """Directory."""
    tokenizer_fingerprint: str
    output: str
    options: PrepareOptions

    def record(self) -> dict[str, Any]:
        """What decides the bytes of the shards apart from the input, for plan.json."""
        options = asdict(self.options)
        del options["text_format"]
        known = {"tokenizer": "", "tokenizer_fingerprint": self.tokenizer_fingerprint, "output": ""}
        return {**known, "reading": self.options.text_format.record(), **options}


def run_task(preparation: Preparation, index: int, parts: list[InputPart]) -> dict[str, Any]:
    """Tokenize one task; write its shards, then its record, which is returned.

    Raises:
        ValueError: text that cannot be read (`on_error` "stop"), or a tokenizer or input that was changed meanwhile.
    """
    tokenizer = Tokenizer.load(preparation.tokenizer)
    if tokenizer.fingerprint != preparation.tokenizer_fingerprint:
        raise ValueError(f"the tokenizer at '{preparation.tokenizer}' was changed while preparing: choose another --output")
    options = preparation.options
    rejected = RejectedDocuments(options.text_format.on_error)
    counts: Counter = Counter(tokens=0)
    texts: list[str] = []
    drafts = {split: ShardDraft(token_dtype(tokenizer.vocab_size)) for split in SPLITS}
    for text, key in _kept_documents(preparation, index, parts, rejected, counts, texts):
        hashed = int.from_bytes(key[:8], "little")
        tokens = _encode(tokenizer, text, options, hashed)
        drafts["validation" if hashed / 2**64 < options.validation_fraction else "train"].add(tokens, tokenizer.end_of_text)
        counts["documents"] += 1
        counts["bytes"] += len(text) if text.isascii() else len(text.encode())
        counts["tokens"] += len(tokens) + 1
    shards = {
        split: asdict(write_shard(storage.join_address(preparation.output, split, shard_name(index)), draft))
        for split, draft in drafts.items()
        if draft.lengths
    }
    record = {"shards": shards, "counts": dict(counts), "left_out": dict(rejected.counts), "texts": texts}
    storage.write_atomic(storage.join_address(preparation.output, RECORDS, record_name(index)), json.dumps(record).encode())
    return record


def check_task(preparation: Preparation, parts: list[InputPart], record: dict[str, Any]) -> bool:
    """Whether the shards of a finished task are as it left them. Raises ValueError when its documents are not."""
    rejected = RejectedDocuments(preparation.options.text_format.on_error)
    for part, before in zip(parts, record.get("texts", ())):  # records of 0.1.0 have none
        digest = blake2b(digest_size=16)
        for text in read_documents(part, preparation.options.text_format, rejected):
            digest.update(text_key(text))
        if digest.hexdigest() != before:
            raise ValueError(_changed(part.address, preparation.output))
    addresses = {
        split: storage.join_address(preparation.output, split, shard["file"]) for split, shard in record["shards"].items()
    }
    return all(
        storage.exists(address) and sha256(storage.read_bytes(address)).hexdigest() == record["shards"][split]["sha256"]
        for split, address in addresses.items()
    )


def _changed(address: str, output: str) -> str:
    return (
        f"'{address}' has changed since a part of '{output}' was made of it: choose another --output, "
        f"or remove '{output}' to prepare all of it again"
    )


def read_record(preparation: Preparation, index: int) -> dict[str, Any]:
    """What `run_task` wrote. Raises ValueError for anything else."""
    address = storage.join_address(preparation.output, RECORDS, record_name(index))
    record = storage.read_json(address)
    try:
        shards = {split: ShardInfo(**shard) for split, shard in record["shards"].items()}
        tables = (record["counts"], record["left_out"], {split: shard.tokens for split, shard in shards.items()})
        numbers = [number for table in tables for number in table.values()]
        sound = shards.keys() <= {*SPLITS} and {shard.file for shard in shards.values()} <= {shard_name(index)}
        sound &= all(type(number) is int and number >= 0 for number in numbers) and "tokens" in record["counts"]
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"'{address}' is no record of this preparation: remove it, and its task is done again")
    return record


def record_name(index: int) -> str:
    """File of a task's record, in RECORDS."""
    return f"task-{index:06d}.json"


def shard_name(index: int) -> str:
    """File of a task's shard, in the directory of a split."""
    return f"shard-{index:06d}.arrow"


def _kept_documents(
    preparation: Preparation, index: int, parts: list[InputPart], rejected: RejectedDocuments, counts: Counter, texts: list[str]
) -> Iterator[tuple[str, bytes]]:
    """(text, its key) of the documents that stay; counts the others, and appends to `texts` what `check_task` compares."""
    keys, keep = b"", None
    if preparation.options.deduplicate:
        folder = storage.join_address(preparation.output, KEYS)
        keys = storage.read_bytes(storage.join_address(folder, keys_name(index)))
        keep = np.frombuffer(storage.read_bytes(storage.join_address(folder, keep_name(index))), bool)
    width, number = KEY.itemsize, 0
    for part in parts:
        digest = blake2b(digest_size=16)
        for text in read_documents(part, preparation.options.text_format, rejected):
            key = text_key(text)
            digest.update(key)
            number += 1
            if keep is None:
                yield text, key
            elif keys[(number - 1) * width : number * width] != key:
                raise ValueError(_changed(part.address, preparation.output))
            elif keep[number - 1]:
                yield text, key
            else:
                counts["duplicates"] += 1
        texts.append(digest.hexdigest())
    if keep is not None and number != len(keep):
        raise ValueError(_changed(parts[-1].address, preparation.output))


def _encode(tokenizer: Tokenizer, text: str, options: PrepareOptions, hashed: int) -> np.ndarray:
    """Token ids of a document, without the separator at its end."""
    if options.sampling_alpha:
        ids = encode_sampled(tokenizer, text, options.sampling_alpha, options.seed ^ hashed)
    else:
        ids = tokenizer.encode_array(text)
    return ids if tokenizer.begin_of_text is None else np.insert(ids, 0, tokenizer.begin_of_text)
