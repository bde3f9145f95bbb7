"""Training throughput and peak memory of BPOTrainer beside TRL's DPOTrainer: `python bench/throughput.py`.

Each trainer lives in a process of its own (so that peak memory is its own) and runs its real training loop; a step is
let go only when the other process is idle. The same random LLaVA, pairs, seed, LoRA and batches on both sides.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
from measure import add_ratios, memory, summary, synchronise
from results import Results

from bpo_fast.demo.tiny_llava import CHECKPOINT

# Where each one's Trainer and Config are.
TRAINERS = {"bpo_fast BPOTrainer": "bpo_fast:BPO", "TRL DPOTrainer": "trl:DPO"}
TEXT = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
VISION = {"image_size": 336, "patch_size": 14, "vision_hidden_size": 256, "vision_layers": 8}
TOY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY |= {"image_size": 28, "vision_hidden_size": 32, "vision_layers": 2, "lora_r": 2, "vocab_size": 512}
TOY |= {"steps": 1, "pairs": 1, "response_tokens": 6}
TRAINING = {"learning_rate": 1e-4, "max_length": 2048, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cuda" if cuda else "cpu", dtype="bfloat16 autocast" if cuda else "float32")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each trainer, after one that is not")
    parser.add_argument("--pairs", type=int, default=2, help="preference pairs a step")
    parser.add_argument("--response-tokens", type=int, default=100, help="mean tokens of a response")
    parser.add_argument("--lora-r", type=int, default=64, help="LoRA rank")
    parser.add_argument("--output", type=Path, help="JSON path, the chart beside it (default: below bench/results)")
    for name, size in (TEXT | {"vocab_size": 32064} | VISION).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--toy", action="store_true", help="at toy sizes, for a rehearsal")
    options = parser.parse_args(arguments)
    if options.toy:
        vars(options).update(TOY)
    return options


def make_llava(options):
    """The demo's LLaVA at the sizes of `options`, of random weights in float32; and its processor."""
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

    config, processor = LlavaConfig.from_pretrained(CHECKPOINT), AutoProcessor.from_pretrained(CHECKPOINT)
    text = {name: getattr(options, name) for name in (*TEXT, "vocab_size")} | {"max_position_embeddings": 4096}
    heads, width, side = options.num_attention_heads, options.vision_hidden_size, options.image_size
    config.text_config.update(text | {"num_key_value_heads": heads, "head_dim": options.hidden_size // heads})
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 64)}
    images = {"image_size": side, "patch_size": options.patch_size, "num_hidden_layers": options.vision_layers}
    config.vision_config.update(vision | images)
    config.image_seq_length = (side // options.patch_size) ** 2
    processor.patch_size = options.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor


def make_pairs(options, tokenizer):
    """Pairs in TRL's columns: noise images, a question, responses of 70 to 130 % of the mean number of tokens."""
    from PIL import Image

    rng, side, mean = random.Random(0), options.image_size, options.response_tokens
    words = sorted(token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isalpha())

    def turn(role, low, high, *parts):
        text = " ".join(rng.choices(words, k=rng.randint(low, high)))
        return [{"role": role, "content": [*parts, {"type": "text", "text": text}]}]

    pairs = []
    for _ in range(options.pairs * (options.steps + 1)):
        image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
        prompt = turn("user", 30, 30, {"type": "image"})
        chosen, rejected = (turn("assistant", round(0.7 * mean), round(1.3 * mean)) for _ in range(2))
        pairs.append({"images": [image], "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def work(connection, prefix, checkpointing, options):
    """One trainer: each message is answered with a training step, (seconds, peak bytes); the last with the losses."""
    os.dup2(2, 1)  # what libraries print is no table
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback

    class StepOnDemand(TrainerCallback):
        def on_train_begin(self, *_, **__):
            connection.recv()
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            synchronise()
            connection.send((time.perf_counter() - self.started, memory(options.device, peak=True)))
            self.on_train_begin()

    model, processor = make_llava(options)
    lora = LoraConfig(r=options.lora_r, lora_alpha=2 * options.lora_r, target_modules=LORA_TARGETS)
    data = Dataset.from_list(make_pairs(options, processor.tokenizer))
    run = {"max_steps": options.steps + 1, "per_device_train_batch_size": options.pairs, "disable_tqdm": True}
    run |= {"gradient_checkpointing": checkpointing, "bf16": options.device == "cuda"}
    with tempfile.TemporaryDirectory() as folder:
        config = resolve_name(f"{prefix}Config")(output_dir=folder, **TRAINING, **run)
        parts = {"train_dataset": data, "processing_class": processor, "peft_config": lora}
        trainer = resolve_name(f"{prefix}Trainer")(model, args=config, callbacks=[StepOnDemand()], **parts)
        trainer.train()
    connection.send([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def ask(connection, name):
    try:
        connection.send(None)
        return connection.recv()
    except (EOFError, OSError):
        raise SystemExit(f"{name}: found that its process ended, expected an answer; see its error above.") from None


def measure(checkpointing, options, progress):
    """The group of both trainers; two more processes beside them would only take memory."""
    context, connections, answers = multiprocessing.get_context("spawn"), {}, {name: [] for name in TRAINERS}
    for name, prefix in TRAINERS.items():
        connections[name], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, prefix, checkpointing, options), daemon=True).start()
        theirs.close()
    for step in range(options.steps + 1):
        for name in list(TRAINERS)[:: 1 if step % 2 else -1]:
            answers[name].append(ask(connections[name], name))
            progress.update()
    rows = {name: summary([seconds for seconds, _ in answers[name][1:]]) for name in TRAINERS}
    for name, row in rows.items():
        row |= {"pairs_per_second": options.pairs / row["median"], "peak_bytes": answers[name][-1][1]}
        row["losses"] = ask(connections[name], name)
    add_ratios(rows, "TRL DPOTrainer")
    what = f"A training step {'with' if checkpointing else 'without'} gradient checkpointing: LLaVA with LoRA, "
    what += "live reference; peak memory is the process's"
    image_tokens = (options.image_size // options.patch_size) ** 2
    shape = {"pairs": options.pairs, "image tokens": image_tokens, "LoRA r": options.lora_r}
    shape |= {"response tokens": options.response_tokens, "H": options.hidden_size, "V": options.vocab_size}
    return {"what": what, "shape": shape, "reference": "TRL DPOTrainer", "rows": rows}


def main(arguments):
    options = parse(arguments)
    groups = {"training": True, "training, no checkpointing": False}
    jobs = {title: (2 * options.steps + 2, partial(measure, value, options)) for title, value in groups.items()}
    Results("throughput", vars(options), options.output).run(jobs)


if __name__ == "__main__":
    main(sys.argv[1:])
