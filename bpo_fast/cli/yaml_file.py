"""Recipes as text: YAML 1.2's core schema, where PyYAML would take something else than what stands there.

PyYAML reads YAML 1.1: `1e-7` is text there, `010` the number 8, `1:30` the number 90, `no` is false, and of two equal
keys the last one counts without a word. Here numbers are decimal, only true and false are booleans, and what has two
meanings is refused with its line: equal keys, aliases, tags, a second document.
"""

import re
import unicodedata
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 18  # bytes; a file beyond that is no recipe
_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """Plain maps, lists, text, numbers, true, false and null."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own form
    yaml_constructors = {}  # noqa: RUF012

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            # A few lines of aliases of aliases are billions of values.
            raise _mistake(self.peek_event(), "an alias; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _mistake(key_node, "a key that is not text; put it in quotes")
            if key in lines:
                raise _mistake(key_node, f"'{key}' a second time, the first is in line {lines[key]}; keep one of them")
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _mistake(at, found):
    return yaml.constructor.ConstructorError(None, None, found, at.start_mark)


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
# Kind -> its form, the characters that it can begin with, what it is read by. What is an integer is no float; one of
# more digits than Python reads is.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"], lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]{1,300}", [*"-+0123456789"], int),
    "float": (_FLOAT, [*"-+.0123456789"], lambda text: float(re.sub(r"\.(?=[iInN])", "", text))),
}


def parse_scalar(text: str) -> Any:
    """What a text without quotes stands for.

    Example:

    >>> parse_scalar("1e-7"), parse_scalar("010"), parse_scalar("no"), parse_scalar("null")
    (1e-07, 10, 'no', None)
    """
    for pattern, _, read in _SCALARS.values():
        if re.fullmatch(pattern, text):
            return read(text)
    return text


def _construct_scalar(loader, node):
    value = loader.construct_scalar(node)
    pattern, _, read = _SCALARS[node.tag.removeprefix(_TAG)]
    if not re.fullmatch(pattern, value):  # under a tag that says it is one
        raise _mistake(node, f"{value!r} under the tag {node.tag.removeprefix(_TAG)}; leave the tag out")
    return read(value)


def _construct_text(loader, node):
    value = loader.construct_scalar(node)
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise _mistake(node, f"the character U+{ord(character):04X} in a text, expected it on one line; delete it")
    return value


for _kind, (_pattern, _first, _) in _SCALARS.items():
    _CoreLoader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
    _CoreLoader.add_constructor(_TAG + _kind, _construct_scalar)
_CoreLoader.add_constructor(_TAG + "str", _construct_text)
for _kind in ("seq", "map"):
    _CoreLoader.add_constructor(_TAG + _kind, yaml.SafeLoader.yaml_constructors[_TAG + _kind])
_CoreLoader.add_constructor(None, yaml.SafeLoader.yaml_constructors[None])


def read_yaml(path: Path | Traversable) -> Any:
    """What a YAML file holds, of Python's own types.

    Args:
        path: an existing file.

    Raises:
        ValueError: it cannot be read, is not UTF-8 text or not YAML of the kind above; the sentence names the line.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    >>> _ = path.write_text("train: {learning_rate: 1e-6, seed: 010, eval_strategy: no}")
    >>> read_yaml(path)
    {'train': {'learning_rate': 1e-06, 'seed': 10, 'eval_strategy': 'no'}}
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise ValueError(f"{path}: found a file that cannot be read ({error.strerror}), expected a recipe.") from None
    if len(data) > _LARGEST:
        raise ValueError(f"{path}: found more than {_LARGEST:,} bytes, expected a recipe.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16 text" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start} that no text has"
        raise ValueError(f"{path}: found {what}, expected a recipe in UTF-8; save it in that encoding.") from None
    try:
        return yaml.load(text, _CoreLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(
            f"{path}, line {line}: found the control character U+{ord(text[error.position]):04X}, expected text; "
            "delete it."
        ) from None
    except yaml.constructor.ConstructorError as error:
        # Ours, or of a tag that is not of the core schema.
        what = re.sub("^could not determine a constructor for ", "", error.problem)
        raise ValueError(f"{path}, line {error.problem_mark.line + 1}: found {what}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        second = error.problem == "but found another document"
        found = "a second document" if second else f"a mistake ({error.problem})"
        raise ValueError(
            f"{path}, line {mark.line + 1}, column {mark.column + 1}: found {found}, expected "
            f"{'one' if second else 'YAML'}."
        ) from None
    except RecursionError:
        raise ValueError(f"{path}: found lists or maps a thousand levels deep, expected a recipe.") from None
