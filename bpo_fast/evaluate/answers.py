"""A model's answers to the questions of an evaluation, in batches and resumable."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """Answer questions about images greedily.

    Args:
        model: vision-language model of transformers, with or without an adapter.
        processor: its processor.
        questions: N dicts with `id`, `image` (a path below `image_folder`) and `question`.
        image_folder: folder of the images.
        answers_file: JSON lines `{"id", "answer"}`, appended batch by batch; a call that was killed goes on there.
        max_new_tokens: an answer is cut there.
        batch_size: questions a batch.
        desc: label of the progress bar.

    Returns:
        N answers, in the order of the questions.

    Raises:
        ValueError: a question lacks a field, an image cannot be read, `answers_file` holds answers to other questions,
            or the processor is not the model's.

    Example (with a LLaVA `model` and its `processor`):

        questions = [{"id": "1", "image": "1.png", "question": "What is this?"}]
        generate_answers(model, processor, questions, image_folder="images", answers_file="answers.jsonl")
    """
    # Imported on use: whoever only looks a scorer up need not wait for torch and PEFT.
    from bpo_fast.answers.batches import answer_in_batches
    from bpo_fast.answers.generate import GenerationSettings, generate

    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1.")
    check_questions(questions, ("id", "image", "question"))
    decoding = GenerationSettings(max_new_tokens)

    def answer(batch, images):
        texts = [question["question"] for question in batch]
        responses = generate(model, processor, images, texts, decoding)
        return [{"id": question["id"], "answer": each.text} for question, each in zip(batch, responses, strict=True)]

    with Journal(answers_file, batch_size, len(questions)) as journal:
        for number, (question, record) in enumerate(zip(questions, journal.records, strict=False)):
            if record.get("id") != question["id"]:
                raise ValueError(
                    f"{answers_file}, record {number}: found the answer to '{record.get('id')}', expected that to "
                    f"'{question['id']}'; choose another file or delete it."
                )
        paths = [Path(image_folder, question["image"]) for question in questions]
        answer_in_batches(model, processor, questions, paths, journal, answer, desc=desc)
        return [record["answer"] for record in journal.records]


def check_questions(questions: Sequence[Mapping], fields: Sequence[str]) -> None:
    """Refuse questions without the `fields` that a run reads.

    Raises:
        ValueError: there is none, or one is not a dict or lacks a field.

    >>> check_questions([{"id": "1", "question": "What is this?"}], ["id", "image"])
    Traceback (most recent call last):
    ValueError: questions, record 0: found no 'image', expected id, image.
    """
    if not questions:
        raise ValueError("questions: found none, expected at least one.")
    for number, question in enumerate(questions):
        if not isinstance(question, Mapping):
            raise ValueError(f"questions, record {number}: found a {type(question).__name__}, expected an object.")
        for field in fields:
            if field not in question:
                raise ValueError(f"questions, record {number}: found no '{field}', expected {', '.join(fields)}.")
