"""Progress bars with the time left, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Bars:
    """A bar per piece of work, on standard error; the last one that ends takes them all off the screen."""

    def __init__(self) -> None:
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def start(self, name: str, total: int) -> None:
        """A new bar."""
        if not self._tasks:
            self._rich.start()
        self._tasks[name] = self._rich.add_task(name, total=total, facts="")

    def advance(self, name: str, n: int = 1, **facts: object) -> None:
        """Move a bar; facts stand behind it."""
        shown = "  ".join(f"{key} {value}" for key, value in facts.items())
        changed = {"facts": shown} if facts else {}
        self._rich.update(self._tasks[name], advance=n, **changed)  # type: ignore[arg-type]

    def done(self, name: str) -> None:
        """Fill a bar."""
        task = self._tasks.pop(name)
        total = self._rich.tasks[self._rich.task_ids.index(task)].total
        self._rich.update(task, completed=total)
        if not self._tasks:
            self._rich.stop()
