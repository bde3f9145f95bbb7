"""The bootstrap run: annotations in, preference pairs out, resumable at any moment.

The chosen response of a pair is the annotated answer; the rejected one is the model's own answer to the same question
about the weakened image (BPO, arXiv 2403.08730, section 3.1). The weakened image is the only one the model sees.
"""

import hashlib
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

from bpo_fast.answers.batches import respond
from bpo_fast.answers.generate import generate
from bpo_fast.answers.given import GivenModel
from bpo_fast.answers.sampling import GenerationSettings, check_count
from bpo_fast.data.annotations import Skip, read_annotations
from bpo_fast.data.formats import preference_row
from bpo_fast.data.pairs import METADATA_FILE, PAIRS_FILE, load_preference_dataset, write_pairs
from bpo_fast.data.responses import check_response
from bpo_fast.models.weaken import TARGETS, resolve_schedule, weaken
from bpo_fast.ops.noise.schedule import NoiseSchedule
from bpo_fast.runs.files import read_json, write_json, write_jsonl
from bpo_fast.runs.fingerprint import fingerprint
from bpo_fast.runs.folder import locked_folder

SKIPPED_FILE = "skipped.jsonl"


def bootstrap(
    model,
    processor,
    annotations: str | os.PathLike | list,
    image_folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    noise_target: str = "features",
    noise_step: int | None = 500,
    schedule: str | NoiseSchedule = "sigmoid",
    seed: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    do_sample: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_response_words: int | None = 350,
    max_samples: int | None = None,
    adapter: str | os.PathLike | None = None,
    model_init_kwargs: dict | None = None,
) -> Dataset:
    """Make preference pairs from annotated images.

    Writes into `output_dir`: `pairs.jsonl` (the pairs), `skipped.jsonl` (each record left out, with its reason),
    `metadata.json` (settings and counts) and `responses.jsonl` (every response, appended batch by batch). A run that
    was killed goes on where it stopped when it is called again with the same arguments, and ends with the same pairs.
    A response is known by its record's id, image and question: added or mended records and a larger `max_samples` cost
    only what is new, `max_response_words` costs nothing. Whatever else changes a response is another run.

    Args:
        model: vision-language model of transformers, or the path of one, which is then loaded only when everything
            else has been checked, images included, and there is a response left to make.
        processor: its processor; None takes the one saved with the model.
        annotations: path of a file of annotations, see `bpo_fast.data.annotations`, or the list of its records.
        image_folder: folder that the records' image paths start from.
        output_dir: folder of this run alone.
        noise_target, noise_step, schedule, seed: noise on the images, see `weaken`; `noise_step=None` leaves them as
            they are, which gives self-generated rejected responses.
        max_new_tokens, do_sample, temperature, top_p: decoding, greedy by default; sampling is seeded by `seed` and
            the record.
        batch_size: questions a batch. Responses do not depend on it, but for floating-point rounding.
        max_response_words: pairs with a longer response are skipped; None keeps all.
        max_samples: number of annotations, drawn uniformly by `seed`, a larger number the smaller one's and more; None
            takes all.
        adapter: path of the LoRA adapter that `model` carries, or gets where `model` is a path. The weights of model
            and adapter are kept in the settings, so that responses of one are not taken for another's.
        model_init_kwargs: further arguments of `bpo_fast.models.load.load_model` where `model` is a path.

    Returns:
        The pairs as `load_preference_dataset(output_dir)` gives them, with columns `images`, `prompt`, `chosen`,
        `rejected`, `id`, `rejected_type` and `rejected_truncated` (it was cut at max_new_tokens).

    Raises:
        FileNotFoundError: annotations or image folder do not exist.
        ValueError: an argument out of range, no usable record, an `output_dir` of another run, a damaged file in it, a
            processor that does not match the model, or no pair left at the end.
        OSError: `output_dir` cannot be written.

    Example:

        pairs = bootstrap(
            "llava-hf/llava-1.5-7b-hf", None, "llava_instruct_150k.json", "coco/train2017", "pairs", noise_step=500
        )
        pairs[0]["rejected"]
    """
    check_count("batch_size", batch_size)
    if max_samples is not None:
        check_count("max_samples", max_samples, "at least 1 or None")
    if noise_target not in TARGETS:
        raise ValueError(f"noise_target: found {noise_target!r}, expected one of {', '.join(TARGETS)}.")
    noise_schedule = resolve_schedule(schedule)
    last_step = noise_schedule.num_steps - 1
    if noise_step is not None and not 0 <= noise_step <= last_step:
        raise ValueError(f"noise_step: found {noise_step}, expected None or a step from 0 to {last_step}.")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: found {seed!r}, expected a whole number from -2**63 to 2**63 - 1.")
    decoding = GenerationSettings(max_new_tokens, do_sample, temperature, top_p)
    samples, skipped = read_annotations(annotations, image_folder, max_response_words=max_response_words)
    num_records = len(samples) + len(skipped)
    samples.sort(key=lambda sample: (_draw(seed, sample), sample.record))
    samples = samples[:max_samples]
    # Answers of like length share a batch, the longest first: less waiting for one long answer, and a batch too large
    # for the memory fails at once and not after hours.
    samples.sort(key=lambda sample: (-len(sample.answer), sample.record))

    given = GivenModel(model, processor, adapter, model_init_kwargs or {})
    settings = {
        "noise_target": noise_target,
        "noise_step": noise_step,
        "schedule": schedule if isinstance(schedule, str) else fingerprint(noise_schedule.alpha_bar.tolist()),
        "seed": seed,
        **asdict(decoding),
    }
    noise = {"step": noise_step, "target": noise_target, "schedule": noise_schedule, "seed": seed}

    def answer(model, processor, batch, images):
        ids = [sample.sample_id for sample in batch]
        texts = [sample.question for sample in batch]
        with weaken(model, sample_ids=ids, **noise):
            return generate(model, processor, images, texts, decoding, seeds=[_draw(seed, each) for each in batch])

    with locked_folder(output_dir) as folder:
        options = {"batch_size": batch_size, "results": (PAIRS_FILE, SKIPPED_FILE), "desc": "bootstrap"}
        responses, unreadable = respond(folder, settings, given, samples, image_folder, answer, **options)
        rejected_type = "self_generated" if noise_step is None else "image_weakened"
        pairs, dropped = _pair(samples, responses, unreadable, rejected_type, max_response_words)
        skipped = sorted([*skipped, *dropped], key=lambda skip: skip.record)
        write_jsonl(folder / SKIPPED_FILE, map(asdict, skipped))
        if not pairs:
            (folder / PAIRS_FILE).unlink(missing_ok=True)
            reason, times = Counter(skip.reason for skip in skipped).most_common(1)[0]
            raise ValueError(
                f"annotations: found no pair in {num_records} records ({times} with {reason}), expected at least one; "
                f"see {folder / SKIPPED_FILE}."
            )
        counts = {
            "records": num_records,
            "pairs": len(pairs),
            "skipped": len(skipped),
            "rejected_truncated": sum(pair["rejected_truncated"] for pair in pairs),
        }
        selection = {"max_response_words": max_response_words, "max_samples": max_samples}
        metadata = {
            "settings": read_json(folder / METADATA_FILE)["settings"],
            "annotations": fingerprint(samples),
            **selection,
        }
        metadata |= {"image_folder": str(Path(image_folder).resolve()), "counts": counts}
        write_json(folder / METADATA_FILE, metadata)
        write_pairs(folder / PAIRS_FILE, pairs)
        return load_preference_dataset(folder)


def _draw(seed, sample):
    """A number of each sample and seed: the n lowest are a uniform draw, whatever other samples there are."""
    digest = hashlib.blake2b(f"{seed} {sample.sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _pair(samples, responses, unreadable, rejected_type, max_response_words):
    """Pairs in the order of the annotations, and the samples that give none."""
    pairs, dropped = [], []
    for sample, response in sorted(zip(samples, responses, strict=True), key=lambda both: both[0].record):
        try:
            if response is None:
                raise ValueError(unreadable[sample.image])
            check_response(response.text, max_response_words)
            if response.text == sample.answer:
                raise ValueError("a rejected response identical to the chosen one")
        except ValueError as reason:
            dropped.append(Skip(sample.record, sample.id, str(reason)))
            continue
        texts = sample.question, sample.answer, response.text
        extra = {"id": sample.id, "rejected_type": rejected_type, "rejected_truncated": response.truncated}
        pairs.append(preference_row(sample.image, *texts, **extra))
    return pairs, dropped
