"""An evaluation from a question file to its scores."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from bpo_fast.evaluate.answers import check_questions, generate_answers
from bpo_fast.evaluate.chair import ObjectMatcher, score_chair
from bpo_fast.evaluate.pope import score_pope
from bpo_fast.runs.files import claim_folder, read_json, write_json

KINDS = {"chair": "objects", "pope": "label"}  # the field of a question that holds the truth
ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.json"


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
        questions: JSON list of `{id, image, question}` with `objects` (list of names, for "chair") or `label` ("yes" |
            "no", for "pope"); other fields are left alone.
        image_folder: folder that the `image` paths start from.
        output_dir: folder of this evaluation alone.
        kind: "chair" (hallucinated objects in descriptions) or "pope" (yes/no questions).
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
    if kind not in KINDS:
        raise ValueError(f"kind: found '{kind}', expected one of {', '.join(KINDS)}.")
    if (synonyms is None) == (kind == "chair"):
        raise ValueError(
            "synonyms: kind 'chair' needs a synonym table; give one." if kind == "chair"
            else "synonyms: only kind 'chair' reads a synonym table; leave it out."
        )  # fmt: skip
    if not Path(image_folder).is_dir():
        raise FileNotFoundError(f"image_folder: '{image_folder}' is not a folder.")
    rows = read_json(questions)
    if not isinstance(rows, list):
        raise ValueError(f"questions: {questions} holds a {type(rows).__name__}, expected a JSON list.")
    truth = KINDS[kind]
    check_questions(rows, ("id", "image", "question", truth))
    if kind == "chair":
        synonyms = dict(synonyms) if isinstance(synonyms, Mapping) else read_json(synonyms)
        ObjectMatcher(synonyms)  # a faulty table is refused before hours of generation
    content = json.dumps([rows, synonyms], sort_keys=True).encode()
    settings = {
        "kind": kind,
        "model": model.name_or_path,
        "adapter": None if adapter is None else str(adapter),
        "questions": "sha256:" + hashlib.sha256(content).hexdigest(),
        "max_new_tokens": max_new_tokens,
    }
    output_dir = Path(output_dir)
    claim_folder(output_dir, settings)
    answers = generate_answers(
        model,
        processor,
        rows,
        image_folder=image_folder,
        answers_file=output_dir / ANSWERS_FILE,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        desc=kind,
    )
    truths = [row[truth] for row in rows]
    scores = score_chair(answers, truths, synonyms) if kind == "chair" else score_pope(answers, truths)
    write_json(output_dir / SCORES_FILE, scores)
    return scores
