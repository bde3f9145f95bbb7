"""Training throughput and peak memory of BPOTrainer beside TRL's DPOTrainer, step by step in turns.

    python bench/throughput.py

Each trainer lives in a process of its own (so that peak memory is its own) and runs its real training loop; a step
is let go only when the other process is idle. The same random LLaVA, pairs, seed, LoRA and batches on both sides.
Prints a table; writes results/throughput-<device>.json and .png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, environment, process_peak, summary, write_json

# Trainer and whether activations are recomputed in the backward pass, which both trainers do by default.
VARIANTS = {
    "TRL DPOTrainer": ("trl", True),
    "bpo-fast BPOTrainer": ("bpo_fast", True),
    "TRL DPOTrainer, no checkpointing": ("trl", False),
    "bpo-fast BPOTrainer, no checkpointing": ("bpo_fast", False),
}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of each trainer, after one that is not timed"
    )
    parser.add_argument("--pairs", type=int, default=2, help="preference pairs a step")
    parser.add_argument("--response-tokens", type=int, default=100, help="mean tokens of a response")
    parser.add_argument("--lora-r", type=int, default=64, help="LoRA rank")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(arguments):
    """One trainer: answers every line on standard input with one training step and its time in seconds."""
    import torch
    from datasets import Dataset
    from llava_shapes import Shape, make_model, make_pairs, make_processor
    from peft import LoraConfig
    from transformers import TrainerCallback

    library, checkpointing = VARIANTS[arguments.worker]
    if library == "trl":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as TrainerClass
    else:
        from bpo_fast import BPOConfig as Config
        from bpo_fast import BPOTrainer as TrainerClass

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer

    class StepOnDemand(TrainerCallback):
        started = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.wait()

        def on_step_end(self, args, state, control, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.started
            print(json.dumps({"seconds": seconds, "peak": process_peak()}), file=answers, flush=True)
            self.wait()

        def wait(self):
            sys.stdin.readline()
            self.started = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.losses = [*getattr(self, "losses", []), float(logs["loss"])]

    shape = Shape()
    steps = arguments.steps + 1
    output_dir = tempfile.mkdtemp(prefix="throughput-")
    trainer = TrainerClass(
        model=make_model(shape),
        args=Config(
            output_dir=output_dir,
            per_device_train_batch_size=arguments.pairs,
            max_steps=steps,
            learning_rate=1e-4,
            max_length=2048,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(make_pairs(shape, steps * arguments.pairs, arguments.response_tokens)),
        processing_class=make_processor(shape),
        peft_config=LoraConfig(
            r=arguments.lora_r,
            lora_alpha=2 * arguments.lora_r,
            target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        ),
        callbacks=[callback := StepOnDemand()],
    )
    trainer.train()
    shutil.rmtree(output_dir)
    print(json.dumps({"losses": callback.losses}), file=answers, flush=True)


def measure(arguments):
    """{variant: {"seconds": [...], "peak_bytes": n, "losses": [...]}}"""
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("steps", "pairs", "lora_r")]
    options.append(f"--response-tokens={arguments.response_tokens}")
    results = {}
    # The pairs of processes that are compared run beside each other; two more would only take memory.
    for checkpointing in (True, False):
        names = [name for name, (_, recompute) in VARIANTS.items() if recompute is checkpointing]
        workers = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--worker", name, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if not sys.stderr.isatty() else None,
                text=True,
            )
            for name in names
        }
        samples = {name: [] for name in names}
        for step in range(arguments.steps + 1):
            for name in names if step % 2 else reversed(names):
                answer = ask(workers[name], name)
                results[name] = {"peak_bytes": answer["peak"]}
                if step:
                    samples[name].append(answer["seconds"])
                print(f"step {step}/{arguments.steps}  {answer['seconds']:7.2f} s  {name}", file=sys.stderr)
        for name, worker in workers.items():
            results[name] |= {"seconds": samples[name], "losses": ask(worker, name)["losses"]}
            worker.communicate()
    return results


def ask(worker, name):
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{name} stopped with code {worker.wait()}:\n{worker.stderr.read() if worker.stderr else ''}")
    return json.loads(line)


def tabulate(results, pairs):
    rows = []
    for name, result in results.items():
        _, checkpointing = VARIANTS[name]
        peer = next(n for n, variant in VARIANTS.items() if variant == ("trl", checkpointing))
        seconds = summary(result["seconds"])
        rows.append(
            {
                "trainer": name,
                "pairs_per_second": pairs / seconds["median"],
                "seconds_per_step": seconds,
                "peak_mib": result["peak_bytes"] / 2**20,
                "speed_over_trl": summary(results[peer]["seconds"])["median"] / seconds["median"],
                "memory_over_trl": result["peak_bytes"] / results[peer]["peak_bytes"],
            }
        )
    return rows


def show(rows):
    print(f"{'trainer':<40}{'pairs/s':>9}{'s/step':>9}{'peak MiB':>10}{'speed':>8}{'memory':>8}")
    for row in rows:
        print(
            f"{row['trainer']:<40}{row['pairs_per_second']:>9.3f}{row['seconds_per_step']['median']:>9.2f}"
            f"{row['peak_mib']:>10.0f}{row['speed_over_trl']:>7.2f}x{row['memory_over_trl']:>7.2f}x"
        )


def plot(rows, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained", sharey=True)
    names = [row["trainer"].replace(", ", ",\n") for row in rows]
    colours = ["#9aa5b1" if "TRL" in name else "#2563eb" for name in names]
    columns = (("pairs_per_second", "preference pairs per second"), ("peak_mib", "peak memory of the process, MiB"))
    for axis, (key, label) in zip(axes, columns, strict=True):
        bars = axis.barh(names, [row[key] for row in rows], color=colours)
        axis.bar_label(bars, fmt="%.2f" if key == "pairs_per_second" else "%.0f", padding=3)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)


def main():
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
        return
    from dataclasses import asdict

    from llava_shapes import Shape

    results = measure(arguments)
    rows = tabulate(results, arguments.pairs)
    show(rows)
    setup = {name: value for name, value in vars(arguments).items() if name != "worker"} | asdict(Shape())
    found = environment()
    stem = Path(RESULTS) / f"throughput-{found['device'].replace(' ', '-').lower()}"
    write_json(stem.with_suffix(".json"), {"environment": found, "setup": setup, "table": rows, "samples": results})
    plot(rows, stem.with_suffix(".png"))
    print(f"wrote {stem}.json and {stem}.png")


if __name__ == "__main__":
    main()
