"""A run written down: YAML recipes, and the command line's options over them.

A recipe has a section for each command, whose keys are the command's options; keys outside the sections are options
that all commands share. An option on the command line wins over the recipe. `null` is None, in both, for the options
that may be None.

    model_name_or_path: llava-hf/llava-1.5-7b-hf
    bootstrap:
      noise_step: 500
    train:
      learning_rate: 2e-6
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from bpo_fast.cli.options import SharedArguments
from bpo_fast.cli.parser import HelpFormatter, Parser
from bpo_fast.cli.values import described, fits, remedy, shown, to_field
from bpo_fast.cli.yaml_file import read_yaml

SECTIONS = ("bootstrap", "browse", "export", "train", "evaluate", "merge")


class _Parser(Parser, HfArgumentParser):
    """Options from dataclasses, mistakes as one sentence."""


def parse_arguments(
    argument_classes: Sequence[type],
    argv: Sequence[str],
    *,
    command: str,
    section: str | None = None,
    description: str | None = None,
    groups: Mapping[str, Mapping[str, str | None]] | None = None,
    hidden: Collection[str] = (),
) -> tuple:
    """Options of a command, from its recipe and its command line.

    Args:
        argument_classes: dataclasses that name the options, as `transformers.HfArgumentParser` takes them.
        argv: the command line after the command; `--config` names a recipe, by path or as one of those that come with
            the package.
        command: name of the command.
        section: of the recipe, where it is another command's.
        description: what the command does, for its help.
        groups, hidden: of a long help, see `Parser.group`; by default it shows every option.

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
        usage=f"bpo-fast {command} [--config RECIPE] [--OPTION VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", help=f"YAML recipe: a file, or one of {', '.join(_packaged())}. Options of the command line win."
    )
    if groups:
        parser.group(groups, hidden)
    hints = {
        item.name: get_type_hints(argument_class)[item.name]
        for argument_class in argument_classes
        for item in fields(argument_class)
        if item.init
    }
    config, argv = _take_config(argv)
    nulls, argv = _take_nulls(argv)
    for name in nulls:
        _check_name(f"--{name}", name, hints, command)
        _check_null(f"--{name}", hints[name])
    values = _read_recipe(config, section or command, hints, parser) if config else {}
    for action in parser._actions:
        # What stands in the recipe may be missing on the command line.
        action.required = action.required and action.dest not in values
    parser.set_defaults(**{name: to_field(value, hints[name]) for name, value in values.items()})
    parser.set_defaults(**dict.fromkeys(nulls))
    *arguments, _, rest = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        if not rest[0].startswith("--"):
            raise ValueError(f"{command}: found {rest[0]!r} by itself, expected options as --name value.")
        name = rest[0].removeprefix("--").partition("=")[0].replace("-", "_")
        _check_name(f"--{name}", name, hints, command)
    for options in arguments:
        _check_empty(options)
    first, *others = arguments
    if others:
        first.check_with(*others)
    return tuple(arguments)


def carried_options(argv: Sequence[str]) -> list[str]:
    """The part of a command line that the commands after it need, too: its recipe and its model.

    >>> carried_options(["--config", "tiny", "--seed", "1", "--dtype=float16"])
    ['--config', 'tiny', '--dtype=float16']
    """
    shared = {"config", *(item.name for item in fields(SharedArguments))} - {"image_folder"}
    carried = []
    for token, value in zip(argv, [*argv[1:], ""], strict=True):
        if token.startswith("--") and token[2:].partition("=")[0].replace("-", "_") in shared:
            carried += [token] if "=" in token or value.startswith("--") or not value else [token, value]
    return carried


def _take_config(argv):
    """The value of --config, and the command line without it."""
    config, rest, tokens = None, [], iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name != "--config":
            rest.append(token)
            continue
        if config:
            raise ValueError("--config: found it twice, expected one recipe.")
        config = value if equals else next(tokens, None)
        if not config:
            raise ValueError("--config: found no value, expected a recipe.")
    return config, rest


def _take_nulls(argv):
    """The options that are set to null, and the command line without them."""
    nulls, rest = set(), []
    for token in argv:
        if token == "null" and rest and rest[-1].startswith("--") and "=" not in rest[-1]:
            nulls.add(rest.pop()[2:].replace("-", "_"))
        elif token.startswith("--") and token.endswith("=null"):
            nulls.add(token[2 : -len("=null")].replace("-", "_"))
        else:
            rest.append(token)
    return nulls, rest


def _read_recipe(config: str, command: str, hints: Mapping[str, Any], parser: Parser) -> dict[str, Any]:
    path = _find_recipe(config)
    recipe = read_yaml(path)
    if not isinstance(recipe, dict | None):
        raise ValueError(f"{path}: found {shown(recipe)}, expected a map from options to values.")
    shared = {item.name for item in fields(SharedArguments)}
    values, places = {}, {}
    for key, value in (recipe or {}).items():
        if key in SECTIONS:
            if not isinstance(value, dict | None):
                raise ValueError(
                    f"{path}, section '{key}': found {shown(value)}, expected a map from options to values."
                )
        elif key in shared:
            if key in hints:  # not every command has every one
                values[key], places[key] = value, f"{path}, '{key}'"
        elif key in hints:
            raise ValueError(f"{path}, '{key}': found outside a section, expected in one; put it under '{command}:'.")
        else:
            expected = "a section or an option that all commands share"
            raise ValueError(_unknown(f"{path}, '{key}'", expected, key, {*SECTIONS, *shared}))
    for key, value in ((recipe or {}).get(command) or {}).items():
        where = f"{path}, section '{command}', '{key}'"
        _check_name(where, key, hints, command)
        values[key], places[key] = value, where
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    for key, value in values.items():
        _check_value(places[key], value, hints[key], choices.get(key))
    return values


def _find_recipe(config: str) -> Path | Traversable:
    packaged = _packaged()
    try:
        if Path(config).is_file():
            return Path(config)
        found = f"the folder '{config}'" if Path(config).is_dir() else f"no file '{config}'"
    except OSError as error:  # a name that is too long
        raise ValueError(f"--config: found a name that is no file's ({error.strerror}), expected a recipe.") from None
    if config in packaged:
        return packaged[config]
    raise FileNotFoundError(f"--config: found {found}, expected a file or one of {', '.join(packaged)}.")


def _packaged() -> dict[str, Traversable]:
    """The recipes that come with the package, by name."""
    folder = resources.files("bpo_fast") / "recipes"
    entries = sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else []
    return {entry.name.removesuffix(".yaml"): entry for entry in entries if entry.name.endswith(".yaml")}


def _check_name(where: str, name: str, names: Collection[str], command: str) -> None:
    if name not in names:
        raise ValueError(_unknown(where, f"an option of '{command}'", name, names))


def _check_null(where: str, hint: Any) -> None:
    if not fits(None, hint):
        raise ValueError(f"{where}: found null, expected {described(hint)}; leave it out for its default.")


def _check_value(where: str, value: Any, hint: Any, choices: Collection[str] | None) -> None:
    if value is None:
        _check_null(where, hint)
    elif not fits(value, hint):
        raise ValueError(f"{where}: found {shown(value)}, expected {described(hint)}{remedy(value, hint)}.")
    for entry in value if isinstance(value, list) else [value]:
        if choices and entry is not None and entry not in choices:
            raise ValueError(f"{where}: found {entry!r}, expected one of {', '.join(map(repr, choices))}.")


def _check_empty(options: object) -> None:
    for item in fields(options):
        value = getattr(options, item.name)
        if item.default != "" and (value == "" or (isinstance(value, list) and "" in value)):
            raise ValueError(f"{item.name}: found an empty text, expected a value; leave it out for its default.")


def _unknown(where: str, expected: str, name: object, names: Collection[str]) -> str:
    near = difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=0.5)
    dashes = "--" if where.startswith("--") else ""
    hint = f"; did you mean {dashes}{near[0]}?" if near else "."
    return f"{where}: found an unknown name, expected {expected}{hint}"
