"""An evaluation from a question file to its scores.

A scorer is a module of this folder and its entry in `SCORERS`.
"""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpo_fast.evaluate.chair import check_objects, score_chair
from bpo_fast.evaluate.pope import check_labels, score_pope
from bpo_fast.evaluate.questions import normalise_question
from bpo_fast.runs.files import read_json, write_json, write_jsonl
from bpo_fast.runs.folder import locked_folder
from bpo_fast.runs.text import shown

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True, slots=True)
class Question:
    """What the model is asked: a record's id, the name of its image, and its text."""

    id: str | int
    image: str
    question: str


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
    model_init_kwargs: Mapping | None = None,
) -> dict:
    """Ask a model the questions of a file and score its answers.

    Writes into `output_dir`: `answers.jsonl` (id and answer, in the order of the questions), `scores.json`,
    `skipped.jsonl` (questions whose image cannot be read, which are left out of the score), `metadata.json` (the
    settings) and `responses.jsonl` (every answer, appended batch by batch). A run that was killed goes on where it
    stopped when it is called again with the same arguments. An answer is known by its question's id, text and image:
    added or mended questions cost only themselves, labels, objects and synonyms nothing. Whatever else changes an
    answer is another run.

    Args:
        model: vision-language model of transformers, or the path of one, which is then loaded only when everything
            else has been checked, images included, and there is an answer left to make.
        processor: its processor; None takes the one saved with the model.
        questions: path of a JSON or JSON-lines file of `{id, image, question}` with `objects` (list of names, for
            "chair") or `label` ("yes" | "no", for "pope"); other fields are ignored, and POPE's own names are known,
            see `normalise_question`.
        image_folder: folder that the `image` paths start from.
        output_dir: folder of this evaluation alone.
        kind: a key of `SCORERS`: "chair" (hallucinated objects in descriptions) or "pope" (yes/no questions).
        synonyms: for "chair", object -> its words, or the path of a JSON file with such a table.
        adapter: path of the adapter that `model` carries, or gets where `model` is a path. The weights of model and
            adapter are kept in the settings, so that answers of one are not taken for another's.
        max_new_tokens, batch_size: of the generation, which is greedy.
        model_init_kwargs: further arguments of `bpo_fast.models.load.load_model` where `model` is a path.

    Returns:
        The scores, see `score_chair` and `score_pope`, and `num_skipped`.

    Raises:
        FileNotFoundError: `questions`, `image_folder` or the file of `synonyms` does not exist.
        ValueError: unknown kind, a kind without what it needs, bad questions, no image that can be read, an
            `output_dir` of another run, a damaged file in it, or a processor that does not match the model.
        OSError: `output_dir` cannot be written.

    Example:

        model = "llava-hf/llava-1.5-7b-hf"
        evaluate(model, None, "pope_random.json", "coco/val2014", "scores/pope", kind="pope")["f1"]
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
    records = _read_questions(questions, ("id", "image", "question", scorer.truth))
    if synonyms is not None:
        synonyms = dict(synonyms) if isinstance(synonyms, Mapping) else read_json(synonyms)

    def reference(records):
        truths = [record[scorer.truth] for record in records]
        return (truths, synonyms) if scorer.needs_synonyms else (truths,)

    scorer.check(*reference(records))
    # Imported on use: whoever only looks a scorer up need not wait for torch and PEFT.
    from bpo_fast.answers.batches import respond
    from bpo_fast.answers.generate import generate
    from bpo_fast.answers.given import GivenModel
    from bpo_fast.answers.sampling import GenerationSettings, check_count

    check_count("batch_size", batch_size)
    decoding = GenerationSettings(max_new_tokens)
    given = GivenModel(model, processor, adapter, model_init_kwargs or {})
    settings = {"kind": kind, "max_new_tokens": max_new_tokens}
    asked = [Question(record["id"], record["image"], record["question"]) for record in records]

    def answer(model, processor, batch, images):
        return generate(model, processor, images, [question.question for question in batch], decoding)

    with locked_folder(output_dir) as folder:
        options = {"batch_size": batch_size, "results": (ANSWERS_FILE, SKIPPED_FILE, SCORES_FILE), "desc": kind}
        responses, unreadable = respond(folder, settings, given, asked, image_folder, answer, **options)
        answered = [(record, each.text) for record, each in zip(records, responses, strict=True) if each]
        answers = [text for _, text in answered]
        skipped = [
            {"record": number, "id": question.id, "reason": unreadable[question.image]}
            for number, (question, response) in enumerate(zip(asked, responses, strict=True))
            if response is None
        ]
        scores = scorer.score(answers, *reference([record for record, _ in answered])) | {"num_skipped": len(skipped)}
        write_jsonl(folder / ANSWERS_FILE, ({"id": record["id"], "answer": text} for record, text in answered))
        write_jsonl(folder / SKIPPED_FILE, skipped)
        write_json(folder / SCORES_FILE, scores)
    return scores


def _read_questions(path: str | os.PathLike, fields: Sequence[str]) -> list[dict]:
    """The records of a question file under our names, each with all of `fields` and an id of its own."""
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: found a {type(records).__name__}, expected a JSON list of records.")
    if not records:
        raise ValueError("questions: found none, expected at least one.")
    records = [normalise_question(record, number) for number, record in enumerate(records)]
    first = {}
    for number, record in enumerate(records):
        for name in fields:
            if name not in record:
                raise ValueError(f"questions, record {number}: found no '{name}', expected {', '.join(fields)}.")
        other = first.setdefault(record["id"], number)
        if other != number:
            raise ValueError(
                f"questions, record {number}: found the id {shown(record['id'])} that record {other} has, expected "
                "one of its own."
            )
    return records
