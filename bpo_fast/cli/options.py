"""The options of each command: name, type, default, choices and help, each written once.

What a library module keeps as a table comes from there, and by way of `cli.names` where that module imports torch.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from importlib import resources
from typing import Any, ClassVar

from bpo_fast.cli.names import CARDS, EXPORT_FORMS, LORA_TARGET_MODULES, PRESETS
from bpo_fast.evaluate.run import SCORERS
from bpo_fast.runs.numbers import COUNT, SHARE, Range, check_numbers

# Where a command writes when it is told nowhere: the commands' folders lie beside each other.
OUTPUT_ROOT = "bpo_output"
_EVERY_LINEAR = "all-linear"
# A path below the installed package, as recipes that come with it need it: "package:demo/checkpoint".
PACKAGE_PREFIX = "package:"


def option(text: str, *, default: Any = MISSING, choices: Iterable[str] = ()) -> Any:
    """A dataclass field whose metadata `transformers.HfArgumentParser` hands on to `add_argument`."""
    return field(default=default, metadata={"help": text} | ({"choices": list(choices)} if choices else {}))


def output_option(command: str, text: str) -> Any:
    """The option of that name, whose default is the command's own folder."""
    return option(text, default=f"{OUTPUT_ROOT}/{command}")


@dataclass(kw_only=True)
class ModelArguments:
    """Options of every command that reads a model."""

    NUMBERS: ClassVar[dict[str, Range]] = {}

    model_name_or_path: str = option("Model id on the Hugging Face Hub, or folder written by save_pretrained.")
    dtype: str = option(
        "Data type of the model's weights; auto keeps the checkpoint's.",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )

    trust_remote_code: bool = option("Run Python code that comes with the model; read it first.", default=False)

    def __post_init__(self):
        check_numbers(self, self.NUMBERS)
        if self.model_name_or_path.startswith(PACKAGE_PREFIX):
            inside = self.model_name_or_path.removeprefix(PACKAGE_PREFIX)
            self.model_name_or_path = str(resources.files("bpo_fast") / inside)


@dataclass(kw_only=True)
class SharedArguments(ModelArguments):
    """Options of every command that runs a model."""

    image_folder: str | None = option(
        "Folder that image paths are relative to; by default the one that the pairs name.", default=None
    )
    quantization: str = option(
        "nf4 loads the language model in 4 bits and needs bitsandbytes.", default="none", choices=("none", "nf4")
    )

    def load_options(self) -> dict[str, str | bool | None]:
        """Keyword arguments for `bpo_fast.models.load.load_model`."""
        quantization = None if self.quantization == "none" else self.quantization
        return {"dtype": self.dtype, "quantization": quantization, "trust_remote_code": self.trust_remote_code}


@dataclass(kw_only=True)
class TrainArguments(SharedArguments):
    """Options of `bpo-fast train` beside those of `BPOConfig`."""

    NUMBERS: ClassVar[dict[str, Range]] = {
        "lora_r": COUNT,
        "lora_alpha": COUNT,
        "lora_dropout": SHARE,
        "eval_fraction": Range("a number between 0 and 1", lambda x: 0 < x < 1),
    }

    dataset: str = option(
        "Preference pairs: folder written by bpo-fast bootstrap, JSON or JSON-lines file, or folder written by "
        "Dataset.save_to_disk."
    )
    eval_dataset: str | None = option("Pairs to evaluate on during training, as for --dataset.", default=None)
    eval_fraction: float | None = option(
        "Share of the pairs that is held out of training to evaluate on, drawn by the seed.", default=None
    )
    lora_r: int = option("LoRA rank.", default=64)
    lora_alpha: int = option("LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r.", default=128)
    lora_dropout: float = option("Dropout on the adapter's input; needs --disable_dropout false.", default=0.0)
    lora_target_modules: list[str] | None = option(  # noqa: RUF009 - a field, no shared list
        "Linear layers of the language model that get an adapter, or all-linear; null takes "
        f"{', '.join(LORA_TARGET_MODULES)}.",
        default=None,
    )

    def __post_init__(self):
        super().__post_init__()
        if _EVERY_LINEAR in (names := self.lora_target_modules or ()) and len(names) > 1:
            raise ValueError(
                f"lora_target_modules: found {names}, expected {_EVERY_LINEAR} by itself or names of linears; leave "
                "one out."
            )

    @property
    def target_modules(self) -> str | list[str] | None:
        """`lora_target_modules` as `peft.LoraConfig` takes it."""
        return _EVERY_LINEAR if self.lora_target_modules == [_EVERY_LINEAR] else self.lora_target_modules

    def check_with(self, config: Any) -> None:
        """Refuse what has no effect together with the command's `BPOConfig`.

        Raises:
            ValueError: an option that needs another one, or two of which one is enough.
        """
        if self.lora_dropout and config.disable_dropout:
            raise ValueError(
                f"lora_dropout: found {self.lora_dropout} with disable_dropout true, expected 0; set disable_dropout "
                "to false."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(config, name):
                raise ValueError(
                    f"{name}: found true, expected false, as it leaves evaluations during training as they are; use "
                    f"{name.removesuffix('_full_eval')}."
                )
        given = [name for name in ("eval_dataset", "eval_fraction") if getattr(self, name) is not None]
        if len(given) == 2:
            raise ValueError("eval_fraction: found it beside eval_dataset, expected one of them; leave one out.")
        evaluates = config.eval_strategy != "no" or config.eval_on_start
        if given and not evaluates:
            raise ValueError(
                f"{given[0]}: found {getattr(self, given[0])!r} with eval_strategy 'no', expected None; set "
                "eval_strategy to 'steps' or 'epoch'."
            )
        if evaluates and not given:
            name, value = ("eval_strategy", config.eval_strategy.value)
            if value == "no":
                name, value = "eval_on_start", True
            raise ValueError(
                f"{name}: found {value!r} without pairs to evaluate on, expected some; give eval_dataset or "
                "eval_fraction."
            )


@dataclass(kw_only=True)
class PlanArguments(TrainArguments):
    """Options of `bpo-fast plan` beside those of `BPOConfig`: those of the training, whose data set is not read."""

    NUMBERS: ClassVar[dict[str, Range]] = TrainArguments.NUMBERS | {"pairs": COUNT}

    model_name_or_path: str = option("Model of the recipe.", default="")
    dataset: str = option("Of the recipe; not read.", default="")
    model: str | None = option(
        f"{', '.join(PRESETS)}, or a model's folder or config.json; by default the recipe's model.", default=None
    )
    gpu: str | None = option(f"Card: {', '.join(CARDS)}. By default the one that is here.", default=None)
    pairs: int | None = option("Pairs in a batch; by default the recipe's per_device_train_batch_size.", default=None)
    batch_lengths: list[str] | None = option(  # noqa: RUF009 - a field, no shared list
        "Tokens of a batch's pairs in place of the paper's mix, each as prefix,chosen,rejected; a prefix holds its "
        "image.",
        default=None,
    )
    fit: bool = option("Choose checkpointing, token budget, optimizer and caches for the card.", default=False)
    json: bool = option("Print JSON.", default=False)

    def __post_init__(self):
        super().__post_init__()
        if not (self.model or self.model_name_or_path):
            raise ValueError("model: found none, expected one; give --model, or a recipe that names it.")


@dataclass(kw_only=True)
class EvaluateArguments(SharedArguments):
    """Options of `bpo-fast evaluate`, most of them arguments of `bpo_fast.evaluate.run.evaluate`."""

    NUMBERS: ClassVar[dict[str, Range]] = {"max_new_tokens": COUNT, "batch_size": COUNT}

    questions: str = option(
        "Question file: JSON list of {id, image, question} and "
        f"{' or '.join(f'{scorer.truth} (for {kind})' for kind, scorer in SCORERS.items())}; POPE's own files too."
    )
    image_folder: str = option("Folder that the image paths of the questions are relative to.")
    output_dir: str = output_option("evaluate", "Output folder for answers and scores; a run resumes in it.")
    kind: str = option("Scorer.", choices=SCORERS)
    adapter: str | None = option("LoRA adapter to load on the model.", default=None)
    synonyms: str | None = option(
        "JSON table {object: [words]}, for "
        f"{' and '.join(kind for kind, scorer in SCORERS.items() if scorer.needs_synonyms)}.",
        default=None,
    )
    max_new_tokens: int = option("Maximum number of tokens in an answer.", default=512)
    batch_size: int = option("Number of questions in a batch.", default=8)


@dataclass(kw_only=True)
class MergeArguments(ModelArguments):
    """Options of `bpo-fast merge`, the arguments of `bpo_fast.models.merge.merge_adapter`."""

    adapter: str = option("LoRA adapter that bpo-fast train wrote.")
    output_dir: str = output_option("merge", "Output folder for the model with the adapter in its weights.")


@dataclass(kw_only=True)
class ExportArguments:
    """Options of `bpo-fast export`, the arguments of `bpo_fast.data.export.export_pairs`."""

    dataset: str = option("Preference pairs, as train takes them; may stand right behind the command.")
    format: str = option("Form of the records.", choices=EXPORT_FORMS)
    output_dir: str = output_option(
        "export", "Output folder for pairs.json, and for images that lie inside the pairs."
    )


@dataclass(kw_only=True)
class BrowseArguments:
    """Options of `bpo-fast browse`."""

    NUMBERS: ClassVar[dict[str, Range]] = {
        "thumbnail_size": Range("a whole number from 32 to 4096", lambda x: 32 <= x <= 4096)
    }

    dataset: str = option("Preference pairs, as train takes them; may stand right behind the command.")
    image_folder: str | None = option(
        "Folder that image paths are relative to; by default the one that the pairs name.", default=None
    )
    output_dir: str = output_option("browse", "Output folder for the page, which is written anew each time.")
    thumbnail_size: int = option("Pixels of the longer side of a thumbnail.", default=320)
    link_images: bool = option("Show image files where they lie, in place of thumbnails.", default=False)

    def __post_init__(self):
        check_numbers(self, self.NUMBERS)
