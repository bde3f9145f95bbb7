"""The bootstrap run: annotations in, preference pairs out, resumable at any moment.

The chosen response of a pair is the annotated answer; the rejected one is the model's own answer to the same question
about the weakened picture (BPO, arXiv 2403.08730, section 3.1). The weakened picture is the only one the model sees.
"""

import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from bpo_fast.answers.generate import GenerationSettings, check_processor, generate
from bpo_fast.data.annotations import Skip, check_response, read_annotations, read_image
from bpo_fast.data.formats import preference_row
from bpo_fast.data.pairs import METADATA_FILE, PAIRS_FILE, load_preference_dataset, write_pairs
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.weaken import TARGETS, resolve_schedule, weaken
from bpo_fast.runs.files import claim_folder, write_json, write_jsonl
from bpo_fast.runs.journal import Journal

JOURNAL_FILE = "responses.jsonl"
SKIPPED_FILE = "skipped.jsonl"


def bootstrap(
    model,
    processor,
    annotations,
    image_folder,
    output_dir,
    *,
    noise_target="features",
    noise_step=500,
    schedule="sigmoid",
    seed=0,
    max_new_tokens=512,
    batch_size=8,
    do_sample=False,
    temperature=None,
    top_p=None,
    max_response_words=350,
    max_samples=None,
    adapter=None,
    model_init_kwargs=None,
):
    """Make preference pairs from annotated pictures.

    Writes into `output_dir`: `pairs.jsonl` (the pairs), `skipped.jsonl` (each row left out, with its reason),
    `metadata.json` (settings and counts) and `responses.jsonl` (every response, appended batch by batch). A run that
    was killed goes on where it stopped when it is called again with the same arguments, and ends with the same pairs.

    Args:
        model: vision-language model of transformers, or the path of one, which is then loaded only when everything
            else has been checked and there is a response left to make.
        processor: its processor; None takes the one saved with the model.
        annotations: path of a LLaVA-Instruct JSON file, or the list of its rows.
        image_folder: folder that the rows' picture paths start from.
        output_dir: folder of this run alone.
        noise_target, noise_step, schedule, seed: noise on the images, see `weaken`; `noise_step=None` leaves them as
            they are, which gives self-generated rejected responses.
        max_new_tokens, do_sample, temperature, top_p: decoding, greedy by default; sampling is seeded by `seed` and
            the batch.
        batch_size (`int`): questions a batch. Greedy responses do not depend on it, but for floating-point rounding.
        max_response_words (`int` or `None`): pairs with a longer response are skipped.
        max_samples (`int` or `None`): so many rows, drawn uniformly by `seed`; None takes all.
        adapter: path of the LoRA adapter that `model` carries, or gets where `model` is a path; kept in the settings,
            so that responses of one adapter are not taken for another's.
        model_init_kwargs (`dict` or `None`): further arguments of
            `bpo_fast.models.load.load_model` where `model` is a path.

    Returns:
        `datasets.Dataset` as `load_preference_dataset(output_dir)` gives it, with columns `images`, `prompt`,
        `chosen`, `rejected`, `id`, `rejected_type` and `rejected_truncated` (it was cut at max_new_tokens).

    Raises:
        FileNotFoundError: annotations or image folder do not exist.
        ValueError: an argument out of range, no usable row, an `output_dir` of another run, a processor that does not
            match the model, or no pair left at the end.

    Example:

        pairs = bootstrap(
            "llava-hf/llava-1.5-7b-hf", None, "llava_instruct_150k.json", "coco/train2017", "pairs", noise_step=500
        )
        pairs[0]["rejected"]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but it is {batch_size}.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1 or None, but it is {max_samples}.")
    if noise_target not in TARGETS:
        raise ValueError(f"noise_target: found {noise_target!r}, expected one of {', '.join(TARGETS)}.")
    noise = resolve_schedule(schedule)
    if noise_step is not None and not 0 <= noise_step < noise.num_steps:
        raise ValueError(f"noise_step: found {noise_step}, expected None or a step from 0 to {noise.num_steps - 1}.")
    decoding = GenerationSettings(max_new_tokens, do_sample, temperature, top_p)
    samples, skipped = read_annotations(annotations, image_folder, max_response_words=max_response_words)
    num_rows = len(samples) + len(skipped)
    if max_samples is not None and max_samples < len(samples):
        samples = random.Random(seed).sample(samples, max_samples)
    # Answers of like length share a batch, the longest first: less waiting for one long answer, and a batch too large
    # for the memory fails at once and not after hours.
    samples.sort(key=lambda sample: (-len(sample.answer), sample.row))

    settings = {
        "model": str(model) if isinstance(model, str | Path) else model.name_or_path,
        "adapter": None if adapter is None else str(adapter),
        "annotations": _fingerprint(samples),
        "noise_target": noise_target,
        "noise_step": noise_step,
        "schedule": schedule if isinstance(schedule, str) else _fingerprint(noise.alpha_bar.tolist()),
        "seed": seed,
        "max_response_words": max_response_words,
        **asdict(decoding),
    }
    output_dir = Path(output_dir)
    claim_folder(output_dir, settings, record=METADATA_FILE)

    with Journal(output_dir / JOURNAL_FILE, batch_size, len(samples)) as journal:
        if len(journal.rows) < len(samples):
            processor = processor or load_processor(settings["model"])
            if isinstance(model, str | Path):
                model = load_model(model, adapter=adapter, **(model_init_kwargs or {}))
            was_training = model.training
            model.eval()
            try:
                _respond(model, processor, samples, Path(image_folder), journal, batch_size, decoding, noise, settings)
            finally:
                model.train(was_training)
        responses = journal.rows

    pairs, dropped = _pair(
        samples, responses, "self_generated" if noise_step is None else "image_weakened", max_response_words
    )
    skipped = sorted([*skipped, *dropped], key=lambda skip: skip.row)
    counts = {
        "rows": num_rows,
        "pairs": len(pairs),
        "skipped": len(skipped),
        "rejected_truncated": sum(pair["rejected_truncated"] for pair in pairs),
    }
    write_jsonl(output_dir / SKIPPED_FILE, map(asdict, skipped))
    if not pairs:
        reason, times = Counter(skip.reason for skip in skipped).most_common(1)[0]
        raise ValueError(f"no pair is left of {num_rows} rows: {times} have {reason}, all are in {SKIPPED_FILE}.")
    write_json(
        output_dir / METADATA_FILE,
        {"settings": settings, "image_folder": str(Path(image_folder).resolve()), "counts": counts},
    )
    write_pairs(output_dir / PAIRS_FILE, pairs)
    return load_preference_dataset(output_dir)


def _fingerprint(value):
    content = json.dumps(value, default=asdict).encode()
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _respond(model, processor, samples, image_folder, journal, batch_size, decoding, noise, settings):
    """Append one line a sample to the journal, in the order of `samples`: a response, or why there is none."""
    checked = False
    done = len(journal.rows)
    with tqdm(total=len(samples), initial=done, unit="image", desc="bootstrap") as progress:
        for start in range(done, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            lines, readable, images = {}, [], []
            for sample in batch:
                try:
                    images.append(read_image(image_folder / sample.image))
                    readable.append(sample)
                except ValueError as error:
                    lines[sample.row] = {"row": sample.row, "skipped": str(error)}
            if readable and not checked:
                check_processor(model, processor, images[0])
                checked = True
            if readable:
                ids = [sample.sample_id for sample in readable]
                questions = [sample.question for sample in readable]
                with weaken(
                    model,
                    settings["noise_step"],
                    target=settings["noise_target"],
                    schedule=noise,
                    seed=settings["seed"],
                    sample_ids=ids,
                ):
                    sampling_seed = (settings["seed"] + ids[0]) % 2**63
                    responses = generate(model, processor, images, questions, decoding, seed=sampling_seed)
                for sample, response in zip(readable, responses, strict=True):
                    lines[sample.row] = {"row": sample.row, **asdict(response)}
            journal.append([lines[sample.row] for sample in batch])
            progress.update(len(batch))


def _pair(samples, responses, rejected_type, max_response_words):
    """Pairs in the order of the annotations, and the samples that give none."""
    pairs, dropped = [], []
    for sample, response in sorted(zip(samples, responses, strict=True), key=lambda both: both[0].row):
        try:
            if "skipped" in response:
                raise ValueError(response["skipped"])
            check_response(response["text"], max_response_words)
            if response["text"] == sample.answer:
                raise ValueError("a rejected response identical to the chosen one")
        except ValueError as reason:
            dropped.append(Skip(sample.row, sample.id, str(reason)))
            continue
        pairs.append(
            preference_row(
                sample.image,
                sample.question,
                sample.answer,
                response["text"],
                id=sample.id,
                rejected_type=rejected_type,
                rejected_truncated=response["truncated"],
            )
        )
    return pairs, dropped
