"""The parser's side of the house style: a mistake is one sentence, and help shows the defaults that there are."""

import argparse
import re

# What argparse says of a mistake, and the sentence for it.
_SENTENCES = (
    (r"argument (?P<name>\S+): invalid (?P<type>\w+) value: (?P<found>.*)", "{name}: found {found}, expected {type}"),
    (
        r"argument (?P<name>\S+): invalid choice: (?P<found>.*) \(choose from (?P<choices>.*)\)",
        "{name}: found {found}, expected one of {choices}",
    ),
    (r"argument (?P<name>\S+): (?P<wanted>expected .*)", "{name}: found another number of values, {wanted}"),
    # Python 3.11 counts the rest of the line, "...", among the required.
    (
        r"the following arguments are required: (?P<names>.*?)(?:, \.\.\.)?",
        "{names}: found nothing, expected a value for each",
    ),
    (r"unrecognized arguments: (?P<name>.*)", "{name}: found no such option, expected one of this command's"),
)


class Parser(argparse.ArgumentParser):
    """Raises a ValueError of one sentence where argparse prints its usage and exits."""

    def error(self, message):
        # transformers adds each option with hyphens, too: "--noise_step/--noise-step".
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        for pattern, sentence in _SENTENCES:
            if found := re.fullmatch(pattern, message):
                message = sentence.format_map(found.groupdict())
        raise ValueError(f"{message}; see {self.prog} --help.")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows None as the null that the command line writes for it, and no default where a value is required."""

    def _get_help_string(self, action):
        if action.required:
            return action.help
        if action.default is None:
            return f"{action.help} (default: null)"
        return super()._get_help_string(action)
