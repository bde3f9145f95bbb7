"""The whole method on the miniature world: world, pairs, training, evaluation, report.

    bpo-fast demo --output_dir bpo_output/demo --seeds 0

A stage's last file appears complete and at once. A run that was killed resumes at the stage it was in: bootstrap and
evaluations at their last batch, a training, which takes a minute, at its start.
"""

import itertools
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from peft import LoraConfig

from bpo_fast.answers.generate import GenerationSettings
from bpo_fast.bootstrap import bootstrap
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.data.pairs import MANIFEST_FILE, load_preference_dataset
from bpo_fast.demo import negatives, world, wrong_answers
from bpo_fast.demo.grade import grade_descriptions
from bpo_fast.demo.negatives import MAX_NEW_TOKENS
from bpo_fast.demo.probes import LogpsProbe, likelihood_by_step
from bpo_fast.demo.report import METHODS, RATES, REPORT_FILE, read_answers, summary, text_table, write_report
from bpo_fast.demo.tiny_llava import CHECKPOINT
from bpo_fast.evaluate import evaluate
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.models.weights import weights_fingerprint
from bpo_fast.runs.files import read_json, write_json
from bpo_fast.runs.folder import claim_folder
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.trainer import BPOTrainer

CHOSEN_ON_SEEDS = (1, 2, 3)  # the runs that the default settings were chosen on; judged on others
# What is trained -> the kind of the pairs that it is trained on; all on the same samples.
TRAINED = {"bpo": ImageWeakened.kind, "injected": ErrorInjected.kind, "sft": ImageWeakened.kind}
MAX_SEED = 2**32  # exclusive: numpy's generators take 32 bits
NOISE_STEPS = (100, 300, 500, 700, 900)  # those whose hallucination is counted
NUM_EXAMPLES = 4  # samples of pairs in the report
LIKELIHOOD_STEPS = (None, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)


@dataclass(frozen=True)
class DemoSettings:
    """What decides the demo's figures.

    All trainings share samples, order, steps, learning rate and adapter. SFT differs by its loss, BPO on injected
    errors by its rejected answers. BPO's loss is the preference term with label smoothing, and SFT's own loss beside
    it: without these two it breaks sentences, since a rejected answer shares most of its words with the chosen one.
    The defaults were chosen on `CHOSEN_ON_SEEDS`.
    """

    num_annotations: int = 1500
    # Annotated images are all typical, as what the model was pretrained on: answers that SFT can imitate without
    # looking. Held-out images are all exceptions.
    annotation_bias: float = 1.0
    num_heldout: int = 200
    noise_step: int = 900
    num_probe_pairs: int = 48
    train_steps: int = 100
    batch_size: int = 8
    learning_rate: float = 3e-4
    beta: float = 0.15
    bpo_loss: tuple[str, ...] = ("sigmoid", "sft")
    bpo_loss_weights: tuple[float, ...] = (1.0, 30.0)
    bpo_label_smoothing: float = 0.3
    lora_r: int = 32
    lora_alpha: int = 64
    num_noise_scenes: int = 64


def run(
    output_dir: str | os.PathLike,
    *,
    seeds: Sequence[int] = (0,),
    settings: DemoSettings | None = None,
    model_path: str | os.PathLike = CHECKPOINT,
) -> dict:
    """Run all stages for each seed and write `results.json` and `report.html`; a finished run is left as it is.

    Without matplotlib the report has tables for charts.

    Args:
        output_dir: folder of this run alone; a killed run in it resumes.
        seeds: one run each. A seed sets the images, the noise, the order of training and the adapter's first
            weights; the model that it starts from is the same.
        settings: sizes and hyper-parameters.
        model_path: the tiny LLaVA.

    Returns:
        What `results.json` holds: `mean` and `seeds`, each with the scores of "base", "sft", "injected" and "bpo".

    Raises:
        ValueError: no seed, one twice or out of range, nothing that loads at `model_path`, or `output_dir` holds
            another run.
    """
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < MAX_SEED for seed in seeds):
        raise ValueError(f"seeds: found {list(seeds)}, expected one or more, each once and from 0 to {MAX_SEED - 1}.")
    settings = settings or DemoSettings()
    output_dir = Path(output_dir)
    results_file, report = output_dir / "results.json", output_dir / REPORT_FILE
    load_processor(model_path)  # what does not load claims no folder
    load_model(model_path, dtype=torch.float32, device="cpu")
    claim_folder(output_dir, {"seeds": list(seeds), "model": weights_fingerprint(model_path), **asdict(settings)})
    if results_file.exists() and report.exists():
        print(f"{output_dir}: this run is finished; another output_dir starts another.")
        return read_json(results_file)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tiny model's products are too small for two threads
    try:
        runs = [_run_seed(output_dir / f"seed-{seed}", seed, settings, model_path) for seed in seeds]
    finally:
        torch.set_num_threads(num_threads)
    results = {
        "settings": asdict(settings),
        "settings_chosen_on_seeds": list(CHOSEN_ON_SEEDS) if settings == DemoSettings() else None,
        "seeds": runs,
        "mean": _mean([run["scores"] for run in runs]),
        "negatives": negatives.mean_of_runs([run["negatives"] for run in runs]),
    }
    write_json(results_file, results)
    results = read_json(results_file)
    write_report(output_dir, results)
    print("\n".join([*summary(results), *text_table(results)]))
    return results


def _run_seed(folder, seed, settings, model_path):
    folder.mkdir(exist_ok=True)
    processor = load_processor(model_path)
    print(f"seed {seed}, 1/4: images of a miniature world")
    annotations, heldout = _make_world(folder, seed, settings)
    print(f"seed {seed}, 2/4: preference pairs from weakened images and injected errors")
    pairs = _bootstrap(folder / "pairs", annotations, seed, settings, model_path, processor)
    print(f"seed {seed}, 3/4: training")
    pairs_of = negatives.of_same_samples(pairs)
    for method, kind in TRAINED.items():
        _train(folder / method, method, pairs_of[kind], seed, settings, model_path, processor)
    print(f"seed {seed}, 4/4: evaluation on {settings.num_heldout} held-out images")
    scores = {method: _evaluate(folder, method, heldout, model_path, processor) for method in METHODS}
    made = _negatives(folder / "negatives.json", pairs, seed, settings, model_path, processor)
    likelihood = _likelihood(folder / "likelihood.json", seed, settings, model_path, processor)
    logps = {method: read_json(folder / method / "logps.json") for method in TRAINED}
    return {"seed": seed, "scores": scores, "logps": logps, "likelihood": likelihood, "negatives": made}


def _make_world(folder, seed, settings):
    annotations, heldout = folder / "annotated" / "instruct.json", folder / "heldout"
    if not annotations.exists():
        bias = settings.annotation_bias
        world.write_instruct(annotations.parent, settings.num_annotations, bias=bias, seed=10 * seed + 1)
    questions = heldout / "descriptions.json", heldout / "yes_no.json"
    if not questions[-1].exists():
        world.write_heldout(heldout, settings.num_heldout, bias=0.0, seed=10 * seed + 2)
    return annotations, questions


def _bootstrap(folder, annotations, seed, settings, model_path, processor):
    if (folder / MANIFEST_FILE).exists():
        return load_preference_dataset(folder)
    decoding = GenerationSettings(MAX_NEW_TOKENS)
    return bootstrap(
        load_model(model_path, dtype=torch.float32, device="cpu"),
        processor,
        annotations,
        annotations.parent / "images",
        folder,
        kinds=[
            ImageWeakened(steps=settings.noise_step, seed=seed, decoding=decoding),
            ErrorInjected(template=str(wrong_answers.TEMPLATE), seed=seed, decoding=decoding),
        ],
        batch_size=64,
    )


def _train(folder, method, pairs, seed, settings, model_path, processor):
    if (folder / "logps.json").exists():
        return
    probe_pairs = pairs.select(range(len(pairs) - settings.num_probe_pairs, len(pairs)))
    probe = LogpsProbe(processor, probe_pairs, interval=max(settings.train_steps // 10, 1))
    trainer = BPOTrainer(
        model=load_model(model_path, dtype=torch.float32, device="cpu"),
        args=BPOConfig(
            output_dir=str(folder),
            loss_type=list(settings.bpo_loss) if method != "sft" else "sft",
            loss_weights=list(settings.bpo_loss_weights) if method != "sft" else None,
            label_smoothing=settings.bpo_label_smoothing if method != "sft" else 0.0,
            beta=settings.beta,
            max_steps=settings.train_steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=seed,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=pairs.select(range(len(pairs) - settings.num_probe_pairs)),
        processing_class=processor,
        callbacks=[probe],
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    write_json(folder / "logps.json", probe.history)


def _evaluate(folder, method, questions, model_path, processor):
    adapter = None if method == "base" else folder / method
    model = load_model(model_path, dtype=torch.float32, device="cpu", adapter=adapter)
    options = {"adapter": adapter, "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 64}
    scores = {}
    for kind, file, synonyms in zip(("chair", "pope"), questions, (world.synonym_table(), None), strict=True):
        output_dir = folder / "scores" / f"{method}-{kind}"
        images = file.parent / "images"
        scores[kind] = evaluate(model, processor, file, images, output_dir, kind=kind, synonyms=synonyms, **options)
    records = read_json(questions[0])
    answers = read_answers(folder, method)
    scenes = [world.read_scene(record) for record in records]
    return scores | {"description": grade_descriptions([answers[record["id"]] for record in records], scenes)}


def _negatives(path, pairs, seed, settings, model_path, processor):
    if not path.exists():
        texts = negatives.read_texts(pairs)
        injected = (
            (text["error"], text["chosen"], text["rejected"]) for text in texts if text["kind"] == ErrorInjected.kind
        )
        model = load_model(model_path, dtype=torch.float32, device="cpu")
        scenes = _exceptions(seed, settings)
        figures = {
            "pairs": Counter(text["kind"] for text in texts),
            "errors": negatives.injected_errors(injected),
            "noise": negatives.hallucination_by_step(model, processor, scenes, NOISE_STEPS, seed=seed),
            "examples": negatives.first_of_both(texts, NUM_EXAMPLES),
        }
        write_json(path, figures)
    return read_json(path)


def _likelihood(path, seed, settings, model_path, processor):
    if not path.exists():
        model = load_model(model_path, dtype=torch.float32, device="cpu")
        enable_packed_forward(model)
        scenes = _exceptions(seed, settings)
        write_json(path, likelihood_by_step(model, processor, scenes, LIKELIHOOD_STEPS, seed=seed))
    return read_json(path)


def _exceptions(seed, settings):
    """Scenes that are not typical, on which the effect of noise is measured."""
    rng = random.Random(10 * seed + 3)
    return [world.sample_scene(rng, bias=0.0) for _ in range(settings.num_noise_scenes)]


def _mean(scores):
    """Mean over seeds of each rate; `scores` as `_run_seed` gives them."""
    means = {method: {kind: {} for kind in ("chair", "pope", "description")} for method in METHODS}
    for method, (_, kind, rate) in itertools.product(METHODS, RATES):
        means[method][kind][rate] = fmean(score[method][kind][rate] for score in scores)
    return means
