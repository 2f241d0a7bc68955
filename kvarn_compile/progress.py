"""The progress bar for everything over about two seconds. It is drawn on stderr if that is a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bar(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show `text` with a bar while the block runs; yields a function that advances it by a count.

    Without a `total` the bar only moves to and fro. It disappears at the end.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda count: progress.advance(task, count)
