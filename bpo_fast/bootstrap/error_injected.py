"""Error injection: a language model rewrites the annotated answer into a wrong one (BPO, arXiv 2403.08730, 3.2).

It sees no image: it adds, removes or changes what its language prior finds likely, and the wrong answer stays close to
the right one. The model is the one that is trained, its vision part left out, or one behind a server.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, Response, generate_text
from bpo_fast.answers.server import Server
from bpo_fast.bootstrap.maker import Made, check_seed, draw
from bpo_fast.bootstrap.rewriting import RewriteTemplate, read_template
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.prompt import answer_ids, render
from bpo_fast.runs.text import shown

MIXED = "mixed"


@dataclass(frozen=True)
class ErrorInjected:
    """Answers with errors put in, the kind "error_injected".

    Args:
        errors: a kind of error of the template (object, attribute, count, relation and text in ours), or "mixed", a
            kind drawn for each sample among those that are not named; or several, each of which gives a sample one
            response.
        template: path of a JSON file of the form that `bootstrap.rewriting` describes; None takes ours.
        seed: of sampling and of the kinds drawn.
        decoding: how the rewritten answers are decoded.
        server: what is asked instead of the model.

    Raises:
        FileNotFoundError: `template` is no file.
        ValueError: one that cannot be used, `errors` that it does not have, or a seed that is no whole number of 64
            bits.

    Example:

    >>> maker = ErrorInjected(errors=("count", "mixed"))
    >>> maker.errors_of(Annotation(0, "a", "1.png", "What is it?", "A cat."))
    ('count', 'attribute')
    """

    kind: ClassVar[str] = "error_injected"
    needs_images: ClassVar[bool] = False
    needs_answer: ClassVar[bool] = True

    errors: str | Sequence[str] = MIXED
    template: str | None = None
    seed: int = 0
    decoding: GenerationSettings = field(default_factory=GenerationSettings)
    server: Server | None = None

    def __post_init__(self):
        errors, known = (self.errors,) if isinstance(self.errors, str) else tuple(self.errors), self._template.errors
        for name in errors:
            if name not in known and name != MIXED:
                raise ValueError(f"errors: found {shown(name)}, expected some of {', '.join(known)} and {MIXED}.")
            if name != MIXED and errors.count(name) > 1:
                raise ValueError(f"errors: found {name!r} twice, expected each kind once.")
        if not 1 <= len(errors) <= len(known):
            raise ValueError(f"errors: found {len(errors)}, expected 1 to {len(known)}, as many as there are kinds.")
        check_seed(self.seed)
        object.__setattr__(self, "errors", errors)

    @cached_property
    def _template(self) -> RewriteTemplate:
        return read_template(self.template)

    @property
    def needs_model(self) -> bool:
        return self.server is None

    def settings(self) -> dict[str, Any]:
        """See `Maker.settings`; a server's model is known by its name there."""
        server_model = None if self.server is None else self.server.model
        known = {"errors": list(self.errors), "template_version": self._template.version, "seed": self.seed}
        return known | {"server_model": server_model, **asdict(self.decoding)}

    def check(self, model: Any, processor: Any) -> None:
        """Refuse a server that does not answer, or a model that has no room for the prompt."""
        if self.server is not None:
            self.server.check()
            return
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        prompts = [self._template.ask(error, "?", "?") for error in self._template.errors]
        texts = [render(processor, prompt, num_images=0)[0] for prompt in prompts]
        # Besides the question, an answer comes twice: in the prompt and rewritten.
        needed = max(len(answer_ids(processor, text)) for text in texts)
        if room is not None and needed >= room:
            raise ValueError(
                f"error_template: found a prompt of {needed} tokens, expected fewer than the model's {room} "
                "positions; give a template with fewer examples."
            )

    def asks(self, sample: Annotation) -> list[str]:
        """See `Maker.asks`: the template filled in, for each of `errors`."""
        return [self._template.ask(error, sample.question, sample.answer) for error in self.errors_of(sample)]

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image | None]
    ) -> list[list[Made]]:
        """See `Maker.make`: each sample's responses in the order of `errors`, a failed one among them."""
        errors, texts = [self.errors_of(sample) for sample in samples], [self.asks(sample) for sample in samples]
        made: list[list[Made]] = [[] for _ in samples]
        # By place in `errors`, so that a batch on the device has as many prompts as there are samples.
        asked = [(n, place) for place in range(len(self.errors)) for n in range(len(samples))]
        prompts = [texts[n][place] for n, place in asked]
        seeds = [draw(self.seed, samples[n], self.kind, errors[n][place]) for n, place in asked]
        replies = self._reply(model, processor, prompts, seeds, len(samples))
        for (n, place), reply in zip(asked, replies, strict=True):
            made[n].append(self._made(errors[n][place], samples[n], reply))
        return made

    def errors_of(self, sample: Annotation) -> tuple[str, ...]:
        """The kind of error of each response of a sample."""
        unnamed = [name for name in self._template.errors if name not in self.errors]
        drawn = iter(sorted(unnamed, key=lambda name: draw(self.seed, sample, MIXED, name)))
        return tuple(next(drawn) if name == MIXED else name for name in self.errors)

    def _reply(self, model, processor, prompts, seeds, batch_size) -> list[Response]:
        if self.server is not None:
            return self.server.answer(prompts, self.decoding, seeds)
        replies = []
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            replies += generate_text(model, processor, prompts[batch], self.decoding, seeds=seeds[batch])
        return replies

    def _made(self, error, sample, reply):
        text = self._template.keep(error, sample.answer, reply.text)
        fault = "" if text else f"not_rewritten: a reply without a modified response, {shown(reply.text)}"
        variant = error if len(self.errors) > 1 else ""
        details = {"error": error, "template_version": self._template.version}
        return Made(text, reply.truncated, variant, details=details, fault=fault)
