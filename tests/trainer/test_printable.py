import unicodedata

import pytest

from trainer.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m\r\b", r"\x9b31m\r\x08"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("\udcff", r"\udcff"),
        ("tab\tand\nnewline, 数据 é 😀", "tab\tand\nnewline, 数据 é 😀"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_control_character_is_left() -> None:
    """Of all of Unicode; `unicodedata` knows them by another table."""
    every = printable("".join(map(chr, range(0x110000))))
    assert {c for c in every if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} == {"\t", "\n"}
    assert not {
        c for c in every if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    }
