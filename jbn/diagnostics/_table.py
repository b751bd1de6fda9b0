"""Tables of plain data that print as aligned text."""

import numbers
from typing import Any, NamedTuple

SHOWN = 20


class Table(NamedTuple):
    """Columns and rows of plain Python values.

    `pandas.DataFrame(table.rows, columns=table.columns)` converts them.

    Attributes:
        columns: names of the columns.
        rows: one tuple for each row, in the order of the columns; None if a value does not apply.

    Example:
        >>> import jbn
        >>> print(jbn.diagnostics.Table(("norm", "channels"), [("stem", 32), ("head", 64)]))
        norm  channels
        stem        32
        head        64
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def text(self, rows: int = SHOWN) -> str:
        """The first rows as aligned text; if there are more, the last line says how many.

        Args:
            rows: largest number of rows to show.

        Returns:
            The lines, without a newline at the end.

        Raises:
            Nothing.
        """
        cells = [self.columns, *([_cell(value) for value in row] for row in self.rows[:rows])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [
            all(row[place] is None or _is_number(row[place]) for row in self.rows) for place in range(len(self.columns))
        ]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in cells
        ]
        if len(self.rows) > rows:
            lines.append(f"... and {len(self.rows) - rows} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) and not isinstance(value, bool)
