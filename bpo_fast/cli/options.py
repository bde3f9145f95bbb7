"""The options of each command: name, type, default, choices and help, each written once.

What a library module keeps as a table (noise targets, schedules, scorers) comes from there: an entry added to such a
table is a choice of the command.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from typing import Any

from bpo_fast.evaluate.run import SCORERS
from bpo_fast.models.lora import LORA_TARGET_MODULES
from bpo_fast.models.weaken import SCHEDULES, TARGETS


def _option(text: str, *, default: Any = MISSING, choices: Iterable[str] = ()) -> Any:
    """A dataclass field whose metadata `transformers.HfArgumentParser` hands on to `add_argument`."""
    return field(default=default, metadata={"help": text} | ({"choices": list(choices)} if choices else {}))


@dataclass(kw_only=True)
class SharedArguments:
    """Options of every command that runs a model."""

    model_name_or_path: str = _option("Model id on the Hugging Face Hub, or folder written by save_pretrained.")
    image_folder: str | None = _option(
        "Folder that image paths are relative to; by default the one that the pairs name.", default=None
    )
    dtype: str = _option(
        "Data type of the model's weights; auto keeps the checkpoint's.",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = _option(
        "nf4 loads the language model in 4 bits and needs bitsandbytes.", default="none", choices=("none", "nf4")
    )

    def load_options(self) -> dict[str, str | None]:
        """Keyword arguments for `bpo_fast.models.load.load_model`."""
        return {"dtype": self.dtype, "quantization": None if self.quantization == "none" else self.quantization}


@dataclass(kw_only=True)
class BootstrapArguments(SharedArguments):
    """Options of `bpo-fast bootstrap`, most of them arguments of `bpo_fast.bootstrap.bootstrap`."""

    annotations: str = _option("Annotation file in LLaVA-Instruct format.")
    image_folder: str = _option("Folder that the image paths of the annotations are relative to.")
    output_dir: str = _option("Output folder for the pairs; an interrupted run resumes in it.")
    adapter: str | None = _option("LoRA adapter to load on the model.", default=None)
    noise_target: str = _option("Tensor that the noise is added to.", default="features", choices=TARGETS)
    noise_step: int | None = _option("Noise schedule step, 0 to 999; null adds no noise.", default=500)
    schedule: str = _option("Noise schedule.", default="sigmoid", choices=SCHEDULES)
    seed: int = _option("Random seed of noise, sampling and the choice of records.", default=0)
    max_new_tokens: int = _option("Maximum number of tokens in a response.", default=512)
    batch_size: int = _option("Number of questions in a batch.", default=8)
    do_sample: bool = _option("Sample responses instead of decoding greedily.", default=False)
    temperature: float | None = _option("Sampling temperature.", default=None)
    top_p: float | None = _option("Sampling: total probability of the tokens to choose from.", default=None)
    max_response_words: int | None = _option(
        "Skip pairs with a response of more words; null keeps them all.", default=350
    )
    max_samples: int | None = _option(
        "Number of annotations to use, drawn uniformly; null uses them all.", default=None
    )


@dataclass(kw_only=True)
class TrainArguments(SharedArguments):
    """Options of `bpo-fast train` beside those of `BPOConfig`."""

    dataset: str = _option(
        "Preference pairs: folder written by bpo-fast bootstrap, JSON or JSON-lines file, or folder written by "
        "Dataset.save_to_disk."
    )
    eval_dataset: str | None = _option("x", default=None)
    eval_fraction: float | None = _option("x", default=None)
    lora_r: int = _option("LoRA rank.", default=64)
    lora_alpha: int = _option("LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r.", default=128)
    lora_dropout: float = _option("Dropout on the adapter's input.", default=0.0)
    lora_target_modules: list[str] | None = _option(  # noqa: RUF009 - a field, no shared list
        f"Linear layers of the language model that get an adapter; null takes {', '.join(LORA_TARGET_MODULES)}.",
        default=None,
    )


@dataclass(kw_only=True)
class EvaluateArguments(SharedArguments):
    """Options of `bpo-fast evaluate`, most of them arguments of `bpo_fast.evaluate.run.evaluate`."""

    questions: str = _option(
        "Question file: JSON list of {id, image, question} and "
        f"{' or '.join(f'{scorer.truth} (for {kind})' for kind, scorer in SCORERS.items())}."
    )
    image_folder: str = _option("Folder that the image paths of the questions are relative to.")
    output_dir: str = _option("Output folder for answers and scores; an interrupted run resumes in it.")
    kind: str = _option("Scorer.", choices=SCORERS)
    adapter: str | None = _option("LoRA adapter to load on the model.", default=None)
    synonyms: str | None = _option(
        "JSON table {object: [words]}, for "
        f"{' and '.join(kind for kind, scorer in SCORERS.items() if scorer.needs_synonyms)}.",
        default=None,
    )
    max_new_tokens: int = _option("Maximum number of tokens in an answer.", default=512)
    batch_size: int = _option("Number of questions in a batch.", default=8)
