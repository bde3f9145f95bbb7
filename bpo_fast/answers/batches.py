"""Answers to questions about images, batch by batch into a journal."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from bpo_fast.answers.generate import check_processor
from bpo_fast.data.images import read_image
from bpo_fast.runs.journal import Journal


def answer_in_batches(
    model,
    processor,
    questions: Sequence[Any],
    image_paths: Sequence[str | os.PathLike],
    journal: Journal,
    answer: Callable[[Sequence[Any], list], Sequence[dict]],
    *,
    skip: Callable[[Any, ValueError], dict] | None = None,
    desc: str = "answers",
) -> None:
    """Append one record a question to `journal`, in order, from where it stopped.

    Args:
        model: in evaluation mode while it answers, and left in the mode it came in.
        processor: checked against the model on the first image that can be read.
        questions: N questions of any type.
        image_paths: the image of each.
        journal: of N records in all.
        answer: from the questions of a batch and their images to their records.
        skip: from a question and what is wrong with its image to its record; None raises the error.
        desc: label of the progress bar.
    """
    done, checked = len(journal.records), False
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(questions), initial=done, unit="question", desc=desc) as progress:
            for start in range(done, len(questions), journal.batch_size):
                numbers = range(start, min(start + journal.batch_size, len(questions)))
                images, records = {}, {}
                for number in numbers:
                    try:
                        images[number] = read_image(image_paths[number])
                    except ValueError as error:
                        if skip is None:
                            raise
                        records[number] = skip(questions[number], error)
                if images:
                    if not checked:
                        check_processor(model, processor, images[min(images)])
                        checked = True
                    answered = answer([questions[number] for number in images], list(images.values()))
                    records |= zip(images, answered, strict=True)
                journal.append([records[number] for number in numbers])
                progress.update(len(numbers))
    finally:
        model.train(was_training)
