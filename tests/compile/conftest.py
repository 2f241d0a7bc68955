from fresh import fresh_compiler  # noqa: F401  (an autouse fixture)
