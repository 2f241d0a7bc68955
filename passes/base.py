"""What every pass shares: a name, timing, before/after dumps, and an id that changes with the passes' source."""

import hashlib
import logging
import time
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

from torch import fx
from torch._dynamo.utils import counters
from torch._logging import trace_structured

from kvarn.spec import QuantSpec

log = logging.getLogger("kvarn_passes")
Result = TypeVar("Result")


class Pass(Generic[Result]):
    """One in-place transformation of a graph module. Subclasses define `name` and `run`.

    Calling it runs it, logs its time (logger "kvarn_passes", level INFO), writes the graph before and after to the
    structured trace that tlparse reads, and logs both at level DEBUG.
    """

    name = "pass"

    def run(self, gm: fx.GraphModule) -> Result:
        """Transforms `gm` in place."""
        raise NotImplementedError

    def __call__(self, gm: fx.GraphModule) -> Result:
        """Runs the pass with all that surrounds it."""
        _dump(gm, f"kvarn_{self.name}_before")
        start = time.perf_counter()
        result = self.run(gm)
        log.info("%s took %.1f ms", self.name, (time.perf_counter() - start) * 1e3)
        _dump(gm, f"kvarn_{self.name}_after")
        return result


def count(event: str, times: int = 1) -> None:
    """Adds to torch._dynamo.utils.counters["kvarn"][event]; the event names are a public contract."""
    counters["kvarn"][event] += times


@lru_cache(maxsize=64)
def uuid(spec: QuantSpec) -> str:
    """A hash of every pass's source and the spec, for caches that must not outlive a change of either."""
    digest = hashlib.sha256(spec.key.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _dump(gm: fx.GraphModule, name: str) -> None:
    def text() -> str:
        return gm.print_readable(print_output=False, include_stride=True, include_device=True)

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s\n%s", name, text())



