"""Responses to questions about images, batch by batch into the journal of a run's folder."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from bpo_fast.answers.generate import Response, check_processor
from bpo_fast.answers.given import GivenModel
from bpo_fast.answers.images import unreadable_images
from bpo_fast.data.images import image_path, read_image
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import claim_folder, holds_run
from bpo_fast.runs.journal import Journal

RESPONSES_FILE = "responses.jsonl"


class Question(Protocol):
    """What is asked: an id of any of JSON's types, the name of an image below the image folder, and a text."""

    id: Any
    image: str
    question: str


# From a model and its processor, the questions of a batch and their images, to the responses.
Answer = Callable[[Any, Any, Sequence[Question], Sequence[Image.Image]], Sequence[Response]]


def question_key(question: Question, image_folder: str | os.PathLike) -> str:
    """What a response is known by: its question's id, text and image, and the size of the image's file.

    Whatever else changes in a file of questions leaves the response as it is. An image is known by name and size,
    since the files of a large data set are not read again each time.
    """
    try:
        size = os.stat(Path(image_folder, question.image)).st_size
    except (OSError, ValueError):
        size = None
    return fingerprint([question.id, question.image, question.question, size])


def respond(
    folder: Path,
    settings: Mapping[str, Any],
    given: GivenModel,
    questions: Sequence[Question],
    image_folder: str | os.PathLike,
    answer: Answer,
    *,
    batch_size: int,
    results: Sequence[str],
    desc: str,
) -> tuple[list[Response | None], dict[str, str]]:
    """A response to each question: those that `folder` holds, and those that the model gives now.

    Only what is missing is generated, in the order of `questions`, each batch appended to `RESPONSES_FILE`. The
    images of what is missing are decoded before the model is loaded; the folder is claimed once model and processor
    have been tried. Records of questions that are asked no more stay in the journal for when they come back.

    Args:
        folder: of the run, locked.
        settings: what else than the model decides a response, see `holds_run`.
        given: the model; loaded only if a response is missing, and left in the mode it came in.
        questions: N questions; those of one key are asked once.
        image_folder: folder that their images are in.
        answer: gives a batch its responses.
        batch_size: questions a batch.
        results: names of the files that are made of the responses; where a response is missing they are of another
            set of questions, and removed until they are made again.
        desc: label of the progress bar.

    Returns:
        N responses, None where the image cannot be read, and for the names of these images what is wrong.

    Raises:
        ValueError: the folder holds another run or a damaged journal, no image can be read, or the processor is not
            the model's.
    """
    given.check()
    holds_run(folder, {**given.settings(), **settings})
    keys = [question_key(question, image_folder) for question in questions]
    with Journal(folder / RESPONSES_FILE, {"text": str, "truncated": bool}) as journal:
        missing = {key: each for key, each in zip(keys, questions, strict=True) if key not in journal.records}
        unreadable = unreadable_images(image_folder, [question.image for question in missing.values()])
        missing = {key: question for key, question in missing.items() if question.image not in unreadable}
        done = len(set(keys) & journal.records.keys())
        if missing:
            model, processor = given.load()
            with _evaluating(model):
                first = next(iter(missing.values()))
                check_processor(model, processor, read_image(image_path(image_folder, first.image)))
                # Once more: only a model that has been downloaded says which one it is.
                claim_folder(folder, {**given.settings(), **settings})
                for name in results:
                    (folder / name).unlink(missing_ok=True)
                with tqdm(total=done + len(missing), initial=done, unit="question", desc=desc) as progress:
                    items = list(missing.items())
                    for start in range(0, len(items), batch_size):
                        batch = items[start : start + batch_size]
                        _append(journal, batch, partial(answer, model, processor), image_folder)
                        progress.update(len(batch))
        elif not done:
            reason = next(iter(unreadable.values())).rstrip(".")
            raise ValueError(
                f"image_folder: found no image that can be read among {len(unreadable)} ({reason}), expected at least "
                "one."
            )
        elif all((folder / name).exists() for name in results):
            print(f"{folder}: finished already, its {done:,} responses are there.", file=sys.stderr)
        responses = [journal.records.get(key) for key in keys]
    return [each and Response(each["text"], each["truncated"]) for each in responses], unreadable


def _append(journal, batch, answer, image_folder):
    questions = [question for _, question in batch]
    images = [read_image(image_path(image_folder, question.image)) for question in questions]
    answered = zip(batch, answer(questions, images), strict=True)
    journal.append([{"key": key, "id": question.id, **asdict(response)} for (key, question), response in answered])


@contextmanager
def _evaluating(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
