"""The types of a refusal: why an attention is left as it was, and what would make it work.

The sentences are worded where each check is made, through graph.refuse.
"""

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Every cause for which an attention is not rewritten."""

    UNREADABLE_CALL = "the attention call cannot be read"
    DROPOUT = "attention with dropout"
    NO_CACHE = "keys or values do not come from a cache write"
    NOT_AN_INPUT = "the cache is made inside the graph"
    NOT_WRITTEN_BACK = "the written cache does not go back to the input tensor"
    NOT_WRITTEN = "the graph reads the cache without writing it"
    WRITE_FORM = "the cache write has a form the store does not have"
    ROLLING_WINDOW = "new tokens move the old ones"
    GROWING_CACHE = "the cache grows by concatenation"
    FUSED_CACHE = "keys and values share one tensor"
    VIEW = "an operation between cache and attention changes more than the layout"
    LAYOUT = "the attention reads the cache in another layout"
    MASK = "the mask does not fit the attention"
    PAIR_MISMATCH = "keys and values are not written alike"
    OTHER_USER = "something else than attention uses the cache"
    OTHER_READER = "another attention of the same cache cannot be rewritten"
    PARAMETER = "the cache is a parameter"
    GRAD = "the cache or its new tokens require gradients"
    DTYPE = "the cache has a dtype without a packed format"
    HEAD_DIM = "the head dimension has no packed format"
    DEVICE = "the cache is on a device without an implementation"
    SYMBOLIC = "a size is unknown at compile time"


@dataclass(frozen=True)
class Refusal:
    """One attention's refusal.

    Attributes:
        reason: the cause, for programs.
        message: the cause with the value and the constraint it broke, for people.
        hint: what would make it work.
        node: name of the graph node that broke the constraint, "" if none.
        source: the user's source line of that node ("file:line: code"), "" if unknown.
    """

    reason: Reason
    message: str
    hint: str
    node: str = ""
    source: str = ""

    def __str__(self):
        where = f" [{self.source}]" if self.source else ""
        return f"{self.message}; {self.hint}{where}"


class Refused(Exception):
    """Raised inside an analysis to leave it with a refusal; never leaves this package."""

    def __init__(self, refusal: Refusal):
        super().__init__(str(refusal))
        self.refusal = refusal
