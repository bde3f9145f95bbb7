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
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

SECTIONS = ("bootstrap", "train", "evaluate")


def _help(text):
    return {"help": text}


@dataclass(kw_only=True)
class SharedArguments:
    """Options of every command that runs a model."""

    model_name_or_path: str = field(metadata=_help("Model id, or folder written by save_pretrained."))
    image_folder: str | None = field(
        default=None, metadata=_help("Folder that the picture paths start from; by default the one of the pairs.")
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=_help("Data type of the model's weights.")
    )
    quantization: Literal["none", "nf4"] = field(
        default="none", metadata=_help("nf4 holds the language model in 4 bits (needs bitsandbytes).")
    )

    def load_options(self):
        """Keyword arguments for `bpo_fast.models.load.load_model`."""
        return {"dtype": self.dtype, "quantization": None if self.quantization == "none" else self.quantization}


@dataclass(kw_only=True)
class BootstrapArguments(SharedArguments):
    """Options of `bpo-fast bootstrap`, most of them arguments of `bpo_fast.bootstrap.bootstrap`."""

    annotations: str = field(metadata=_help("LLaVA-Instruct JSON file."))
    image_folder: str = field(metadata=_help("Folder that the picture paths of the annotations start from."))
    output_dir: str = field(metadata=_help("Folder for the pairs; a killed run in it goes on."))
    adapter: str | None = field(default=None, metadata=_help("LoRA adapter on the model that answers."))
    noise_target: Literal["features", "pixels", "projected"] = field(
        default="features", metadata=_help("What the noise is put on.")
    )
    noise_step: int | None = field(
        default=500, metadata=_help("Step of the noise schedule; null adds no noise (self-generated responses).")
    )
    schedule: Literal["sigmoid", "linear", "cosine"] = field(default="sigmoid", metadata=_help("Noise schedule."))
    seed: int = field(default=0, metadata=_help("Seed of noise, sampling and drawn rows."))
    max_new_tokens: int = field(default=512, metadata=_help("A response is cut there."))
    batch_size: int = field(default=8, metadata=_help("Questions a batch."))
    do_sample: bool = field(default=False, metadata=_help("Sample responses; greedy decoding otherwise."))
    temperature: float | None = field(default=None, metadata=_help("Of the sampling."))
    top_p: float | None = field(default=None, metadata=_help("Of the sampling."))
    max_response_words: int | None = field(
        default=350, metadata=_help("Pairs with a longer response are skipped; null keeps all.")
    )
    max_samples: int | None = field(
        default=None, metadata=_help("So many annotations, drawn uniformly; null takes all.")
    )


@dataclass(kw_only=True)
class TrainArguments(SharedArguments):
    """Options of `bpo-fast train` beside those of `BPOConfig`."""

    dataset: str = field(
        metadata=_help("Preference pairs: folder of `bpo-fast bootstrap`, JSON-lines file, or saved data set.")
    )
    lora_r: int = field(default=64, metadata=_help("Rank of the adapter."))
    lora_alpha: int = field(default=128, metadata=_help("Scale of the adapter: lora_alpha / lora_r on its output."))
    lora_dropout: float = field(default=0.0, metadata=_help("Dropout of the adapter's input."))
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=_help("Linears of the language model with an adapter; null takes q, k, v, o, gate, up and down."),
    )


@dataclass(kw_only=True)
class EvaluateArguments(SharedArguments):
    """Options of `bpo-fast evaluate`, most of them arguments of `bpo_fast.evaluate.run.evaluate`."""

    questions: str = field(metadata=_help("JSON list of {id, image, question, objects | label}."))
    image_folder: str = field(metadata=_help("Folder that the picture paths of the questions start from."))
    output_dir: str = field(metadata=_help("Folder for answers and scores; a killed run in it goes on."))
    kind: Literal["chair", "pope"] = field(metadata=_help("Hallucinated objects, or yes/no questions."))
    adapter: str | None = field(default=None, metadata=_help("LoRA adapter on the model that answers."))
    synonyms: str | None = field(default=None, metadata=_help("JSON table {object: [words]}, for chair."))
    max_new_tokens: int = field(default=512, metadata=_help("An answer is cut there."))
    batch_size: int = field(default=8, metadata=_help("Questions a batch."))


def parse_arguments(argument_classes, argv, *, command):
    """Options of a command, from its recipe and its command line.

    Args:
        argument_classes: dataclasses that name the options, as `transformers.HfArgumentParser` takes them.
        argv (`list[str]`): the command line after the command; `--config` names a recipe, by path or as one of those
            that come with the package.
        command (`str`): name of the command, which is the recipe's section.

    Returns:
        `tuple` of an instance of each class.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: the recipe is not valid YAML, an option is unknown (the nearest name is given), missing, or has a
            value of the wrong type.

    Example:

    >>> argv = ["--model_name_or_path", "llava", "--dataset", "pairs", "--lora_r", "8"]
    >>> parse_arguments([TrainArguments], argv, command="train")[0].lora_r
    8
    >>> parse_arguments([TrainArguments], [*argv, "--lora_rank", "8"], command="train")
    Traceback (most recent call last):
    ValueError: unknown option --lora_rank of 'train': did you mean --lora_r?
    """
    parser = _Parser(argument_classes, prog=f"bpo-fast {command}", allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe; the options below win over it.")
    names = {item.name for argument_class in argument_classes for item in fields(argument_class) if item.init}
    config, argv = _take_config(argv)
    values = _read_recipe(config, command, names) if config else {}
    values = {name: value for name, value in values.items() if name not in _given(argv)}
    nulls, argv = _take_nulls(argv)
    nulls |= {name for name, value in values.items() if value is None}
    unknown = [name for name in nulls if name not in names]
    if unknown:
        raise ValueError(_unknown(f"option --{unknown[0]} of '{command}'", unknown[0], names, "--"))
    parser.set_defaults(**dict.fromkeys(nulls))
    recipe_argv = [token for name, value in values.items() if value is not None for token in _tokens(name, value)]
    *arguments, _, rest = parser.parse_args_into_dataclasses(
        recipe_argv + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        name = rest[0].removeprefix("--").partition("=")[0].replace("-", "_")
        if not rest[0].startswith("--"):
            raise ValueError(f"unexpected argument {rest[0]!r} of '{command}': options are written --name value.")
        raise ValueError(_unknown(f"option --{name} of '{command}'", name, names, "--"))
    return tuple(arguments)


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help).")


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
            raise ValueError("--config needs the path of a recipe.")
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
    if isinstance(value, dict):
        return [f"--{name}={json.dumps(value)}"]
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    return [f"--{name}={value}"]


def _read_recipe(config, command, names):
    path = _find_recipe(config)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"recipe {path} is not valid YAML: {error.problem}{where}.") from None
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe {path} must map options to values, but it holds a {type(recipe).__name__}.")
    shared = {item.name for item in fields(SharedArguments)}
    values = {}
    for key, value in recipe.items():
        if key in SECTIONS:
            if not isinstance(value, dict | None):
                raise ValueError(f"section '{key}' of recipe {path} must map options to values, but it is {value!r}.")
        elif key in shared:
            values[key] = value
        elif key in names:
            raise ValueError(f"option '{key}' of recipe {path} stands outside a section: put it under '{command}:'.")
        else:
            raise ValueError(_unknown(f"key '{key}' of recipe {path}", key, {*SECTIONS, *shared}))
    for key, value in (recipe.get(command) or {}).items():
        if key not in names:
            raise ValueError(_unknown(f"option '{key}' in section '{command}' of recipe {path}", key, names))
        values[key] = value
    return values


def _find_recipe(config):
    """The file `config`, or the recipe of that name that comes with the package."""
    if Path(config).is_file():
        return Path(config)
    packaged = resources.files("bpo_fast") / "recipes"
    known = sorted(entry.name.removesuffix(".yaml") for entry in packaged.iterdir()) if packaged.is_dir() else []
    if config in known:
        return packaged / f"{config}.yaml"
    raise FileNotFoundError(f"recipe {config} is neither a file nor one of the package's ({', '.join(known)}).")


def _unknown(what, name, names, prefix=""):
    near = difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=0.5)
    return f"unknown {what}" + (f": did you mean {prefix}{near[0]}?" if near else ".")
