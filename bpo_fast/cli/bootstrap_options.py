"""The options of `bpo-fast bootstrap`, and what they ask for: sources, kinds of negatives, filters."""

from dataclasses import dataclass
from typing import Any, ClassVar

from bpo_fast.cli.names import KINDS, NOISE_TARGETS, SCHEDULES
from bpo_fast.cli.options import SharedArguments, option, output_option
from bpo_fast.runs.numbers import COUNT, NOT_NEGATIVE, POSITIVE, SEED, Range

_UNIT = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
_WHOLE = Range("a whole number of at least 0", lambda x: x >= 0, whole=True)
_OF_SERVERS = ("server_model", "server_key_env", "server_concurrency", "server_timeout", "server_retries")
# Options that have an effect with one kind alone.
_OF_KINDS = {
    "image_weakened": ("noise_target", "noise_steps", "schedule"),
    "error_injected": ("errors", "error_template", "server_url", *_OF_SERVERS),
    "m3po": ("alignment_model", "num_candidates", "alignment_weight", "alignment_margin", "include_annotation"),
}


@dataclass(kw_only=True)
class BootstrapArguments(SharedArguments):
    """Options of `bpo-fast bootstrap`, most of them arguments of `bpo_fast.bootstrap.bootstrap`."""

    NUMBERS: ClassVar[dict[str, Range]] = {
        "seed": SEED,
        "max_new_tokens": COUNT,
        "batch_size": COUNT,
        "temperature": POSITIVE,
        "top_p": Range("a number above 0 and at most 1", lambda x: 0 < x <= 1),
        "max_response_words": COUNT,
        "max_samples": COUNT,
        "rows_per_part": COUNT,
        "num_shards": COUNT,
        "shard_index": _WHOLE,
        "ray_workers": COUNT,
        "server_concurrency": COUNT,
        "server_timeout": POSITIVE,
        "server_retries": _WHOLE,
        "num_candidates": Range("a whole number of at least 2", lambda x: x >= 2, whole=True),
        "alignment_weight": _UNIT,
        "alignment_margin": NOT_NEGATIVE,
        "max_similarity": _UNIT,
        "max_repetition": _UNIT,
        "min_logp_gap": NOT_NEGATIVE,
    }

    annotations: str | None = option(
        "Annotations: JSON or JSON-lines file of LLaVA-Instruct's form, Parquet, or a data set of the Hub.",
        default=None,
    )
    image_folder: str | None = option(
        "Folder that the image paths of the annotations are relative to; by default theirs.", default=None
    )
    sources: list[dict] | None = option(  # noqa: RUF009 - a field, no shared list
        "In a recipe, in place of annotations and image_folder: a list of data sets, each with name, annotations, "
        "image_folder, samples, ...",
        default=None,
    )
    output_dir: str = output_option("bootstrap", "Output folder for the pairs; a run resumes in it.")
    adapter: str | None = option("LoRA adapter to load on the model.", default=None)
    kinds: list[str] | None = option(  # noqa: RUF009 - a field, no shared list
        "Kinds of rejected responses; null takes image_weakened, or self_generated without noise.",
        default=None,
        choices=KINDS,
    )
    noise_target: str = option("Tensor that the noise is added to.", default="features", choices=NOISE_TARGETS)
    noise_step: int | None = option("Noise schedule step, 0 to 999; null adds no noise.", default=500)
    noise_steps: list[int] | None = option(  # noqa: RUF009 - a field, no shared list
        "Several noise steps, which give a record a pair each, in place of noise_step.", default=None
    )
    schedule: str = option("Noise schedule.", default="sigmoid", choices=SCHEDULES)
    errors: list[str] | None = option(  # noqa: RUF009 - a field, no shared list
        "Kinds of injected errors (object, attribute, count, relation, text), a pair each; null draws one.",
        default=None,
    )
    error_template: str | None = option("JSON file of the prompt that injects errors; null takes ours.", default=None)
    server_url: str | None = option(
        "OpenAI-compatible server that injects errors in place of the model, such as http://localhost:8000/v1.",
        default=None,
    )
    server_model: str | None = option("Model to ask for there.", default=None)
    server_key_env: str | None = option("Environment variable that holds the server's key.", default=None)
    server_concurrency: int = option("Requests to the server at a time, of each process.", default=32)
    server_timeout: float = option("Seconds to wait for an answer before the server is asked again.", default=300.0)
    server_retries: int = option("Times that the server is asked again for an answer.", default=20)
    alignment_model: str | None = option("CLIP-like model that scores m3po's candidates.", default=None)
    num_candidates: int = option("Answers that m3po samples for a prompt.", default=8)
    alignment_weight: float = option("Share of the alignment in the M3P-Score.", default=0.5)
    alignment_margin: float = option("Least lead in alignment of m3po's preferred answer.", default=0.01)
    include_annotation: bool = option("Put the annotated answer among m3po's candidates.", default=False)
    seed: int = option("Random seed of noise, sampling and the choice of records.", default=0)
    max_new_tokens: int = option("Maximum number of tokens in a response.", default=512)
    batch_size: int = option("Number of questions in a batch.", default=8)
    do_sample: bool = option("Sample responses instead of decoding greedily; m3po always samples.", default=False)
    temperature: float | None = option("Sampling temperature.", default=None)
    top_p: float | None = option("Sampling: total probability of the tokens to choose from.", default=None)
    max_response_words: int | None = option(
        "Skip pairs with a response of more words; null keeps them all.", default=350
    )
    max_similarity: float | None = option("Skip pairs of responses more alike; null keeps them.", default=None)
    max_repetition: float | None = option("Skip responses that repeat themselves more; null keeps them.", default=0.5)
    drop_refusals: bool = option("Skip responses that refuse to answer.", default=True)
    drop_echoes: bool = option("Skip responses that repeat the question or go on with the next.", default=True)
    drop_truncated: bool = option("Skip rejected responses that were cut at max_new_tokens.", default=False)
    score_pairs: bool = option("Write the model's log-probs of chosen and rejected.", default=False)
    min_logp_gap: float | None = option(
        "Skip pairs whose log-probs a token are closer; needs score_pairs; null keeps them.", default=None
    )
    max_samples: int | None = option(
        "Number of annotations to use, drawn uniformly; null uses them all.", default=None
    )
    embed_images: bool = option("Put the images into the output instead of their paths.", default=False)
    rows_per_part: int = option("Annotations that a process takes at a time, and a shard holds.", default=1024)
    num_shards: int | None = option(
        "Work on every so-manieth part only, and do not wait for the others; with shard_index.", default=None
    )
    shard_index: int | None = option("Which parts: number 0 to num_shards - 1.", default=None)
    ray: str | None = option(
        "Make the parts on a Ray cluster: its address, auto for the one of this node, local for this machine.",
        default=None,
    )
    ray_workers: int | None = option("Workers on the cluster; null takes one a GPU, or a CPU.", default=None)
    dry_run: bool = option("Show the first prompts and images of each kind; no weights, no output.", default=False)

    def __post_init__(self):
        super().__post_init__()
        if self.sources is None and self.annotations is None:
            raise ValueError(
                "annotations: found none, expected a file of them; give --annotations, or sources in a recipe."
            )
        for name, other in (("shard_index", "num_shards"), ("num_shards", "shard_index")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"{name}: found it without {other}, expected both; give {other}.")
        if self.ray_workers is not None and self.ray is None:
            raise ValueError("ray_workers: found it without ray, expected both; give ray.")
        if self.server_url is not None and self.server_model is None:
            raise ValueError("server_url: found it without server_model, expected both; give server_model.")
        for kind, names in _OF_KINDS.items():
            changed = self._changed(names)
            if changed and kind not in self.kind_names:
                raise ValueError(
                    f"{changed[0]}: found it without the kind {kind}, which alone it is for; add {kind} to kinds."
                )

        if self.server_url is None and (changed := self._changed(_OF_SERVERS)):
            raise ValueError(f"{changed[0]}: found it without server_url, expected both; give server_url.")

    def _changed(self, names):
        """Those of the options that have not their default."""
        return [name for name in names if getattr(self, name) != self.__dataclass_fields__[name].default]

    @property
    def kind_names(self) -> list[str]:
        """The kinds asked for."""
        noise = self.noise_steps or self.noise_step is not None
        return self.kinds or ["image_weakened" if noise else "self_generated"]

    def run_options(self) -> dict[str, Any]:
        """Keyword arguments for `bpo_fast.bootstrap.bootstrap`, beside the model's."""
        from bpo_fast.bootstrap.filters import FilterOptions
        from bpo_fast.data.sources import parse_sources

        filters = ("max_similarity", "max_repetition", "drop_refusals", "drop_echoes", "drop_truncated")
        names = (
            *("annotations", "image_folder", "output_dir", "adapter", "seed", "batch_size", "max_response_words"),
            *("max_samples", "embed_images", "rows_per_part", "num_shards", "shard_index", "ray", "ray_workers"),
            *("score_pairs",),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "sources": None if self.sources is None else parse_sources(self.sources),
            "kinds": self._makers(),
            "filters": FilterOptions(**{name: getattr(self, name) for name in (*filters, "min_logp_gap")}),
        }

    def _makers(self):
        from bpo_fast.answers.sampling import GenerationSettings
        from bpo_fast.answers.server import Server
        from bpo_fast.bootstrap.error_injected import MIXED, ErrorInjected
        from bpo_fast.bootstrap.image_weakened import ImageWeakened
        from bpo_fast.bootstrap.m3po import M3PO
        from bpo_fast.bootstrap.self_generated import SelfGenerated
        from bpo_fast.bootstrap.sft import ChosenOnly

        def decoding(do_sample=self.do_sample):
            return GenerationSettings(self.max_new_tokens, do_sample, self.temperature, self.top_p)

        def weakened():
            steps = self.noise_steps or self.noise_step
            if steps is None:
                raise ValueError("noise_step: found null for image_weakened, expected a step; give one.")
            return ImageWeakened(self.noise_target, steps, self.schedule, self.seed, decoding())

        def injected():
            server = None
            if self.server_url is not None:
                server = Server(
                    self.server_url,
                    self.server_model,
                    api_key_env=self.server_key_env,
                    max_concurrency=self.server_concurrency,
                    timeout=self.server_timeout,
                    max_retries=self.server_retries,
                )
            return ErrorInjected(self.errors or MIXED, self.error_template, self.seed, decoding(), server)

        def m3po():
            return M3PO(
                alignment_model=self.alignment_model,
                num_candidates=self.num_candidates,
                alignment_weight=self.alignment_weight,
                margin=self.alignment_margin,
                include_annotation=self.include_annotation,
                seed=self.seed,
                decoding=decoding(do_sample=True),
            )

        makers = {
            "image_weakened": weakened,
            "error_injected": injected,
            "self_generated": lambda: SelfGenerated(self.seed, decoding()),
            "m3po": m3po,
            "sft": ChosenOnly,
        }
        return [makers[name]() for name in self.kind_names]
