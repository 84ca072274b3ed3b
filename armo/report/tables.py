"""Result tables: what is shown, saved and drawn."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """One result table: what is shown, saved as JSON and drawn."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def column(self, name: str) -> list[Any]:
        """Return the values of a column."""
        return [row[self.columns.index(name)] for row in self.rows]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All tables of a report, in reading order."""

    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """Return a table by name.

        Raises:
            KeyError: If there is none of that name.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(name)
