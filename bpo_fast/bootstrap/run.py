"""The bootstrap run: annotations in, preference pairs out, resumable at any moment, by as many processes as like.

The chosen response of a pair is the annotated answer; the rejected one is made by a kind of `bootstrap/kinds.py`, by
default the model's own answer to the same question about the weakened image (BPO, arXiv 2403.08730, section 3.1).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset

from bpo_fast.answers.given import GivenModel
from bpo_fast.answers.sampling import GenerationSettings, check_count
from bpo_fast.bootstrap.cluster import make_on_cluster
from bpo_fast.bootstrap.filters import FilterOptions
from bpo_fast.bootstrap.finish import finish
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.job import Job
from bpo_fast.bootstrap.kinds import KINDS
from bpo_fast.bootstrap.maker import Maker, check_seed
from bpo_fast.bootstrap.preview import check_disk, disk_forecast, first_requests
from bpo_fast.bootstrap.progress import Progress
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.work import Worker
from bpo_fast.data.mixture import read_sources
from bpo_fast.data.pairs import MANIFEST_FILE, load_preference_dataset
from bpo_fast.data.sources import Source
from bpo_fast.ops.noise.schedule import NoiseSchedule
from bpo_fast.runs.folder import shared_folder
from bpo_fast.runs.tensor_cache import size


def bootstrap(
    model,
    processor,
    annotations: str | os.PathLike | list | None,
    image_folder: str | os.PathLike | None,
    output_dir: str | os.PathLike,
    *,
    noise_target: str = "features",
    noise_step: int | Sequence[int] | None = 500,
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
    sources: Sequence[Source] | None = None,
    kinds: Sequence[Maker] | None = None,
    filters: FilterOptions | None = None,
    score_pairs: bool = False,
    embed_images: bool = False,
    rows_per_part: int = 1024,
    num_shards: int | None = None,
    shard_index: int | None = None,
    ray: str | None = None,
    ray_workers: int | None = None,
    dry_run: bool = False,
) -> Dataset | None:
    """Make preference pairs from annotated images.

    Writes into `output_dir`: `data/*.parquet` (the pairs), `README.md` (the data set's card: `datasets.load_dataset`
    reads the folder), `manifest.json` (checksums, counts, settings; the last file), `skipped.jsonl` (each record and
    response left out, with its reason), `metadata.json` (the settings that claim the folder) and `parts/` (every
    response, appended batch by batch). A run that was killed goes on where it stopped when it is called again with the
    same arguments, and ends with the same bytes. A response is known by its record's id, image and question: added or
    mended records, a larger `max_samples` and a further kind cost only what is new, `max_response_words` costs
    nothing. Whatever else changes a response is another run.

    Processes that are given the same arguments and the same `output_dir` share the work, on one machine or on many
    with a common file system: each takes the next part that nobody has, and all return when the last part is done.

    Args:
        model: vision-language model of transformers, or the path of one, which is then loaded only when everything
            else has been checked and there is a response left to make.
        processor: its processor; None takes the one saved with the model.
        annotations: path of a file of annotations, see `bpo_fast.data.annotations`, or the list of its records.
        image_folder: folder that the records' image paths start from.
        output_dir: folder of this run.
        noise_target, noise_step, schedule, seed: noise on the images, see `weaken`; `noise_step=None` leaves them as
            they are, which gives self-generated rejected responses; several steps give each record several pairs.
        max_new_tokens, do_sample, temperature, top_p: decoding, greedy by default; sampling is seeded by `seed` and
            the record.
        batch_size: questions a batch. Responses do not depend on it, but for floating-point rounding.
        max_response_words: pairs with a longer response are skipped; None keeps all.
        max_samples: number of annotations, drawn uniformly by `seed`, a larger number the smaller one's and more; None
            takes all.
        adapter: path of the LoRA adapter that `model` carries, or gets where `model` is a path. The weights of model
            and adapter are kept in the settings, so that responses of one are not taken for another's.
        model_init_kwargs: further arguments of `bpo_fast.models.load.load_model` where `model` is a path.
        sources: several annotated data sets, in place of `annotations` and `image_folder`, which are None then.
        kinds: of negatives, each with its options, in place of the one that the noise and decoding describe.
        filters: further reasons to leave a pair out, see `bpo_fast.bootstrap.filters`; None takes the default ones.
        score_pairs: write the model's log-probs of chosen and rejected responses, and ask the filter of their gap.
        embed_images: put the images' files into the shards, in place of their paths.
        rows_per_part: annotations that one process takes at a time, and that one shard holds.
        num_shards, shard_index: work on every `num_shards`-th part only, from number `shard_index` on, and do not
            wait for the others.
        ray: make the parts on the Ray cluster of this address, see `bpo_fast.bootstrap.cluster`.
        ray_workers: processes of that; None takes one a GPU, or one a CPU where there is no GPU.
        dry_run: print the first prompts and images of each kind and how much disk the run will take; weights are not
            read, and nothing is written.

    Returns:
        The pairs as `load_preference_dataset(output_dir)` gives them, with the columns of
        `bpo_fast.data.parquet.FEATURES`; None for a dry run, or where another shard has parts left.

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
    check_count("rows_per_part", rows_per_part)
    if max_samples is not None:
        check_count("max_samples", max_samples, "at least 1 or None")
    check_seed(seed)
    if kinds is None:
        decoding = GenerationSettings(max_new_tokens, do_sample, temperature, top_p)
        if noise_step is None:
            kinds = [SelfGenerated(seed, decoding)]
        else:
            kinds = [ImageWeakened(noise_target, noise_step, schedule, seed, decoding)]
    if filters and filters.min_logp_gap is not None and not score_pairs:
        raise ValueError("min_logp_gap: found it without score_pairs, expected both; set score_pairs.")
    filters = replace(filters or FilterOptions(), max_response_words=max_response_words)
    if sources is None:
        sources = [Source(name="", annotations=annotations, image_folder=image_folder)]
    elif annotations is not None or image_folder is not None:
        raise ValueError(
            "sources: found some beside annotations or image_folder, expected one of both; leave one out."
        )
    selection = read_sources(
        sources, seed=seed, max_samples=max_samples, max_response_words=filters.max_response_words
    )
    job = Job(
        folder=Path(output_dir),
        samples=selection.samples,
        makers=_in_order(kinds),
        given=GivenModel(model, processor, adapter, own_device(model_init_kwargs or {})),
        batch_size=batch_size,
        rows_per_part=rows_per_part,
        filters=filters,
        embed_images=embed_images,
        score_pairs=score_pairs,
        selection={"max_samples": max_samples, "seed": seed},
    )
    parts = job.parts
    if num_shards is not None:
        if shard_index is None or not 0 <= shard_index < num_shards:
            raise ValueError(f"shard_index: found {shard_index}, expected a number from 0 to {num_shards - 1}.")
        parts = parts[shard_index::num_shards]
    if job.needs_model:
        job.given.check()
    if dry_run:
        print(first_requests(job), f"disk: {size(disk_forecast(job))} in {job.folder}", sep="\n")
        return None
    with shared_folder(output_dir, job.purpose):
        job.check()
        print(f"{job.folder}: about {size(check_disk(job))} for {len(job.samples):,} records.", file=sys.stderr)
        was_whole = (job.folder / MANIFEST_FILE).exists()
        with Progress(len(job.samples) * len(job.makers)) as progress, Worker(job, progress) as worker:
            if ray is None:
                worker.make_all(parts)
            else:
                missing = [part for part in parts if not worker.is_done(part)]
                progress.known(sum(part.size for part in parts if part not in missing) * len(job.makers))
                make_on_cluster(job, missing, progress, ray, ray_workers)
            if not all(map(worker.is_done, job.parts)):
                return None
        was_whole = was_whole and (job.folder / MANIFEST_FILE).exists()
        manifest = finish(job, selection)
        if was_whole:
            print(
                f"{job.folder}: finished already, its {manifest['counts']['pairs']:,} pairs are there.",
                file=sys.stderr,
            )
        return load_preference_dataset(output_dir)


def _in_order(kinds: Sequence[Maker]) -> list[Maker]:
    """The kinds in the order of their table, which is that of a sample's pairs."""
    order = list(KINDS)
    names = [maker.kind for maker in kinds]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"kinds: found {names}, expected one of {', '.join(order)} or more, each once.")
    return sorted(kinds, key=lambda maker: order.index(maker.kind))


def own_device(options: dict) -> dict:
    """The options of `load_model` with the GPU that is this process's where a launcher has started several."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or "device" in options or not torch.cuda.is_available():
        return options
    return {**options, "device": f"cuda:{int(rank) % torch.cuda.device_count()}"}
