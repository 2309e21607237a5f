"""A page of text made with rich, kept in memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trimtab.report import _format as fmt

MAX_LINES = 40
"""Lines of a table or list; what is left out is counted."""


class TextPage:
    """A console that writes into memory; every text passes through `visible`, none is read as markup."""

    def __init__(self, width: int, color: bool) -> None:
        self._file = io.StringIO()
        self._console = Console(
            file=self._file,
            width=width,
            force_terminal=color,
            color_system="standard" if color else None,
            no_color=not color,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(fmt.visible(text), style=style))

    def lines(self, texts: Iterable[str], style: str = "", *, most: int = MAX_LINES) -> None:
        every = list(texts)
        for text in every[:most]:
            self.line(text, style)
        self._rest(len(every) - most)

    def verbatim(self, text: str) -> None:
        """Print lines as they are, however long, so that they can be copied."""
        for line in text.splitlines():
            self._console.print(Text(fmt.visible(line)), soft_wrap=True)

    def item(self, head: str, detail: str, style: str) -> None:
        self._console.print(Text(fmt.visible(head), style=f"{style} bold".strip()))
        self._console.print(Padding(Text(fmt.visible(detail), style="dim"), (0, 0, 0, 4)))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        left_out: int = 0,
        styles: Sequence[str] | None = None,
    ) -> None:
        """Print a table; a heading that begins with ">" belongs to a column of numbers."""
        every = list(rows)
        if not every:
            return
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False, padding=(0, 1, 0, 0))
        for name in columns:
            number = name.startswith(">")
            label = Text(name.lstrip(">"))
            grid.add_column(label, justify="right" if number else "left", overflow="fold", no_wrap=number)
        for index, row in enumerate(every):
            grid.add_row(*(Text(fmt.visible(cell)) for cell in row), style=styles[index] if styles else "")
        self.line("")
        self.line(title, "bold")
        self._console.print(grid)
        self._rest(left_out)

    def facts(self, pairs: Mapping[str, str]) -> None:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in pairs.items():
            if value:
                grid.add_row(Text(fmt.visible(name), style="dim"), Text(fmt.visible(value)))
        if grid.row_count:
            self.line("")
            self._console.print(grid)

    def _rest(self, number: int) -> None:
        if number > 0:
            self.line(f"... {number:,} more; the JSON and HTML forms hold them", "dim")

    def text(self) -> str:
        """What was printed, without trailing spaces."""
        return "\n".join(one.rstrip() for one in self._file.getvalue().splitlines()).strip("\n") + "\n"
