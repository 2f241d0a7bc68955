"""Errors a user can meet. Each message names the value, the constraint and the valid options."""


class KVarnError(Exception):
    """Base of every error this project raises on purpose."""


class SpecError(KVarnError, ValueError):
    """A preset name, a quantization parameter or an option value that cannot be used."""


class ShapeError(KVarnError, ValueError):
    """A tensor whose shape, dtype or device does not fit the packed store it is used with."""


class PositionError(KVarnError, IndexError):
    """A token position outside the capacity of the packed store."""


class OwnershipError(KVarnError, RuntimeError):
    """A cache tensor whose content lives in a packed store is used in a way the store cannot serve."""
