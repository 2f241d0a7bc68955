"""Rows of a measurement: where their CSV files lie, the commit they name, and how they are appended."""

import csv
import os
import subprocess
from pathlib import Path

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def commit() -> str:
    """The commit measured: $COMMIT where a copy without its history runs, else git's word for the working tree."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def append(path: Path, rows: list[dict]) -> None:
    """Append rows to a CSV file, under the columns it has.

    Raises:
        ValueError: if the file exists with other columns.
    """
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if set(columns) != set(rows[0]):
            raise ValueError(f"{path} has the columns {columns}, the new rows {list(rows[0])}; valid: the same ones")
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
