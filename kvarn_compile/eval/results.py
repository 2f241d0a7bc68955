"""Results on disk: one JSON per model and context, grown method by method, so that a run can be resumed."""

import json
from pathlib import Path
from typing import Any

SCHEMA = 1


class Results:
    """The file DIR/MODEL_CONTEXT.json: settings, and summaries by text and method.

    Attributes:
        data: {"schema", "settings", "results": {text: {method: summary}}}.
    """

    def __init__(self, folder: Path, model: str, context: int, settings: dict[str, Any]):
        """Open or start the file; results of other settings are dropped, as they cannot be compared."""
        self.path = folder / f"{model}_{context}.json"
        self.data: dict[str, Any] = {"schema": SCHEMA, "model": model, "context": context, "settings": settings,
                                     "results": {}}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            if found.get("schema") == SCHEMA and found["settings"] == settings:
                self.data = found

    def missing(self, text: str, methods: list[str]) -> list[str]:
        """Methods not there yet for a text."""
        return [m for m in methods if m not in self.data["results"].get(text, {})]

    def add(self, results: dict[str, dict[str, Any]]) -> None:
        """Merge summaries by text and method, and write the file whole."""
        for text, methods in results.items():
            self.data["results"].setdefault(text, {}).update(methods)
        self.save()

    def save(self) -> None:
        """Write the file; a run that is killed meanwhile leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def load_all(folder: Path) -> list[dict[str, Any]]:
    """Every result file of a folder, by model and context."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [data for data in found if isinstance(data, dict) and data.get("schema") == SCHEMA]
    return sorted(found, key=lambda data: (data["model"], data["context"]))
