"""A model's answers to questions about pictures, in batches and resumable."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.data.annotations import read_image
from bpo_fast.runs.journal import Journal


def generate_answers(
    model,
    processor,
    questions: Sequence[Mapping],
    *,
    image_folder: str | os.PathLike,
    answers_file: str | os.PathLike,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    desc: str = "answers",
) -> list[str]:
    """Answer questions about pictures greedily.

    Args:
        model: vision-language model of transformers, with or without an adapter.
        processor: its processor.
        questions: N dicts with `id`, `image` (a path below `image_folder`) and `question`.
        image_folder: folder of the pictures.
        answers_file: JSON lines `{"id", "answer"}`, appended batch by batch; a call that was killed goes on there.
        max_new_tokens: an answer is cut there.
        batch_size: questions a batch.
        desc: label of the progress bar.

    Returns:
        N answers, in the order of the questions.

    Raises:
        ValueError: a question lacks a field, a picture cannot be read, `answers_file` holds answers to other
            questions, or the processor is not the model's.

    Example (with a LLaVA `model` and its `processor`):

        questions = [{"id": "1", "image": "1.png", "question": "What is this?"}]
        generate_answers(model, processor, questions, image_folder="images", answers_file="answers.jsonl")
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1.")
    check_questions(questions, ("id", "image", "question"))
    decoding = GenerationSettings(max_new_tokens)
    image_folder = Path(image_folder)
    was_training = model.training
    model.eval()
    try:
        with Journal(answers_file, batch_size, len(questions)) as journal:
            done = len(journal.rows)
            for row, (question, answer) in enumerate(zip(questions, journal.rows, strict=False)):
                if answer.get("id") != question["id"]:
                    raise ValueError(
                        f"answers_file: {answers_file} answers '{answer.get('id')}' in row {row}, expected "
                        f"'{question['id']}'; choose another file or delete it."
                    )
            with tqdm(total=len(questions), initial=done, unit="question", desc=desc) as progress:
                for start in range(done, len(questions), batch_size):
                    batch = questions[start : start + batch_size]
                    images = [read_image(image_folder / question["image"]) for question in batch]
                    if start == done:
                        check_processor(model, processor, images[0])
                    texts = [question["question"] for question in batch]
                    responses = generate(model, processor, images, texts, decoding)
                    journal.append(
                        [
                            {"id": question["id"], "answer": response.text}
                            for question, response in zip(batch, responses, strict=True)
                        ]
                    )
                    progress.update(len(batch))
            return [row["answer"] for row in journal.rows]
    finally:
        model.train(was_training)


def check_questions(questions: Sequence[Mapping], fields: Sequence[str]) -> None:
    """Refuse questions without the `fields` that a run reads.

    Raises:
        ValueError: there is none, or one is no dict or lacks a field.

    >>> check_questions([{"id": "1", "question": "What is this?"}], ["id", "image"])
    Traceback (most recent call last):
    ValueError: questions: row 0 has no 'image'; every row needs id, image.
    """
    if not questions:
        raise ValueError("questions: found none, expected at least one.")
    for row, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(f"questions: row {row} is a {type(question).__name__}, expected an object.")
        for field in fields:
            if field not in question:
                raise ValueError(f"questions: row {row} has no '{field}'; every row needs {', '.join(fields)}.")
