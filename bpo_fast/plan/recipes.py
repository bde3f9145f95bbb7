"""The forecast in the head comment of every recipe of a card: `python -m bpo_fast.plan.recipes [--check]`.

A recipe names its card in its file's name, behind the model: llava15-13b-a40.yaml, llava15-7b-16gb.yaml.
"""

import argparse
import math
import re
import sys
from importlib import resources
from pathlib import Path

import yaml
from peft import LoraConfig

from bpo_fast.plan.cards import GIB, Card, find_card
from bpo_fast.plan.lengths import PAPER_MIX
from bpo_fast.plan.run import Plan, Planned, plan
from bpo_fast.plan.shapes import find_config
from bpo_fast.runs.files import replacing
from bpo_fast.train.config import BPOConfig

BEGIN, END = "# Forecast", "# (assumed; bpo-fast plan says what is)"
_BLOCK = re.compile(rf"{BEGIN}.*?{re.escape(END)}\n", re.DOTALL)
_NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?(?=[ ,])")
TOLERANCE = 0.05  # of a forecast's figures
# Cards of a size: the slowest of them that are common.
_SIZES = {"24gb": "l4", "16gb": "rtx4080"}


def card_of(name: str) -> Card:
    """The card of a recipe's name.

    Example:
        >>> card_of("llava15-13b-a40").name, card_of("llava15-7b-16gb").name
        ('a40', 'rtx4080')
    """
    last = name.rsplit("-", 1)[-1]
    return find_card(_SIZES.get(last, last))


def planned_of(values: dict) -> Planned:
    """The training of a recipe, as its YAML gives it."""
    train = dict(values["train"])
    lora = LoraConfig(
        r=train.pop("lora_r"),
        lora_alpha=train.pop("lora_alpha"),
        lora_dropout=train.pop("lora_dropout"),
        task_type="CAUSAL_LM",
    )
    model = values["model_name_or_path"]
    quantization = None if values["quantization"] == "none" else values["quantization"]
    config = BPOConfig(**train | {"use_cpu": True})
    return Planned(model, find_config(model), config, lora, values["dtype"], quantization, PAPER_MIX)


def comment(found: Plan) -> str:
    """The lines of a recipe's head that say its forecast."""
    forecast = found.forecast
    card = forecast.card
    pairs, tokens = found.step.num_pairs, sum(found.step.sequence_lengths)
    return (
        f"{BEGIN}: {forecast.peak_bytes / GIB:.1f} of {card.memory_gib:.1f} GiB on {card.name} at {pairs} pairs of "
        f"{tokens:,} tokens,\n"
        f"# {forecast.flops_per_pair / 1e12:.1f} TFLOP and {forecast.seconds_per_pair:.2f} s a pair, "
        f"{forecast.epoch_hours:.0f} h an epoch of the paper's pairs\n"
        f"{END}\n"
    )


def _close(there: str, made: str) -> bool:
    """Whether two comments say the same, in figures that differ by less than the forecast's own error."""
    words, numbers = zip(*((_NUMBER.sub("#", text), _NUMBER.findall(text)) for text in (there, made)), strict=True)
    if words[0] != words[1]:
        return False
    pairs = zip(*numbers, strict=True)
    return all(math.isclose(*(float(x.replace(",", "")) for x in pair), rel_tol=TOLERANCE) for pair in pairs)


def main(arguments: list[str], folder: Path | None = None) -> int:
    """Write the forecasts, or with --check tell whether one would change."""
    parser = argparse.ArgumentParser(prog="python -m bpo_fast.plan.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; end with code 1 if something would be")
    check = parser.parse_args(arguments).check
    behind = False
    for path in sorted((folder or Path(str(resources.files("bpo_fast") / "recipes"))).glob("llava15-*.yaml")):
        text = path.read_text()
        made = comment(plan(planned_of(yaml.safe_load(path.read_text())), card_of(path.stem)))
        if not _BLOCK.search(text):
            raise ValueError(f"{path}: found no lines from '{BEGIN}' to '{END}', expected them in its head; add them.")
        if _close(_BLOCK.search(text)[0], made):
            continue
        after = _BLOCK.sub(lambda _, made=made: made, text)
        behind = True
        print(f"{path.name}: {'behind the plan; run python -m bpo_fast.plan.recipes.' if check else 'written.'}")
        if not check:
            with replacing(path) as file:
                file.write(after)
    return int(check and behind)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
