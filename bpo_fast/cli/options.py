"""The options of each command: name, type, default, choices and help, each written once.

What a library module keeps as a table (noise targets, schedules, scorers) comes from there: an entry added to such a
table is a choice of the command.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bpo_fast.evaluate.run import SCORERS
from bpo_fast.models.lora import LORA_TARGET_MODULES
from bpo_fast.models.weaken import SCHEDULES, TARGETS


def _about(text: str, choices: Iterable[str] = ()) -> dict[str, Any]:
    """Metadata that `transformers.HfArgumentParser` hands on to `add_argument`."""
    return {"help": text} | ({"choices": list(choices)} if choices else {})


@dataclass(kw_only=True)
class SharedArguments:
    """Options of every command that runs a model."""

    model_name_or_path: str = field(
        metadata=_about("Model id on the Hugging Face Hub, or folder written by save_pretrained.")
    )
    image_folder: str | None = field(
        default=None,
        metadata=_about("Folder that image paths are relative to; by default the one that the pairs name."),
    )
    dtype: str = field(
        default="auto",
        metadata=_about(
            "Data type of the model's weights; auto keeps the checkpoint's.",
            ("auto", "float32", "bfloat16", "float16"),
        ),
    )
    quantization: str = field(
        default="none",
        metadata=_about("nf4 loads the language model in 4 bits and needs bitsandbytes.", ("none", "nf4")),
    )

    def load_options(self) -> dict[str, str | None]:
        """Keyword arguments for `bpo_fast.models.load.load_model`."""
        return {"dtype": self.dtype, "quantization": None if self.quantization == "none" else self.quantization}


@dataclass(kw_only=True)
class BootstrapArguments(SharedArguments):
    """Options of `bpo-fast bootstrap`, most of them arguments of `bpo_fast.bootstrap.bootstrap`."""

    annotations: str = field(metadata=_about("Annotation file in LLaVA-Instruct format."))
    image_folder: str = field(metadata=_about("Folder that the image paths of the annotations are relative to."))
    output_dir: str = field(metadata=_about("Output folder for the pairs; an interrupted run resumes in it."))
    adapter: str | None = field(default=None, metadata=_about("LoRA adapter to load on the model."))
    noise_target: str = field(default="features", metadata=_about("Tensor that the noise is added to.", TARGETS))
    noise_step: int | None = field(default=500, metadata=_about("Noise schedule step, 0 to 999; null adds no noise."))
    schedule: str = field(default="sigmoid", metadata=_about("Noise schedule.", SCHEDULES))
    seed: int = field(default=0, metadata=_about("Random seed of noise, sampling and the choice of records."))
    max_new_tokens: int = field(default=512, metadata=_about("Maximum number of tokens in a response."))
    batch_size: int = field(default=8, metadata=_about("Number of questions in a batch."))
    do_sample: bool = field(default=False, metadata=_about("Sample responses instead of decoding greedily."))
    temperature: float | None = field(default=None, metadata=_about("Sampling temperature."))
    top_p: float | None = field(
        default=None, metadata=_about("Sampling: total probability of the tokens to choose from.")
    )
    max_response_words: int | None = field(
        default=350, metadata=_about("Skip pairs with a response of more words; null keeps them all.")
    )
    max_samples: int | None = field(
        default=None, metadata=_about("Number of annotations to use, drawn uniformly; null uses them all.")
    )


@dataclass(kw_only=True)
class TrainArguments(SharedArguments):
    """Options of `bpo-fast train` beside those of `BPOConfig`."""

    dataset: str = field(
        metadata=_about(
            "Preference pairs: folder written by bpo-fast bootstrap, JSON or JSON-lines file, or folder written by "
            "Dataset.save_to_disk."
        )
    )
    lora_r: int = field(default=64, metadata=_about("LoRA rank."))
    lora_alpha: int = field(
        default=128, metadata=_about("LoRA scale: the adapter's output is multiplied by lora_alpha / lora_r.")
    )
    lora_dropout: float = field(default=0.0, metadata=_about("Dropout on the adapter's input."))
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=_about(
            f"Linear layers of the language model that get an adapter; null takes {', '.join(LORA_TARGET_MODULES)}."
        ),
    )


@dataclass(kw_only=True)
class EvaluateArguments(SharedArguments):
    """Options of `bpo-fast evaluate`, most of them arguments of `bpo_fast.evaluate.run.evaluate`."""

    questions: str = field(
        metadata=_about(
            "Question file: JSON list of {id, image, question} and "
            f"{' or '.join(f'{scorer.truth} (for {kind})' for kind, scorer in SCORERS.items())}."
        )
    )
    image_folder: str = field(metadata=_about("Folder that the image paths of the questions are relative to."))
    output_dir: str = field(metadata=_about("Output folder for answers and scores; an interrupted run resumes in it."))
    kind: str = field(metadata=_about("Scorer.", SCORERS))
    adapter: str | None = field(default=None, metadata=_about("LoRA adapter to load on the model."))
    synonyms: str | None = field(
        default=None,
        metadata=_about(
            "JSON table {object: [words]}, for "
            f"{' and '.join(kind for kind, scorer in SCORERS.items() if scorer.needs_synonyms)}."
        ),
    )
    max_new_tokens: int = field(default=512, metadata=_about("Maximum number of tokens in an answer."))
    batch_size: int = field(default=8, metadata=_about("Number of questions in a batch."))
