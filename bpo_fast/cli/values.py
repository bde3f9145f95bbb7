"""Values of a recipe beside the types of the options that they are for."""

import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from bpo_fast.cli.yaml_file import parse_scalar

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a map",
    types.NoneType: "null",
}


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a type: str | None -> [str, NoneType]."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for member in get_args(hint) for kind in _kinds(member)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str]
    if get_origin(hint) is Literal:
        return [type(choice) for choice in get_args(hint)]
    return [dict if get_origin(hint) is dict else hint]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML's is one of an option's type; a single value also fits a list of such.

    Example:

    >>> fits(3, float), fits(True, float), fits("3", int | None), fits([1, "a"], list[int]), fits("q", list[str])
    (True, False, False, False, True)
    """
    for kind in _kinds(hint):
        if get_origin(kind) is list:
            (item,) = get_args(kind)
            if all(fits(part, item) for part in (value if isinstance(value, list) else [value])):
                return True
        elif type(value) is kind or (kind is float and type(value) is int):
            return True
    return False


def described(hint: Any) -> str:
    """An option's type in words.

    Example:

    >>> described(list[float] | None)
    'a list (each a number) or null'
    """
    words = [
        f"a list (each {described(get_args(kind)[0])})" if get_origin(kind) is list else _WORDS[kind]
        for kind in _kinds(hint)
        if get_origin(kind) is list or kind in _WORDS
    ]
    return " or ".join(dict.fromkeys(words))


def shown(value: Any) -> str:
    """A value as a sentence about it says it.

    Example:

    >>> shown("many"), shown([1]), shown(False), shown(1.5)
    ("the text 'many'", 'a list', 'false', '1.5')
    """
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'map'}"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def remedy(value: Any, hint: Any) -> str:
    """What to write instead of a value that does not fit, or nothing where that is not known."""
    if isinstance(value, str):
        return "; write it without quotes" if fits(parse_scalar(value), hint) else ""
    return "; put it in quotes" if isinstance(value, bool | int | float) and fits(str(value), hint) else ""


def to_field(value: Any, hint: Any) -> Any:
    """A value that fits, as the option's field holds it: one alone as a list of one, an integer as a number.

    Example:

    >>> to_field("q_proj", list[str] | None), to_field(1, float)
    (['q_proj'], 1.0)
    """
    kinds = _kinds(hint)
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    lists = [kind for kind in kinds if get_origin(kind) is list]
    if lists and value is not None and not isinstance(value, list) and type(value) not in kinds:
        return [value]
    return value
