"""Kills commands at random moments and sees them end the same: `python tests/kills.py`.

Each command runs once undisturbed in a small world. Then it is started, stopped by a signal at a moment drawn
uniformly over the length of that run, started again, and so on; whenever it comes to its end its result files must
hold the same bytes as those of the undisturbed run, and a finished run that is started again must not touch them.
Any difference, a status that the signal does not explain, or a stack trace ends the script with code 1.

"caches" is a training that keeps image features and the reference's log-probs in a cache of its own, in small shards
that are written slowly, so that signals hit them; after each signal every shard must hold what its name says.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image
from tiny_models import WORDS
from tiny_world import make_world, write

from bpo_fast.data.formats import preference_row

ROOT = Path(__file__).resolve().parents[1]
NUM_RECORDS = 96
# Many seconds of work each: most of a short run is the import of libraries, and few signals would hit anything else.
RECIPE = """
model_name_or_path: model
image_folder: images
bootstrap: {annotations: data.json, max_new_tokens: 48, batch_size: 2}
train: {dataset: pairs.json, use_cpu: true, max_steps: 60, save_steps: 4, save_total_limit: 2, logging_steps: 1,
        per_device_train_batch_size: 4, learning_rate: 1.0e-2, lora_r: 4, lora_dropout: 0.1,
        disable_dropout: false, report_to: none}
evaluate: {questions: questions.json, kind: pope, max_new_tokens: 48, batch_size: 2}
"""
TRAINED = ("adapter_model.safetensors", "adapter_config.json")
RESULTS = {
    "bootstrap": (
        *("README.md", "manifest.json", "skipped.jsonl", "metadata.json", "data/part-00000-of-00001.parquet"),
        *("parts/00000.json", "parts/00000.jsonl"),
    ),
    "train": TRAINED,
    "caches": TRAINED,
    "evaluate": ("answers.jsonl", "scores.json", "skipped.jsonl", "metadata.json", "responses.jsonl"),
}
# The second status is that of a process whose own handlers are not there yet.
STATUSES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
GOES_ON = "the same command resumes"
RUN = "import sys; from bpo_fast.cli.main import main; sys.exit(main())"
SLOWLY = """
import time
from bpo_fast.runs import tensor_cache
write, tensor_cache.SHARD_BYTES = tensor_cache.save_file, 2048
def save_file(tensors, path, metadata):
    path.write_bytes(b"half a shard")
    time.sleep(0.2)
    write(tensors, path, metadata)
tensor_cache.save_file = save_file
"""


def make_larger_world(folder):
    """`tiny_world.make_world` with more records, one of them with a damaged image, and answers of a few seconds."""
    make_world(folder)
    rng = random.Random(0)
    annotations, pairs, questions = [], [], []
    for number in range(NUM_RECORDS):
        image = f"{number}.png"
        Image.frombytes("RGB", (16, 16), rng.randbytes(768)).save(folder / "images" / image)
        question, chosen, rejected = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(3))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": chosen}]
        annotations.append({"id": str(number), "image": image, "conversations": turns})
        pairs.append(preference_row(image, question, f"{chosen} w1", f"{rejected} w2", id=str(number)))
        questions.append({"id": number, "image": image, "question": question, "label": rng.choice(("yes", "no"))})
    damaged = folder / "images" / f"{NUM_RECORDS - 1}.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    write(folder / "data.json", annotations)
    write(folder / "pairs.json", pairs[:-1])
    write(folder / "questions.json", questions)
    (folder / "run.yaml").write_text(RECIPE)


def start(world, command, out):
    """The command as a process, its output in files beside `out`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", RUN, command, "--config", "run.yaml", "--output_dir", out]
    if command == "caches":
        kept = ("cache_image_features", "true", "precompute_ref_log_probs", "true", "cache_dir", f"{out}-cache")
        line = [*line[:2], SLOWLY + RUN, "train", *line[4:], *(f"--{kept[n]}={kept[n + 1]}" for n in range(0, 6, 2))]
    with (world / "stdout").open("w") as stdout, (world / "stderr").open("w") as stderr:
        return subprocess.Popen(line, cwd=world, env=environment, stdout=stdout, stderr=stderr)


def results(folder, command):
    """Name -> bytes of the files that a run ends with; of a training its losses, too."""
    found = {name: (folder / name).read_bytes() for name in RESULTS[command] if (folder / name).exists()}
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if states:
        history = json.loads(states[-1].read_text())["log_history"]
        timed = ("runtime", "per_second", "time", "data_wait")
        kept = [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in history]
        found["log_history"] = json.dumps(kept).encode()
    return found


def progress(folder, command):
    """How far a run has come, in words."""
    if command in ("train", "caches"):
        shards = len(list(folder.parent.glob(f"{folder.name}-cache/*/*/*.safetensors")))
        return f"{shards} shards, {len(list(folder.glob('checkpoint-*/trainer_state.json')))} checkpoints"
    journal = folder / "responses.jsonl"
    return f"{len(journal.read_bytes().splitlines()) if journal.exists() else 0} responses"


def differences(world, out, command, wanted):
    """What is wrong with a run that came to its end: a sentence each."""
    found = results(world / out, command)
    names = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
    return [f"{out}/{name} differs from that of the undisturbed run" for name in names]


def damaged_shards(world, out):
    """Shards of a run's cache that do not hold what their names say: a sentence each."""
    paths = world.glob(f"{out}-cache/*/*/*.safetensors")
    return [f"{path} is damaged" for path in paths if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem]


def finish(world, command, out):
    """Runs the command to its end; what is wrong with how it ended."""
    status = start(world, command, out).wait()
    return [] if status == 0 else [f"{command} in {out} ended with status {status}: {tail(world)}"]


def tail(world):
    return " | ".join((world / "stderr").read_text().splitlines()[-3:])


def stop_and_go(world, command, signals, rng):
    """All signals to one command, in as many runs as it takes; what went wrong."""
    whole = f"{command}-whole"
    began = time.perf_counter()
    wrong = finish(world, command, whole)
    duration = time.perf_counter() - began
    wanted = results(world / whole, command)
    if wrong or set(RESULTS[command]) - set(wanted):
        return wrong or [f"{command}: the undisturbed run left {sorted(wanted)}, expected {RESULTS[command]}"]
    print(f"{command}: undisturbed {duration:.1f} s, {progress(world / whole, command)}", flush=True)
    number, sent = 0, 0
    while sent < len(signals):
        out = f"{command}-{number}"
        process, moment = start(world, command, out), rng.uniform(0, duration)
        try:
            status = process.wait(moment)
        except subprocess.TimeoutExpired:
            signum = signals[sent]
            process.send_signal(signum)
            status = process.wait()
            if status != 0:
                sent += 1
                wrong += damaged_shards(world, out)
                how = f"[{sent}/{len(signals)}] {signum.name:7} at {moment:5.1f} s, status {status:4}"
                print(f"{command}: {how}, {out} with {progress(world / out, command)}", flush=True)
                text = (world / "stderr").read_text()
                if status not in STATUSES[signum] or (status > 0 and (GOES_ON not in text or "Traceback" in text)):
                    wrong.append(f"{command} ended with status {status} after {signum.name}: {tail(world)}")
                continue
        # It came to its end before the signal did.
        wrong += [f"{command} in {out} ended with status {status}: {tail(world)}"] if status else []
        wrong += differences(world, out, command, wanted)
        number += 1
    wrong += finish(world, command, out) + differences(world, out, command, wanted)
    for finished in (whole, out):
        times = [(world / finished / name).stat().st_mtime_ns for name in RESULTS[command]]
        wrong += finish(world, command, finished) + differences(world, finished, command, wanted)
        if times != [(world / finished / name).stat().st_mtime_ns for name in RESULTS[command]]:
            wrong.append(f"{command} wrote files of {finished} again, which was finished")
    print(f"{command}: {dict(Counter(each.name for each in signals))} in {number + 1} runs", flush=True)
    return wrong


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", choices=(*RESULTS, "all"), default="all")
    for name, count in (("kills", 20), ("terms", 5), ("interrupts", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    # A shell's background job ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        make_larger_world(Path(folder))
        for command in RESULTS if options.command == "all" else [options.command]:
            rng = random.Random(f"{options.seed} {command}")
            signals = [signal.SIGKILL] * options.kills
            signals += [signal.SIGTERM] * options.terms + [signal.SIGINT] * options.interrupts
            rng.shuffle(signals)
            wrong += stop_and_go(Path(folder), command, signals, rng)
    for sentence in wrong:
        print(sentence)
    print("every result the same bytes" if not wrong else f"{len(wrong)} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
