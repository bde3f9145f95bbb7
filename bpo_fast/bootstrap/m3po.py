"""M3PO: the best of a pool of the model's own answers against one it is confident of though it fits the image less.

This is our reading of an abstract (arXiv 2508.12458), whose formulas are not public: it has a multimodal alignment
score, the model's own confidence, an M3P-Score of both, and a dispreferred answer that is a hard negative. Ours, for a
pool of answers i:

    a_i  cosine of answer and image by a CLIP-like model (the alignment)
    c_i  log-prob of the answer a token (the confidence)
    s_i  w z(a)_i + (1 - w) z(c)_i (the M3P-Score), z being the distance from the pool's mean in standard deviations

The answer of the highest s_i is preferred, p. Of those with a_i <= a_p - margin, the one of the highest c_i is
dispreferred. Where two are equal, the earlier of the pool is taken.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, pstdev
from typing import Any, ClassVar, NamedTuple

from PIL import Image

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.answers.score import check_scoring, score_answers
from bpo_fast.bootstrap.filters import FilterOptions, check, normalised, similarity
from bpo_fast.bootstrap.maker import Made, check_seed, draw
from bpo_fast.data.annotations import Annotation
from bpo_fast.models.clip import load_clip
from bpo_fast.models.conversation import Messages
from bpo_fast.models.prompt import render
from bpo_fast.models.weights import weights_fingerprint
from bpo_fast.runs.numbers import NOT_NEGATIVE, Range, check_numbers


class Candidate(NamedTuple):
    """One answer of a pool.

    Attributes:
        text: the answer.
        alignment: how well it fits the image.
        confidence: the model's log-prob of it, a token.
        annotated: it is the annotated answer, which is never dispreferred.
    """

    text: str
    alignment: float
    confidence: float
    annotated: bool = False


def m3p_scores(pool: Sequence[Candidate], alignment_weight: float) -> list[float]:
    """The M3P-Score of each candidate.

    >>> m3p_scores([Candidate("a", 0.5, -1.0), Candidate("b", 0.25, -3.0)], 0.5)
    [1.0, -1.0]
    """
    alignments = _standardised([candidate.alignment for candidate in pool])
    confidences = _standardised([candidate.confidence for candidate in pool])
    both = zip(alignments, confidences, strict=True)
    return [alignment_weight * a + (1 - alignment_weight) * c for a, c in both]


def choose(pool: Sequence[Candidate], scores: Sequence[float], margin: float) -> tuple[int, int | None]:
    """The places in the pool of the preferred and of the dispreferred candidate, None where none is fit to be it.

    Args:
        pool: the candidates.
        scores: their M3P-Scores.
        margin: least difference of the two alignments.

    >>> pool = [Candidate("a", 0.3, -2.0), Candidate("b", 0.2, -1.5), Candidate("c", 0.1, -1.0)]
    >>> choose(pool, m3p_scores(pool, 1.0), margin=0.05)
    (0, 2)
    """
    best = max(range(len(pool)), key=scores.__getitem__)
    wrong = [
        place
        for place, candidate in enumerate(pool)
        if place != best and not candidate.annotated and pool[best].alignment - candidate.alignment >= margin
    ]
    return best, max(wrong, key=lambda place: pool[place].confidence, default=None)


def _standardised(values):
    """Distances from the mean in standard deviations, all 0 where the values are one; their order changes no bit."""
    mean, deviation = fmean(values), pstdev(values)
    return [(value - mean) / deviation if deviation else 0.0 for value in values]


@dataclass(frozen=True)
class M3PO:
    """Pairs of two answers of the model, scored by a CLIP-like model and by itself. Our reading of an abstract.

    Left out of the pool are answers that were cut at max_new_tokens, that the default filters would drop (loops,
    refusals, echoes), or that are nearly as one before them. A sample whose pool is too small, or whose answers fit
    the image too much alike, gives no pair and is counted.

    Args:
        alignment_model: path or name of a CLIP-like model, such as openai/clip-vit-large-patch14.
        num_candidates: answers that are sampled for each prompt.
        alignment_weight: share of the alignment in the M3P-Score, from 0 to 1; the rest is the confidence's.
        margin: by how much less than the preferred answer the dispreferred one must fit the image, as a cosine.
        include_annotation: put the annotated answer into the pool, where it may be preferred.
        pool_similarity: candidates more alike than this, from 0 to 1, are one; see `FilterOptions.max_similarity`.
        seed: of sampling.
        decoding: how candidates are sampled.

    Raises:
        ValueError: no alignment model, greedy decoding, or a number out of its range.
    """

    kind: ClassVar[str] = "m3po"
    needs_model: ClassVar[bool] = True
    needs_images: ClassVar[bool] = True

    alignment_model: str | None = None
    num_candidates: int = 8
    alignment_weight: float = 0.5
    margin: float = 0.01
    include_annotation: bool = False
    pool_similarity: float = 0.95
    seed: int = 0
    decoding: GenerationSettings = field(default_factory=lambda: GenerationSettings(do_sample=True))

    def __post_init__(self):
        if not self.alignment_model:
            raise ValueError(
                "alignment_model: found none, expected the path or name of a CLIP-like model, which says how well an "
                "answer fits its image; e.g. openai/clip-vit-large-patch14."
            )
        share = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
        count = Range("a whole number of at least 2", lambda x: x >= 2, whole=True)
        ranges = {"num_candidates": count, "alignment_weight": share, "margin": NOT_NEGATIVE, "pool_similarity": share}
        check_numbers(self, ranges)
        if not self.decoding.do_sample:
            raise ValueError("do_sample: found False, expected True for m3po, whose candidates are sampled.")
        check_seed(self.seed)

    @property
    def needs_answer(self) -> bool:
        return self.include_annotation

    def settings(self) -> dict[str, Any]:
        options = asdict(self)
        decoding = options.pop("decoding")
        weights = weights_fingerprint(self.alignment_model, what="alignment_model")
        return options | decoding | {"alignment_model": {"path": str(self.alignment_model), "weights": weights}}

    def check(self, model: Any, processor: Any) -> None:
        load_clip(str(self.alignment_model), model.device)
        check_processor(model, processor, Image.new("RGB", (64, 64)))
        check_scoring(model, processor)

    def asks(self, sample: Annotation) -> list[Messages]:
        return [sample.prompt]

    def make(
        self, model: Any, processor: Any, samples: Sequence[Annotation], images: Sequence[Image.Image]
    ) -> list[list[Made]]:
        prompts, pools = [sample.prompt for sample in samples], [[] for _ in samples]
        for number in range(self.num_candidates):
            seeds = [draw(self.seed, sample, self.kind, number) for sample in samples]
            responses = generate(model, processor, images, prompts, self.decoding, seeds=seeds)
            for pool, response in zip(pools, responses, strict=True):
                pool.append(response)
        asked = zip(samples, images, pools, strict=True)
        return [[self._pair(model, processor, sample, image, pool)] for sample, image, pool in asked]

    def _pair(self, model, processor, sample, image, responses):
        annotated = [sample.answer] if self.include_annotation else []
        sampled = [response.text for response in responses if _is_answer(processor, sample, response)]
        texts = self._distinct(annotated + sampled)
        if len(texts) < 2:
            found = f"{len(texts)} whole, sound and distinct of {len(responses)} sampled answers"
            return Made(None, fault=f"m3po_pool: {found}, where two are needed")
        alignments = load_clip(str(self.alignment_model), model.device).alignments(image, texts)
        scores = score_answers(model, processor, image, sample.prompt, texts)
        pool = [
            Candidate(text, alignment, score.mean, place < len(annotated))
            for place, (text, alignment, score) in enumerate(zip(texts, alignments, scores, strict=True))
        ]
        m3p = m3p_scores(pool, self.alignment_weight)
        best, wrong = choose(pool, m3p, self.margin)
        if wrong is None:
            found = f"no answer that fits the image by {self.margin:g} less than the preferred one"
            return Made(None, fault=f"m3po_margin: {found}, of {len(pool)}")
        chosen, details = pool[best], {"pool": len(pool), "chosen_is_annotated": pool[best].annotated}
        for name, place in (("chosen", best), ("rejected", wrong)):
            details |= {f"m3p_score_{name}": m3p[place], f"alignment_{name}": pool[place].alignment}
            details[f"confidence_{name}"] = pool[place].confidence
        return Made(pool[wrong].text, chosen=None if chosen.annotated else chosen.text, details=details)

    def _distinct(self, texts):
        """The texts without those that nearly repeat an earlier one."""
        kept: dict[str, str] = {}
        for text in texts:
            words = normalised(text)
            most = self.pool_similarity
            if words not in kept and all(similarity(words, other, most) <= most for other in kept):
                kept[words] = text
        return list(kept.values())


def _is_answer(processor, sample, response):
    """Whether a response can be scored and preferred: whole, without an image's placeholder, and well-formed.

    A loop or a refusal is what a model is most confident of, and would be dispreferred for nothing that it says.
    """
    if response.truncated or check(sample, Made(None, chosen=response.text), FilterOptions(max_response_words=None)):
        return False
    try:
        render(processor, sample.prompt, [response.text])
    except ValueError:
        return False
    return True
