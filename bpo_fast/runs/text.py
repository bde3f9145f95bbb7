"""Text of records, which come from anywhere: what a file takes, and how a value is shown in a message."""


def is_text(value: object) -> bool:
    """Whether a value is a string that a file takes: JSON can hold half a surrogate pair, which UTF-8 cannot.

    >>> is_text("a cat"), is_text(chr(0xD83D)), is_text(None)
    (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with what no file takes written as an escape, on one line."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def shown(value: object) -> str:
    """`repr` of a value, short, and with no character that a file does not take.

    >>> shown("a cat"), len(shown("x" * 1000))
    ("'a cat'", 120)
    """
    text = printable(repr(value))
    return text if len(text) <= 120 else f"{text[:117]}..."
