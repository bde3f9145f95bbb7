"""Is the shipped checkpoint what its training makes? Trains it anew, which takes minutes, and compares.

    python tests/checkpoint.py

With the libraries and the processor that made the checkpoint, every file must have the same bits. With others,
rounding leads 2,280 steps elsewhere; then both models must act alike: on 256 scenes, clear and weakened, the mean
probabilities of the true and of the typical object (`likelihood_by_step`) agree to `TOLERANCE`.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

from bpo_fast.demo import tiny_llava, world
from bpo_fast.demo.probes import likelihood_by_step
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward
from bpo_fast.runs.files import read_json

TOLERANCE = 0.15
NUM_SCENES = 256


def compare(shipped: Path, remade: Path) -> str:
    """A sentence that says how two checkpoints agree.

    Raises:
        ValueError: they do not.
    """
    names = sorted({path.name for folder in (shipped, remade) for path in folder.iterdir()})
    differing = [name for name in names if _bytes(shipped / name) != _bytes(remade / name)]
    if not differing:
        return f"{shipped}: the same bits as its training makes, in each of {len(names)} files."
    there, here = (read_json(folder / tiny_llava.RECORD) for folder in (shipped, remade))
    others = [
        f"{name} {there.get(name)} there and {here[name]} here" for name in here if here[name] != there.get(name)
    ]
    if not others:
        raise ValueError(
            f"{shipped}: found other bits in {', '.join(differing)}, expected those that its training makes on the "
            "same libraries and processor; python -m bpo_fast.demo.tiny_llava makes it anew."
        )
    largest = max(abs(x - y) for x, y in zip(likelihoods(shipped), likelihoods(remade), strict=True))
    if largest > TOLERANCE:
        raise ValueError(
            f"{shipped}: found probabilities that differ by {largest:.3f} from those of a training here, expected at "
            f"most {TOLERANCE}; python -m bpo_fast.demo.tiny_llava makes it anew."
        )
    return f"{shipped}: probabilities within {largest:.3f} of a training here; made with {'; '.join(others)}."


def likelihoods(checkpoint: Path) -> list[float]:
    """Of the true and of the typical object, clear and weakened."""
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    enable_packed_forward(model)
    rng = random.Random(0)
    scenes = [world.sample_scene(rng, bias=0.0) for _ in range(NUM_SCENES)]
    found = likelihood_by_step(model, load_processor(checkpoint), scenes, [None, 900], seed=0)
    return [*found["true"], *found["typical"]]


def _bytes(path):
    return path.read_bytes() if path.is_file() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--checkpoint", type=Path, default=tiny_llava.CHECKPOINT)
    parser.add_argument("--remade", type=Path, help="compare with this one, which was trained here before")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        remade = arguments.remade or Path(folder, "checkpoint")
        try:
            if arguments.remade is None:
                tiny_llava.train(remade, seed=read_json(arguments.checkpoint / tiny_llava.RECORD)["seed"])
            print(compare(arguments.checkpoint, remade))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
