"""What commands print with rich."""

import sys
from typing import Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from trainer.printable import printable


class _Terminal(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*map(self._fitting, objects), **options)

    def _fitting(self, shown: Any) -> Any:
        """A table in which this screen would cut words or numbers as a list, a line for each cell; anything else as it is."""
        wide = self.options.update(max_width=sys.maxsize)
        if not isinstance(shown, Table) or Measurement.get(self, wide, shown).minimum <= self.width:
            return shown
        heads = [column.header for column in shown.columns]
        cells = Table.grid(padding=(0, 2, 0, 0))
        for row in zip(*(column.cells for column in shown.columns), strict=True):
            for cell in zip(heads, row, strict=True):
                cells.add_row(*cell)
            cells.add_row()
        return Group(shown.title or "", cells)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def terminal(stderr: bool = False, markup: bool = False, width: int | None = None) -> Console:
    """A console on which the text of others is text: no control characters, no emoji codes.

    Args:
        markup: whether [bold] and its like mean something; what is not ours is then to be escaped (rich.markup.escape).
        width: columns; default those of the screen.
    """
    return _Terminal(stderr=stderr, markup=markup, emoji=False, width=width)
