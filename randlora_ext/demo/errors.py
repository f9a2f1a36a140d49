"""The one exception that the demo turns into a single line instead of a traceback."""


class DemoError(Exception):
    """Something the user can put right: a missing package, a bad file, an unstable rate."""
