"""Small tokenizers in the styles of published models, with the files that lie beside them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 450
HOLE = 300
"""In the style "holes", ids from here on are moved by GAP, and a special token lies in the middle of the gap."""
GAP = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "llama-3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    "qwen": {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True, "tokenizer_class": "GemmaTokenizer"},
    "llama-2": {"bos_token": "<s>", "eos_token": "</s>"},
    "holes": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
}
"""Style -> what its tokenizer_config.json says."""
BEGIN = {"llama-3": "<|begin_of_text|>", "qwen": None, "gemma": "<bos>", "llama-2": "<s>", "holes": "<|begin_of_text|>"}
"""Style -> the token that it puts before a text."""


def write_published(style: str, folder: Path, documents: list[str]) -> None:
    """Train a tokenizer of a style and write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SETTINGS[style]
    match style:
        case "llama-3" | "holes":
            tokenizer = _byte_level(documents, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
            tokenizer.post_processor = _front("<|begin_of_text|>", tokenizer)
        case "qwen":
            tokenizer = _byte_level(documents, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
            tokenizer.normalizer = normalizers.NFC()
            tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
        case "gemma":
            tokenizer = _gemma(documents)
            tokenizer.post_processor = _front("<bos>", tokenizer)
        case _:
            tokenizer = _unigram(documents)
            tokenizer.post_processor = _front("<s>", tokenizer)
    text = json.loads(tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(_with_holes(text) if style == "holes" else text))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings})
    )
    names = {key: {"content": settings[key], "lstrip": False} for key in ("bos_token", "eos_token") if settings[key]}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=3))


def _front(token: str, tokenizer: Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def _byte_level(documents: list[str], specials: list[str]) -> Tokenizer:
    """Specials behind all pieces, as in Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - len(specials), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _gemma(documents: list[str]) -> Tokenizer:
    """Spaces written as U+2581, bytes for what is no piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=specials + names, limit_alphabet=60, max_token_length=8, show_progress=False
    )
    tokenizer.train_from_iterator([word for text in documents[:50] for word in text.split(" ")], trainer)
    text = json.loads(tokenizer.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(text))


def _unigram(documents: list[str]) -> Tokenizer:
    """A space before the first word, which decoding drops again, as in Llama 2."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    text = json.loads(tokenizer.to_str())
    ordinary = text["model"]["vocab"][3:]
    bytes_ = [[f"<0x{byte:02X}>", -30.0] for byte in range(256)]
    text["model"] |= {"vocab": text["model"]["vocab"][:3] + bytes_ + ordinary, "byte_fallback": True}
    return Tokenizer.from_str(json.dumps(text))


def _with_holes(text: dict[str, Any]) -> dict[str, Any]:
    """The ids from HOLE on moved by GAP, and <|middle|> inside the gap."""

    def moved(index: int) -> int:
        return index if index < HOLE else index + GAP

    text["model"]["vocab"] = {piece: moved(index) for piece, index in text["model"]["vocab"].items()}
    for token in text["added_tokens"]:
        token["id"] = text["model"]["vocab"][token["content"]] = moved(token["id"])
    text["model"]["vocab"]["<|middle|>"] = HOLE + 2
    text["added_tokens"].insert(0, {**text["added_tokens"][0], "id": HOLE + 2, "content": "<|middle|>"})
    for token in text["post_processor"]["special_tokens"].values():
        token["ids"] = [moved(index) for index in token["ids"]]
    return text
