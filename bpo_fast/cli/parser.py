"""The parser's side of the house style: a mistake is one sentence, and help shows the defaults that there are."""

import argparse
import re
from collections.abc import Collection, Mapping

# What argparse says of a mistake, and the sentence for it.
_SENTENCES = (
    (r"argument (?P<name>\S+): invalid int value: (?P<found>.*)", "{name}: found {found}, expected a whole number"),
    (r"argument (?P<name>\S+): invalid float value: (?P<found>.*)", "{name}: found {found}, expected a number"),
    (r"argument (?P<name>\S+): invalid (?P<type>\S+) value: (?P<found>.*)", "{name}: found {found}, expected {type}"),
    (
        r"argument (?P<name>\S+): invalid choice: (?P<found>.*) \(choose from (?P<choices>.*)\)",
        "{name}: found {found}, expected one of {choices}",
    ),
    # What transformers says of a flag.
    (
        r"argument (?P<name>\S+): Truthy value expected: got (?P<found>.*) but expected one of .*",
        "{name}: found '{found}', expected true or false",
    ),
    (r"argument (?P<name>\S+): (?P<wanted>expected .*)", "{name}: found another number of values, {wanted}"),
    # Python 3.11 counts the rest of the line, "...", among the required.
    (
        r"the following arguments are required: (?P<names>.*?)(?:, \.\.\.)?",
        "{names}: found nothing, expected a value for each",
    ),
    (r"unrecognized arguments: (?P<name>.*)", "{name}: found no such option, expected one of this command's"),
)
_MANY = 6  # choices; more of them are listed in an option's help, not in its first line
_METAVARS = {"int": "INT", "float": "NUMBER", "string_to_bool": "BOOL"}


class Parser(argparse.ArgumentParser):
    """Raises a ValueError of one sentence where argparse prints its usage and exits."""

    _groups: Mapping[str, Mapping[str, str | None]] = {}
    _hidden: Collection[str] = ()
    _everything = False

    def error(self, message):
        # transformers adds each option with hyphens, too: "--noise_step/--noise-step".
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        for pattern, sentence in _SENTENCES:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                message = sentence.format_map(found.groupdict())
                break
        raise ValueError(f"{message}; see {self.prog} --help.")

    def group(self, groups: Mapping[str, Mapping[str, str | None]], hidden: Collection[str]) -> None:
        """Show in the help what `groups` name, and everything but `hidden` with `--help_all`.

        Args:
            groups: heading -> name of an option -> its help, None to keep its own.
            hidden: options that are refused, and that no help shows.
        """
        self._groups, self._hidden = groups, hidden
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="Show transformers' other options, too.")

    def format_help(self):
        if not self._groups:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        actions = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # the first of two is --NAME, the second --no_NAME
        for title, names in self._groups.items():
            formatter.start_section(title)
            for name, text in names.items():
                if action := actions.pop(name, None):
                    action.help = text or action.help
                    formatter.add_argument(action)
            formatter.end_section()
        others = [action for name, action in actions.items() if name not in self._hidden]
        if self._everything:
            formatter.start_section("other options of transformers' TrainingArguments")
            formatter.add_arguments(others)
            formatter.end_section()
        else:
            formatter.add_text(f"{self.prog} --help_all shows {len(others)} more, of transformers' TrainingArguments.")
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser._everything = True
        parser.print_help()
        parser.exit()


def _as_typed(default):
    """A default as the command line would be given it."""
    if isinstance(default, list):
        return " ".join(map(_as_typed, default))
    default = getattr(default, "value", default)  # of an enumeration
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


class HelpFormatter(argparse.HelpFormatter):
    """An option once, with the kind of its value and its default as the command line writes them."""

    def __init__(self, prog, **options):
        super().__init__(prog, **{**options, "max_help_position": 34})

    def _format_action_invocation(self, action):
        # Not with hyphens a second time.
        name = action.option_strings[0] if action.nargs != 0 else ", ".join(action.option_strings)
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}".strip()

    def _get_default_metavar_for_optional(self, action):
        return _METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")

    def _metavar_formatter(self, action, default_metavar):
        if self._has_many_choices(action):
            return lambda count: ("NAME",) * count
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action):
        text = action.help
        if self._has_many_choices(action):
            text = f"{text} One of {', '.join(action.choices)}."
        if action.required:
            return f"{text} (required)"
        if action.nargs == 0 or action.default is argparse.SUPPRESS:
            return text
        return f"{text} (default: {_as_typed(action.default)})"

    def _has_many_choices(self, action):
        return action.choices is not None and len(action.choices) > _MANY
