"""What commands print with rich."""

from typing import Any

from rich.console import Console
from rich.text import Text

from trainer.printable import printable


class _Terminal(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def terminal(stderr: bool = False, markup: bool = False, width: int | None = None) -> Console:
    """A console on which the text of others is text: no control characters, no emoji codes.

    Args:
        markup: whether [bold] and its like mean something; what is not ours is then to be escaped (rich.markup.escape).
        width: columns; default those of the screen.
    """
    return _Terminal(stderr=stderr, markup=markup, emoji=False, width=width)
