"""Both caches of a training, filled before its first step: see `feature_cache` and `reference_cache`."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import Trainer

from bpo_fast.models.packed_forward import image_features
from bpo_fast.runs.tensor_cache import TensorCache
from bpo_fast.train.cache_keys import cache_settings, default_cache_dir, example_keys
from bpo_fast.train.collator import PackedSequence
from bpo_fast.train.feature_cache import VisionOffDevice, feature_items, fill_features
from bpo_fast.train.kept import FeatureCache, ReferenceCache
from bpo_fast.train.reference_cache import fill_reference, reference_items
from bpo_fast.train.start_check import evaluated


def use_caches(trainer: Trainer, reference: Callable[[PackedSequence], torch.Tensor]) -> None:
    """Make what a trainer's arguments ask to keep, where it is missing, and let its training read it from then on.

    All processes of a training call it. The first of each machine compares the checksums of what is there before the
    others look; they all share what is to be made.

    Args:
        trainer: a `BPOTrainer` whose examples were checked. Its collator gets the caches, its data sets leave out the
            images whose features are kept, and its vision part leaves the device while it trains.
        reference: a packed sequence -> fp32 [N], as a step computes it.

    Raises:
        ValueError: there is no room for a cache.
        OSError: it cannot be written.
    """
    args, model, collator = trainer.args, trainer.model, trainer.data_collator
    if not (args.cache_image_features or args.precompute_ref_log_probs):
        return
    evaluated_on = trainer.eval_dataset
    evaluated_on = evaluated_on.values() if isinstance(evaluated_on, dict) else [evaluated_on]
    datasets = [trainer.train_dataset, *(dataset for dataset in evaluated_on if dataset is not None)]
    is_first = args.local_process_index == 0
    progress = is_first and not args.disable_tqdm
    how = {"report": partial(print, flush=True) if is_first else _nothing, "progress": progress}
    precision = trainer.accelerator.mixed_precision
    settings = cache_settings(model, collator.processor, precision, progress=progress)
    keys = [example_keys(dataset, collator, desc="reading pairs", progress=progress) for dataset in datasets]
    for dataset, known in zip(datasets, keys, strict=True):
        dataset.keep([each.shown for each in known])

    def features(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return image_features(model, {name: x.to(args.device) for name, x in inputs.items()})

    def loaded(name, items):
        tensors = TensorCache(args.cache_dir or default_cache_dir(), name, settings)
        with args.main_process_first(desc=f"verifying {name}"):
            tensors.load((key for each in items for key in each), verify=is_first, **how)
        return tensors

    with evaluated(model):
        if args.cache_image_features:
            items = feature_items(keys)
            tensors = loaded("image_features", items)
            fill_features(tensors, items, datasets, collator, features, **how)
            collator.features = FeatureCache(tensors)
            for dataset in datasets:
                dataset.keep(dataset.shown, without_images=True)
            trainer.remove_callback(VisionOffDevice)
            trainer.add_callback(VisionOffDevice(model))
        if args.precompute_ref_log_probs:
            items = reference_items(keys)
            tensors = loaded("reference_log_probs", items)
            fill_reference(tensors, items, datasets, collator, reference, **how)
            collator.references = ReferenceCache(tensors)


def _nothing(_: str) -> None:
    pass
