"""An evaluation from a question file to its scores.

A scorer is a module of this folder and its entry in `SCORERS`.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bpo_fast.evaluate.answers import check_questions, generate_answers
from bpo_fast.evaluate.chair import check_objects, score_chair
from bpo_fast.evaluate.pope import check_labels, score_pope
from bpo_fast.runs.files import read_json, write_json
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import claim_folder

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class Scorer:
    """One kind of evaluation.

    Attributes:
        truth: field of a question that holds the truth.
        check: called with the truths (and the synonym table) before the model is used; ValueError if it cannot score.
        score: from the answers and the truths (and the synonym table) to the scores.
        needs_synonyms: whether `check` and `score` take a synonym table as their last argument.
    """

    truth: str
    check: Callable[..., None]
    score: Callable[..., dict]
    needs_synonyms: bool = False


SCORERS = {
    "chair": Scorer("objects", check_objects, score_chair, needs_synonyms=True),
    "pope": Scorer("label", check_labels, score_pope),
}


def evaluate(
    model,
    processor,
    questions: str | os.PathLike,
    image_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    kind: str,
    synonyms: str | os.PathLike | Mapping[str, Collection[str]] | None = None,
    adapter: str | os.PathLike | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> dict:
    """Ask a model the questions of a file and score its answers.

    Writes `answers.jsonl` (batch by batch; a killed run goes on there), `scores.json` and `metadata.json` (the
    settings) into `output_dir`.

    Args:
        model, processor: as `bpo_fast.models.load.load_model` and `load_processor` give them.
        questions: path of a JSON list of `{id, image, question}` with `objects` (list of names, for "chair") or
            `label` ("yes" | "no", for "pope"); other fields are ignored.
        image_folder: folder that the `image` paths start from.
        output_dir: folder of this evaluation alone.
        kind: a key of `SCORERS`: "chair" (hallucinated objects in descriptions) or "pope" (yes/no questions).
        synonyms: for "chair", object -> its words, or the path of a JSON file with such a table.
        adapter: path of the adapter that `model` carries; kept in the settings, so that answers of one adapter are
            not taken for another's.
        max_new_tokens, batch_size: of the generation, which is greedy.

    Returns:
        The scores, see `score_chair` and `score_pope`.

    Raises:
        FileNotFoundError: `questions`, `image_folder` or the file of `synonyms` does not exist.
        ValueError: unknown kind, a kind without what it needs, bad questions, or an `output_dir` of another run.

    Example (with a LLaVA `model` and its `processor`):

        evaluate(model, processor, "pope_random.json", "coco/val2014", "scores/pope", kind="pope")["f1"]
    """
    if kind not in SCORERS:
        raise ValueError(f"kind: found '{kind}', expected one of {', '.join(SCORERS)}.")
    scorer = SCORERS[kind]
    if scorer.needs_synonyms and synonyms is None:
        raise ValueError(f"synonyms: found None, expected a synonym table for kind '{kind}'.")
    if synonyms is not None and not scorer.needs_synonyms:
        raise ValueError(f"synonyms: found a synonym table, expected None for kind '{kind}'; leave it out.")
    if not Path(image_folder).is_dir():
        raise FileNotFoundError(f"image_folder: found no folder '{image_folder}', expected that of the images.")
    records = read_json(questions)
    if not isinstance(records, list):
        raise ValueError(f"{questions}: found a {type(records).__name__}, expected a JSON list of records.")
    check_questions(records, ("id", "image", "question", scorer.truth))
    if synonyms is not None:
        synonyms = dict(synonyms) if isinstance(synonyms, Mapping) else read_json(synonyms)
    truths = [record[scorer.truth] for record in records]
    reference = (truths, synonyms) if scorer.needs_synonyms else (truths,)
    scorer.check(*reference)
    settings = {
        "kind": kind,
        "model": model.name_or_path,
        "adapter": None if adapter is None else str(adapter),
        "questions": fingerprint([records, synonyms]),
        "max_new_tokens": max_new_tokens,
    }
    output_dir = Path(output_dir)
    claim_folder(output_dir, settings)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "desc": kind}
    answers = generate_answers(
        model, processor, records, image_folder=image_folder, answers_file=output_dir / ANSWERS_FILE, **options
    )
    scores = scorer.score(answers, *reference)
    write_json(output_dir / SCORES_FILE, scores)
    return scores
