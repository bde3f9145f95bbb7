"""The prompt that asks a language model for a wrong version of a right answer, and what is kept of its reply.

A template is a JSON file; `templates/error_injection.json` is the one that comes with the package.

    {"version": "1",
     "prompt": ["Rewrite the response: {instruction}", "{examples}", "Question: {question}", "Response: {response}"],
     "example": ["Question: {question}", "Response: {response}", "Modified response: {modified}"],
     "errors": {"count": {"instruction": "change a number.",
                          "examples": [{"question": "...", "response": "...", "modified": "..."}]}}}

A text is a string or a list of its lines. Placeholders of the prompt are `{response}`, and where wanted `{question}`,
`{error}` (the name of the kind of error), `{instruction}` and `{examples}`; a template without examples has no
`example`, and one without `{instruction}` has no instructions. What all samples share comes first in ours, so that a
server with a cache of prefixes computes it once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bpo_fast.runs.files import read_json
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.text import is_text, shown

TEMPLATE = resources.files("bpo_fast.bootstrap") / "templates" / "error_injection.json"

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_EXAMPLE = ("question", "response", "modified")
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
_QUOTES = ('""', "''", "\u201c\u201d", "\u2018\u2019", "\u00ab\u00bb", "``")
_EMPHASIS = r"[*_`#> ]*"


@dataclass(frozen=True)
class RewriteTemplate:
    """A template, checked; made by `read_template`.

    Attributes:
        version: the one that its file states and a hash of what it holds: changed text is another version.
        prompt: the text of a prompt, with placeholders.
        errors: kind of error -> what the placeholders `error`, `instruction` and `examples` stand for.
        labels: of the parts of an example, "Question:", "Response:" and "Modified response:" in ours.
        texts: kind of error -> the responses of its examples, which are no reply.
    """

    version: str
    prompt: str
    errors: Mapping[str, Mapping[str, str]]
    labels: Mapping[str, str]
    texts: Mapping[str, frozenset[str]]

    def ask(self, error: str, question: str, response: str) -> str:
        """The prompt for one pair of question and response."""
        return _fill(self.prompt, {**self.errors[error], "question": question, "response": response})

    def keep(self, error: str, response: str, reply: str) -> str:
        """What of a reply is the modified response; nothing where it holds none.

        Thoughts, a preamble, labels and quotes around the whole are taken off, and as many paragraphs are kept as the
        response has. A response of the template's own examples, or a line of its prompt, is an echo.

        >>> template = read_template()
        >>> template.keep("count", "One cat.", 'Sure! Modified response: "Two cats."\\n\\nI changed the number.')
        'Two cats.'
        >>> template.keep("count", "One cat.", "The bowl holds apples and three bananas.")
        ''
        """
        text = _THOUGHTS.sub("", reply).strip()
        if "modified" in self.labels:
            label = _pattern(self.labels["modified"])
            text = re.sub(rf"\A[^\n]*?{label}{_EMPHASIS}", "", text, count=1, flags=re.IGNORECASE).strip()
        for label in self.labels.values():  # of an example that the model goes on with
            text = re.split(rf"^{_EMPHASIS}{_pattern(label)}", text, maxsplit=1, flags=re.IGNORECASE | re.MULTILINE)[0]
        paragraphs, wanted = _paragraphs(text), _paragraphs(response)
        if len(paragraphs) > 1 and paragraphs[0].endswith(":") and not wanted[0].endswith(":"):
            del paragraphs[0]
        text = _unquoted("\n\n".join(paragraphs[: len(wanted)]), response)
        return "" if self._is_echo(error, text) else text

    def _is_echo(self, error, text):
        lines = [line for line in self.prompt.split("\n") if not _PLACEHOLDER.search(line) and line]
        return _plain(text) in self.texts[error] or any(line in text for line in lines if line[-1] in ".!?")


def read_template(path: str | Path | None = None) -> RewriteTemplate:
    """Read and check a template; None takes the one that comes with the package.

    Raises:
        FileNotFoundError: `path` is no file.
        ValueError: it is not JSON, or not of the form above; the sentence names the place.
    """
    name = str(TEMPLATE if path is None else path)
    content = read_json(name)
    _check_keys(name, content, ("version", "prompt", "errors"), ("example",))
    prompt = _text(name, "prompt", content["prompt"])
    example = _text(name, "example", content["example"]) if "example" in content else None
    given = content["errors"]
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{name}, errors: found {shown(given)}, expected an object of kinds of error.")
    asked = _placeholders(name, "prompt", prompt, ("response",), ("question", "error", "instruction", "examples"))
    if ("examples" in asked) != (example is not None):
        found, wanted = ("{examples} in the prompt but no", "the form of one") if example is None else ("an", "none")
        raise ValueError(f"{name}: found {found} 'example', expected {wanted}; give both or neither.")
    if example is not None:
        _placeholders(name, "example", example, ("response", "modified"), ("question",))
    errors, texts = {}, {}
    for error, entry in given.items():
        where = f"errors, {error}"
        if error == "mixed" or not error.strip():
            raise ValueError(f"{name}, errors: found {error!r}, expected the name of one kind of error; name it so.")
        _check_keys(name, entry, tuple(key for key in ("instruction", "examples") if key in asked), (), where)
        values = {"error": error}
        if "instruction" in asked:
            values["instruction"] = _text(name, f"{where}, instruction", entry["instruction"])
        examples = _examples(name, f"{where}, examples", entry["examples"]) if "examples" in asked else []
        if examples:
            values["examples"] = "\n\n".join(_fill(example, each) for each in examples)
        errors[error] = values
        texts[error] = frozenset(_plain(each[part]) for each in examples for part in ("response", "modified"))
    digest = fingerprint([content]).removeprefix("sha256:")[:8]
    version = f"{_text(name, 'version', content['version'])}-{digest}"
    return RewriteTemplate(version, prompt, errors, _labels(example or ""), texts)


def _check_keys(name, value, needed, optional=(), where=""):
    place = f"{name}, {where}" if where else name
    if not isinstance(value, dict):
        raise ValueError(f"{place}: found {shown(value)}, expected an object.")
    for key in needed:
        if key not in value:
            raise ValueError(f"{place}: found no {key!r}, expected one.")
    for key in value:
        if key not in (*needed, *optional):
            expected = ", ".join((*needed, *optional)) or "nothing, as the prompt has no place for it"
            raise ValueError(f"{place}: found {shown(key)}, expected {expected}.")


def _text(name, where, value):
    """A text given as a string or as a list of lines."""
    lines = value if isinstance(value, list) else [value]
    if not all(map(is_text, lines)) or not "".join(lines).strip():
        raise ValueError(f"{name}, {where}: found {shown(value)}, expected a text, or a list of its lines.")
    return "\n".join(lines)


def _placeholders(name, where, text, needed, optional):
    found = set(_PLACEHOLDER.findall(text))
    allowed = ", ".join(f"{{{key}}}" for key in (*needed, *optional))
    for key in needed:
        if key not in found:
            raise ValueError(f"{name}, {where}: found no {{{key}}}, expected it among {allowed}.")
    for key in sorted(found - {*needed, *optional}):
        raise ValueError(f"{name}, {where}: found {{{key}}}, expected {allowed} alone.")
    return found


def _examples(name, where, value) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}, {where}: found {shown(value)}, expected a list of examples.")
    examples = []
    for number, entry in enumerate(value, start=1):
        place = f"{where}, {number}"
        _check_keys(name, entry, _EXAMPLE, (), place)
        examples.append({key: _text(name, f"{place}, {key}", entry[key]) for key in _EXAMPLE})
        if _plain(examples[-1]["response"]) == _plain(examples[-1]["modified"]):
            raise ValueError(f"{name}, {place}: found a modified response like the response, expected a changed one.")
    return examples


def _labels(example: str) -> dict[str, str]:
    """What stands before each part of an example on its line."""
    found = (re.match(r"(.*\S)\s*\{(\w+)\}", line) for line in example.split("\n"))
    return {match[2]: match[1] for match in found if match}


def _pattern(label: str) -> str:
    """A regular expression of a label, whose colon may stand behind its emphasis."""
    return re.escape(label[:-1]) + "[*_]*:" if label.endswith(":") else re.escape(label)


def _fill(text: str, values: Mapping[str, Any]) -> str:
    """The text with its placeholders replaced, and none in what replaced them."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _paragraphs(text):
    return re.split(r"\n\s*\n", text.strip())


def _plain(text):
    return " ".join(text.casefold().split())


def _unquoted(text, response):
    for opening, closing in _QUOTES:
        inner = text[1:-1].strip()
        quoted = text.startswith(opening) and text.endswith(closing) and len(text) > 1
        if quoted and not response.startswith(opening) and opening not in inner and closing not in inner:
            return inner
    return text.strip()
