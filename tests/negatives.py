"""Every kind of negative on the miniature world: what its answers are like, and that training on it lowers the loss.

    python tests/negatives.py --seeds 11 12 13 14 15

Minutes on one thread. Prints a line a finding, and ends with 1 where one of them does not hold:

- descriptions of weakened images hallucinate more with every larger noise step, in the mean over the seeds;
- error-injected answers to every kind of annotated question name another object, attribute or count than the
  annotated one, in at least nine of ten;
- the loss falls in a training on each kind, mDPO's on image-weakened pairs too.

M3PO's answers are aligned with the images by a random CLIP: that its pairs train is shown, not that they help.
"""

import argparse
import random
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from peft import LoraConfig
from tiny_clip import save_clip

from bpo_fast.answers.generate import GenerationSettings
from bpo_fast.bootstrap import bootstrap
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.bootstrap.kinds import KINDS
from bpo_fast.bootstrap.m3po import M3PO
from bpo_fast.bootstrap.self_generated import SelfGenerated
from bpo_fast.bootstrap.sft import ChosenOnly
from bpo_fast.demo import negatives, tiny_llava, world, wrong_answers
from bpo_fast.demo.pipeline import NOISE_STEPS
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.train.config import BPOConfig
from bpo_fast.train.trainer import BPOTrainer

NUM_SCENES, NUM_ANNOTATIONS = 200, 300
# Few pairs, each seen five times: a random CLIP's preference can only be learned by heart. Losses of the first and the
# last ENDS steps are compared.
TRAIN_PAIRS, TRAIN_STEPS, ENDS = 64, 40, 8
CHANGED = 0.9
# What is trained -> the kind of its pairs.
TRAININGS = {"sigmoid": tuple(kind for kind in KINDS if kind != "sft"), "sft": ("sft",), "mdpo": ("image_weakened",)}


def load():
    return load_model(tiny_llava.CHECKPOINT, dtype=torch.float32, device="cpu")


def make_pairs(folder: Path, seed: int):
    """Pairs of every kind, of a world in which half of the scenes are typical."""
    annotations = world.write_instruct(folder / "annotated", NUM_ANNOTATIONS, bias=0.5, seed=10 * seed + 4)
    processor = load_processor(tiny_llava.CHECKPOINT)
    save_clip(folder / "clip", tokenizer=tiny_llava.build_tokenizer())
    greedy = GenerationSettings(negatives.MAX_NEW_TOKENS)
    sampled = GenerationSettings(negatives.MAX_NEW_TOKENS, do_sample=True, temperature=1.5)
    kinds = [
        ImageWeakened(steps=900, seed=seed, decoding=greedy),
        ErrorInjected(template=str(wrong_answers.TEMPLATE), seed=seed, decoding=greedy),
        SelfGenerated(seed=seed, decoding=sampled),
        ChosenOnly(),
        M3PO(str(folder / "clip"), num_candidates=4, margin=0.0, seed=seed, decoding=sampled),
    ]
    images = annotations.parent / "images"
    return bootstrap(load(), processor, annotations, images, folder / "pairs", kinds=kinds, batch_size=50)


def of_kind(pairs, kind: str):
    return pairs.select([row for row, name in enumerate(pairs["rejected_type"]) if name == kind])


def losses(folder: Path, pairs, loss_type: str) -> list[float]:
    """The loss at each step of a training."""
    trainer = BPOTrainer(
        model=load(),
        args=BPOConfig(
            output_dir=str(folder),
            loss_type=loss_type,
            max_steps=TRAIN_STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-4,
            logging_steps=1,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=load_processor(tiny_llava.CHECKPOINT),
        peft_config=LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def figures(seed: int, pairs) -> dict:
    """What `negatives.mean_of_runs` takes, of one seed."""
    rng = random.Random(10 * seed + 5)
    scenes = [world.sample_scene(rng, bias=0.0) for _ in range(NUM_SCENES)]
    model, processor = load(), load_processor(tiny_llava.CHECKPOINT)
    texts = negatives.read_texts(of_kind(pairs, "error_injected"))
    # What the run left out, being the annotated answer again, is no change.
    unchanged = [("left out", "There is one.", "There is one.")] * (NUM_ANNOTATIONS - len(texts))
    answers = [(text["error"], text["chosen"], text["rejected"]) for text in texts] + unchanged
    return {
        "noise": negatives.hallucination_by_step(model, processor, scenes, NOISE_STEPS, seed=seed),
        "errors": negatives.injected_errors(answers),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    holds = []

    def finding(words, held):
        holds.append(held)
        print(f"{'holds' if held else 'FAILS'}: {words}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        pairs = {seed: make_pairs(Path(folder, str(seed)), seed) for seed in seeds}
        mean = negatives.mean_of_runs([figures(seed, pairs[seed]) for seed in seeds])
        shares = mean["noise"]["hallucinated"]
        steps = ", ".join(f"{step}: {share:.3f}" for step, share in zip(NOISE_STEPS, shares, strict=True))
        rising = all(here < there for here, there in pairwise(shares))
        finding(f"hallucination rises with the noise step ({steps})", rising)
        for name, row in sorted(mean["errors"].items()):
            words = ", ".join(f"{share} {row[share]:.3f}" for share in negatives.SHARES)
            print(f"  error {name}: {row['answers']} answers, {words}")
        finding("error-injected answers are changed", mean["errors"]["all"]["changed"] >= CHANGED)
        first = pairs[seeds[0]]
        for loss_type, kinds in TRAININGS.items():
            for kind in kinds:
                trained = of_kind(first, kind)
                trained = trained.select(range(min(TRAIN_PAIRS, len(trained))))
                found = losses(Path(folder, f"{loss_type}-{kind}"), trained, loss_type)
                before, after = fmean(found[:ENDS]), fmean(found[-ENDS:])
                words = f"{loss_type} on {len(trained)} pairs of {kind}: loss {before:.4f}, then {after:.4f}"
                finding(words, after < before)
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
