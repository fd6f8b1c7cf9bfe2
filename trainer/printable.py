"""Text of others on a terminal."""

import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and newline; what turns the direction of writing; lone surrogates, which cannot be written."""


def printable(text: str) -> str:
    """A text whose control characters are shown as Python writes them.

    An escape sequence in a model's sample, in a name or in a configuration would else move the cursor, colour the screen or set
    the window's title.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
