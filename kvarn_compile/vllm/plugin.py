"""The entry point (group vllm.general_plugins): vLLM calls `register` in every process it starts."""

VERSIONS = ("0.32.",)
"""Beginnings of the vLLM versions that compat.py was written for; docs/vllm.md lists what others would need."""


def register() -> None:
    """Make kvarn known to vLLM. Changes nothing for an engine that does not ask for it.

    A vLLM of another version is left alone, with a warning: what compat.py imports and wraps may not be there.
    """
    from vllm.logger import init_logger
    from vllm.version import __version__

    if not __version__.startswith(VERSIONS):
        init_logger("vllm.kvarn").warning("kvarn is installed but knows vLLM %s only, not %s: it stays out.",
                                          ", ".join(f"{known}x" for known in VERSIONS), __version__)
        return
    from kvarn_compile.vllm import compat

    compat.install()
