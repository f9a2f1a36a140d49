"""What a user has to put right."""


class CliError(Exception):
    """A message of one line: what was wrong, and what would be right."""


def first_line(error: BaseException) -> str:
    """Of another library's error, what fits into a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
