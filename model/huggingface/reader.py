"""A stranger's config.json, of which no key is overlooked: each is read, or known to change nothing, or refused by name."""

from collections.abc import Iterable, Mapping
from typing import Any

LARGEST_SIZE = 1 << 28
"""Of a width, a count of tokens or a vocabulary; larger ones are mistakes, and their products overflow."""


class ConfigReader:
    """Keys of a JSON object, with the defaults of transformers' configuration class.

    Args:
        values: the object.
        defaults: what a missing key counts as.
        where: names the file in sentences.
        prefix: of the object inside the file, such as "rope_parameters."
        ignored: full names of keys that the user vouches for; `finish` takes out those that it meets.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        where: str,
        prefix: str = "",
        ignored: set[str] | None = None,
    ):
        self.values, self.defaults, self.where, self.prefix = values, defaults, where, prefix
        self.ignored = set() if ignored is None else ignored
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str) -> Any:
        """The value under a key, as it is; None if it is missing and has no default."""
        self._read.add(key)
        return self.values.get(key, self.defaults.get(key))

    def size(self, key: str, smallest: int = 1) -> int:
        """A whole number from `smallest` to LARGEST_SIZE."""
        value = self.take(key)
        if value is None:
            raise ValueError(f"{self.name(key)} is missing or null; add it, as the model was trained")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(key, "is no whole number; correct it")
        if not smallest <= value <= LARGEST_SIZE:
            raise self.refusal(key, f"must lie between {smallest} and {LARGEST_SIZE}")
        return value

    def optional_size(self, key: str) -> int | None:
        """As `size`, or None where the key is null or missing without a default."""
        return None if self.take(key) is None else self.size(key)

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value = self.take(key)
        if value is None:
            raise ValueError(f"{self.name(key)} is missing or null; add it, as the model was trained")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, "is no number; correct it")
        if not 0 < value < float("inf"):
            raise self.refusal(key, "must be above 0 and finite")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """As `number`, or None where the key is null or missing without a default."""
        return None if self.take(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.take(key)
        if not isinstance(value, bool):
            raise self.refusal(key, "must be true or false")
        return value

    def choice(self, key: str, legal: Iterable[str]) -> str:
        """One of some words."""
        value, legal = self.take(key), list(legal)
        if not isinstance(value, str) or value not in legal:
            raise self.refusal(key, f"is nothing that tiglon computes here; it computes {', '.join(legal)}")
        return value

    def only(self, key: str, *legal: Any) -> None:
        """Refuse a key that has another value than these; missing, it counts as its default."""
        value = self.take(key)
        if not any(value == each and type(value) is type(each) for each in legal):
            words = " or ".join("null" if each is None else str(each).lower() for each in legal)
            raise self.refusal(key, f"is nothing that tiglon computes here; it computes {words}")

    def object(self, key: str) -> "ConfigReader | None":
        """The JSON object under a key; None where it is null, missing or empty."""
        value = self.take(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refusal(key, "must be an object of keys and values, or null")
        return ConfigReader(value, {}, self.where, f"{self.prefix}{key}.", self.ignored)

    def entries(self, key: str, layers: int, or_more: bool = False) -> list[Any] | None:
        """The list under a key: one entry for each layer, with `or_more` further ones that count for nothing; None where it
        is null or missing."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers or (len(value) > layers and not or_more):
            raise self.refusal(key, f"must be null or a list of one entry for each layer (num_hidden_layers = {layers})")
        return value[:layers]

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse the first key that was neither read nor is known to be harmless, nor vouched for."""
        unread = {key for key in self.values if key not in self._read}
        vouched = {key for key in unread if self.prefix + key in self.ignored}
        self.ignored.difference_update(self.prefix + key for key in vouched)
        for key in sorted(unread - vouched - set(harmless)):
            raise self.refusal(
                key,
                "is not known to tiglon: remove it if it changes nothing in what the network computes "
                f"(or import with --ignore {self.prefix}{key})",
            )

    def name(self, key: str) -> str:
        """A key in a sentence."""
        return f"{self.where}: {self.prefix}{key}"

    def refusal(self, key: str, fault: str) -> ValueError:
        """The error for the value of a key, one sentence."""
        value = repr(self.values.get(key, self.defaults.get(key)))
        return ValueError(f"{self.name(key)} = {value if len(value) < 80 else value[:76] + ' ...'} {fault}")
