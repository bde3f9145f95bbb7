"""A run written down: YAML recipes, and the command line's options over them.

A recipe has a section for each command, whose keys are the command's options; keys outside the sections are options
that all commands share. An option on the command line wins over the recipe. `null` is None, in both.

    model_name_or_path: llava-hf/llava-1.5-7b-hf
    bootstrap:
      noise_step: 500
    train:
      learning_rate: 2e-6
"""

import difflib
import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from bpo_fast.cli.options import SharedArguments
from bpo_fast.cli.parser import HelpFormatter, Parser

SECTIONS = ("bootstrap", "train", "evaluate")


class _Parser(Parser, HfArgumentParser):
    """Options from dataclasses, mistakes as one sentence."""


def parse_arguments(
    argument_classes: Sequence[type], argv: Sequence[str], *, command: str, description: str | None = None
) -> tuple:
    """Options of a command, from its recipe and its command line.

    Args:
        argument_classes: dataclasses that name the options, as `transformers.HfArgumentParser` takes them.
        argv: the command line after the command; `--config` names a recipe, by path or as one of those that come with
            the package.
        command: name of the command, which is the recipe's section.
        description: what the command does, for its help.

    Returns:
        An instance of each class.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: the recipe is not valid YAML, an option is unknown (the nearest name is given), missing, or has a
            value of the wrong type.

    Example:

    >>> from bpo_fast.cli.options import TrainArguments
    >>> argv = ["--model_name_or_path", "llava", "--dataset", "pairs", "--lora_r", "8"]
    >>> parse_arguments([TrainArguments], argv, command="train")[0].lora_r
    8
    >>> parse_arguments([TrainArguments], [*argv, "--lora_rank", "8"], command="train")
    Traceback (most recent call last):
    ValueError: --lora_rank: found an unknown name, expected an option of 'train'; did you mean --lora_r?
    """
    parser = _Parser(
        argument_classes,
        prog=f"bpo-fast {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", help=f"YAML recipe: a file, or one of {', '.join(_packaged())}. Options of the command line win."
    )
    names = {item.name for argument_class in argument_classes for item in fields(argument_class) if item.init}
    config, argv = _take_config(argv)
    values = _read_recipe(config, command, names) if config else {}
    values = {name: value for name, value in values.items() if name not in _given(argv)}
    nulls, argv = _take_nulls(argv)
    nulls |= {name for name, value in values.items() if value is None}
    for name in nulls - names:
        raise ValueError(_unknown(f"--{name}", f"an option of '{command}'", name, names))
    parser.set_defaults(**dict.fromkeys(nulls))
    recipe_argv = [token for name, value in values.items() if value is not None for token in _tokens(name, value)]
    *arguments, _, rest = parser.parse_args_into_dataclasses(
        recipe_argv + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        if not rest[0].startswith("--"):
            raise ValueError(f"{command}: found {rest[0]!r} by itself, expected options as --name value.")
        name = rest[0].removeprefix("--").partition("=")[0].replace("-", "_")
        raise ValueError(_unknown(f"--{name}", f"an option of '{command}'", name, names))
    return tuple(arguments)


def carried_options(argv: Sequence[str]) -> list[str]:
    """The part of a command line that the commands after it need, too: its recipe and its model.

    >>> carried_options(["--config", "tiny", "--seed", "1", "--dtype=float16"])
    ['--config', 'tiny', '--dtype=float16']
    """
    shared = {"config", *(item.name for item in fields(SharedArguments))} - {"image_folder"}
    carried = []
    for token, value in zip(argv, [*argv[1:], ""], strict=True):
        if _given([token]) & shared:
            carried += [token] if "=" in token else [token, value]
    return carried


def _take_config(argv):
    """The value of --config, and the command line without it."""
    config, rest, tokens = None, [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != "--config":
            rest.append(token)
            continue
        config = value if equals else next(tokens, None)
        if not config:
            raise ValueError("--config: found no value, expected a recipe.")
    return config, rest


def _given(argv):
    return {token[2:].partition("=")[0].replace("-", "_") for token in argv if token.startswith("--")}


def _take_nulls(argv):
    """The options that are set to null, and the command line without them."""
    nulls, rest = set(), []
    for token in argv:
        if token == "null" and rest and rest[-1].startswith("--"):
            nulls.add(rest.pop()[2:].replace("-", "_"))
        elif token.startswith("--") and token.endswith("=null"):
            nulls.add(token[2 : -len("=null")].replace("-", "_"))
        else:
            rest.append(token)
    return nulls, rest


def _tokens(name, value):
    """A recipe's value as the command line would give it, so that both go through the same checks."""
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}"]


def _read_recipe(config: str, command: str, names: Collection[str]) -> dict[str, Any]:
    packaged = _packaged()
    path = Path(config) if Path(config).is_file() else packaged.get(config)
    if path is None:
        raise FileNotFoundError(
            f"--config: found no file '{config}', expected a file or one of {', '.join(packaged)}."
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{path}: found {error.problem}{where}, expected YAML.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"{path}: found a {type(recipe).__name__}, expected a map from options to values.")
    shared = {item.name for item in fields(SharedArguments)}
    values = {}
    for key, value in recipe.items():
        if key in SECTIONS:
            if not isinstance(value, dict | None):
                raise ValueError(f"{path}, section '{key}': found {value!r}, expected a map from options to values.")
        elif key in shared:
            values[key] = value
        elif key in names:
            raise ValueError(f"{path}, '{key}': found outside a section, expected in one; put it under '{command}:'.")
        else:
            expected = "a section or an option that all commands share"
            raise ValueError(_unknown(f"{path}, '{key}'", expected, key, {*SECTIONS, *shared}))
    section = recipe.get(command) or {}
    for key in section:
        if key not in names:
            where = f"{path}, section '{command}', '{key}'"
            raise ValueError(_unknown(where, f"an option of '{command}'", key, names))
    return values | section


def _packaged() -> dict[str, Traversable]:
    """The recipes that come with the package, by name."""
    folder = resources.files("bpo_fast") / "recipes"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else []
    return {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}


def _unknown(where: str, expected: str, name: object, names: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=0.5)
    dashes = "--" if where.startswith("--") else ""
    hint = f"; did you mean {dashes}{near[0]}?" if near else "."
    return f"{where}: found an unknown name, expected {expected}{hint}"
