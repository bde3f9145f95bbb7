"""Training throughput and peak memory of BPOTrainer beside TRL's DPOTrainer: `python bench/throughput.py`.

Each candidate lives in a process of its own (so that peak memory is its own) and runs its real training loop on the
same random LLaVA, pairs, seed, LoRA and batches. On a CPU a step is let go only when the other processes are idle, in
turn; on CUDA one candidate has the card at a time. What a cache costs to fill is said beside the steps, not in them.

On CUDA the model is LLaVA-1.5-13B in random NF4 weights with the lengths of BPO's data, every idea is switched off in
turn, and memory is capped to that of the card of --as.
"""

import argparse
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import torch
from measure import add_ratios, memory, summary, synchronise
from results import Results

from bpo_fast.plan.cards import CARDS, find_card

OURS, TRL = "bpo_fast BPOTrainer", "TRL DPOTrainer"
# Where each one's Trainer and Config are.
TRAINERS = {OURS: "bpo_fast:BPO", TRL: "trl:DPO"}
CHECKPOINTING = {"with": {"gradient_checkpointing": True}, "without": {"gradient_checkpointing": False}}
IN_FULL = "both caches and selective checkpointing, and less where it says so; TRL recomputes every layer"
CPU_SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
CPU_SIZES |= {"vision_hidden_size": 256, "vision_layers": 8, "pairs": 2, "lengths": "even"}
LLAVA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAVA_13B |= {"vision_hidden_size": 1024, "vision_layers": 24, "pairs": 4, "lengths": "paper"}
COMMON = {"vocab_size": 32064, "image_size": 336, "patch_size": 14}
TOY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
TOY |= {"vision_hidden_size": 32, "vision_layers": 2, "lora_r": 2, "vocab_size": 512, "steps": 1, "pairs": 1}
TOY |= {"response_tokens": 6, "with_floor": True, "base": "nf4" if find_spec("bitsandbytes") else "dense"}
TRAINING = {"learning_rate": 1e-4, "max_length": 2048, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
REFERENCE, FEATURES = {"precompute_ref_log_probs": True}, {"cache_image_features": True}
CACHES, FULL_SIZE = REFERENCE | FEATURES, {"checkpointing": "selective"}
# Each candidate's options. On a CPU what a cache adds; on CUDA everything, and everything but one idea each.
ON_CPU = {OURS: {}, f"{OURS}, cached reference": REFERENCE, f"{OURS}, both caches": CACHES, TRL: {}}
WITHOUT = {
    "cached reference": {"precompute_ref_log_probs": False},
    "cached features": {"cache_image_features": False},
    "caches": {"precompute_ref_log_probs": False, "cache_image_features": False},
    "shared prefixes": {"share_prefixes": False},
    "packed pairs": {"pack_pairs": False},
    "fused LoRA": {"fused_lora": False},
    "Liger's kernels": {"use_liger_kernel": False},
}
SWITCHES = ("share_prefixes", "pack_pairs")  # no options of BPOConfig: see ideas.py
MODES = ("none", "every_2", "full", "offload")
ON_CUDA = {
    TRL: {},
    OURS: CACHES | FULL_SIZE,
    **{f"{OURS}, without {name}": CACHES | FULL_SIZE | change for name, change in WITHOUT.items()},
    **{f"{OURS}, checkpointing {mode}": CACHES | {"checkpointing": mode} for mode in MODES},
}


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cuda" if cuda else "cpu", dtype="bfloat16 autocast" if cuda else "float32")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each candidate, after one that is not")
    parser.add_argument(
        "--response-tokens", type=int, default=100, help="mean of a response, unless lengths are the paper's"
    )
    parser.add_argument("--lora-r", type=int, default=64, help="LoRA rank")
    default = "nf4" if cuda and find_spec("bitsandbytes") else "dense"
    parser.add_argument("--base", choices=("dense", "nf4"), default=default, help="the language model's weights")
    parser.add_argument("--as", dest="card", choices=tuple(CARDS), help="on CUDA: no more memory than this card has")
    parser.add_argument("--rows", nargs="+", help="only candidates whose name ends with one of these texts")
    parser.add_argument("--output", type=Path, help="JSON path, the chart beside it (default: below bench/results)")
    parser.add_argument("--toy", action="store_true", help="every candidate of CUDA on a CPU, at toy sizes")
    for name, size in ((LLAVA_13B if cuda else CPU_SIZES) | COMMON).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(size), default=size)
    parser.set_defaults(with_floor=cuda)
    options = parser.parse_args(arguments)
    if options.toy:
        vars(options).update(TOY)
    return options


def work(connection, prefix, change, options):
    """One candidate: messages are answered when it is imported, when training begins, and with each step.

    An answer is (seconds, peak bytes) of what came before; the last is what its row says besides.
    """
    os.dup2(2, 1)  # what libraries print is no table
    from datasets import Dataset
    from models import make_llava, make_pairs
    from peft import LoraConfig
    from transformers import TrainerCallback

    config_type, trainer_type = (resolve_name(f"{prefix}{kind}") for kind in ("Config", "Trainer"))
    ours = importlib.import_module("ideas") if prefix == TRAINERS[OURS] else None

    class Answers(TrainerCallback):
        started = time.perf_counter()

        def answer(self):
            synchronise()
            held = torch.cuda.max_memory_reserved() if options.device == "cuda" else memory("cpu", peak=True)
            connection.send((time.perf_counter() - self.started, held))
            connection.recv()
            self.started = time.perf_counter()

        def on_train_begin(self, *_, **__):
            self.answer()

        def on_step_end(self, *_, **__):
            self.answer()

    callback, said = Answers(), {}
    connection.recv()
    if options.device == "cuda" and options.card:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, find_card(options.card).memory_bytes / total))
    model, processor = make_llava(options)
    lora = LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules=LORA_TARGETS)
    data = Dataset.from_list(make_pairs(options, processor.tokenizer))
    run = {"max_steps": options.steps + 1, "per_device_train_batch_size": options.pairs, "disable_tqdm": True}
    run |= TRAINING | {"bf16": options.device == "cuda"} | change
    with tempfile.TemporaryDirectory() as folder:
        switches = [name for name in SWITCHES if name in run]
        if ours:
            trainer_type = ours.our_trainer(trainer_type, switches, said)
            run = {name: value for name, value in run.items() if name not in SWITCHES}
            run |= {"cache_dir": folder} if any(run.get(name) for name in CACHES) else {}
        config = config_type(output_dir=folder, **run)
        parts = {"train_dataset": data, "processing_class": processor, "peft_config": lora}
        trainer = trainer_type(model, args=config, callbacks=[callback], **parts)
        trainer.train()
        if options.device == "cuda":
            said["allocated_bytes"] = memory("cuda", peak=True)  # of those that the allocator held
        if ours and options.with_floor:
            packings = ours.second_batch(trainer, options)
            said |= ours.floors(trainer, packings, options)
            said |= {} if switches else ours.forecast_bytes(trainer, run, lora, packings, options)
    log = trainer.state.log_history
    said["losses"] = [entry["loss"] for entry in log if "loss" in entry]
    tokens = [entry["num_tokens"] for entry in log if "num_tokens" in entry]
    connection.send(said | {"tokens_per_step": (tokens[-1] - tokens[0]) / options.steps})


class Candidate:
    """The process of a trainer, or why there is none."""

    def __init__(self, name, change, options, context):
        self.name, prefix = name, TRAINERS[TRL if name == TRL else OURS]
        self.missing, self.answers = None, []
        package = prefix.split(":")[0]
        if find_spec(package) is None:
            self.missing = f"{package} is not installed"
            return
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, prefix, change, options), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self):
        """Its next answer, None where its process has ended, which its row then says."""
        if self.missing:
            return None
        try:
            self.connection.send(None)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.missing = f"failed: its process ended with code {self.process.exitcode}; see its error above"
            return None

    def step(self, progress):
        self.answers.append(self.ask())
        progress.update()

    def row(self, options):
        """What is kept of it, after its last step; its process ends."""
        said = self.ask()
        if self.missing:
            return {"missing": self.missing}
        self.process.join()
        row = summary([seconds for seconds, _ in self.answers[2:]])
        row |= {"pairs_per_second": options.pairs / row["median"], "peak_bytes": self.answers[-1][1]} | said
        row["tokens_per_second"] = row.pop("tokens_per_step") / row["median"]
        if "floor_seconds" in row:
            row["floor_ratio"] = row["median"] / row["floor_seconds"]
            row["recompute_floor_ratio"] = row["median"] / row["recompute_floor_seconds"]
        return row


def measure(candidates, what, options, progress):
    """The group of these candidates, name -> options."""
    context = multiprocessing.get_context("spawn")
    running = [Candidate(name, change, options, context) for name, change in candidates.items()]
    rows = {}
    if options.device == "cuda":  # imported beside each other, then each has the card for itself
        for candidate in running:
            for _ in range(options.steps + 2):
                candidate.step(progress)
            rows[candidate.name] = candidate.row(options)
    else:
        for step in range(options.steps + 2):
            for candidate in running[:: 1 if step % 2 else -1]:
                candidate.step(progress)
        rows = {candidate.name: candidate.row(options) for candidate in running}
    add_ratios(rows, TRL)
    project(rows, options)
    image_tokens = (options.image_size // options.patch_size) ** 2
    shape = {"pairs": options.pairs, "image tokens": image_tokens, "LoRA r": options.lora_r}
    if options.lengths != "paper":
        shape |= {"response tokens": options.response_tokens}
    shape |= {"H": options.hidden_size, "layers": options.num_hidden_layers, "V": options.vocab_size}
    return {"what": what, "shape": shape, "reference": TRL, "rows": rows}


def project(rows, options):
    """Give rows on a known card the time that another would take: products by its rate, the rest by its bandwidth."""
    try:
        here, there = find_card(torch.cuda.get_device_name()), find_card(options.card)
    except (AssertionError, AttributeError, RuntimeError, ValueError):
        return
    for row in rows.values():
        if "products" in row:
            rest = max(0.0, row["median"] - row["products"])
            row["projected"] = row["products"] * here.rate / there.rate + rest * here.bandwidth / there.bandwidth


def groups(options):
    """{title: (candidates, what)}."""
    model = f"LLaVA of {options.base} weights with LoRA"
    if options.device == "cuda" or options.toy:
        cap = f", memory capped to that of {options.card}" if options.card else ""
        names = {name: change for name, change in ON_CUDA.items() if name.endswith(tuple(options.rows or [""]))}
        return {"training": (names, f"A training step: {model}, lengths as in BPO's data{cap}; {OURS} has {IN_FULL}")}
    what = "A training step {} gradient checkpointing: " + model + "; peak memory is the process's"
    return {
        title: ({name: CHECKPOINTING[words] | change for name, change in ON_CPU.items()}, what.format(words))
        for title, words in (("training", "with"), ("training, no checkpointing", "without"))
    }


def main(arguments):
    options = parse(arguments)
    jobs = {
        title: (len(names) * (options.steps + 2), partial(measure, names, what, options))
        for title, (names, what) in groups(options).items()
    }
    suffix = f"-as-{options.card}" if options.card else ""
    result = Results("throughput", vars(options), options.output, suffix).run(jobs)
    ours = [row for group in result["groups"].values() for name, row in group["rows"].items() if name.startswith(OURS)]
    return int(any("missing" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
