"""Answers a second, beside the loops they are made with elsewhere: `python bench/bootstrap.py`.

A timed step is one pass over all images, or prompts, from decoded images to texts. The plain loop asks one image at a
time through transformers' `generate`, with pixels and the same noise. transformers' continuous batching
(`generate_batch`) takes token ids and no image, and so stands beside prompts of text alone.
"""

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import torch
from measure import add_ratios, flush_buffer, interleaved, summary
from results import Results
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from bpo_fast.answers.generate import GenerationSettings, generate, generate_text
from bpo_fast.answers.prompts import Prompts
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.data.annotations import Annotation
from bpo_fast.demo import world
from bpo_fast.demo.tiny_llava import CHECKPOINT
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.weaken import weaken

OURS, LOOP = "bpo_fast", "plain loop"
SEVERAL_STEPS = [100, 300, 500, 700, 900]


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cuda" if cuda else "cpu")
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="path of a model, by default the demo's")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", help="of its weights")
    parser.add_argument("--images", type=int, default=64, help="images a pass")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64], help="of ours, and of batched peers")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="an answer is cut there")
    parser.add_argument("--warmup", type=int, default=1, help="passes that are not timed")
    parser.add_argument("--repeats", type=int, default=7, help="timed passes")
    parser.add_argument("--output", type=Path, help="JSON path, the chart beside it (default: below bench/results)")
    return parser.parse_args(arguments)


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


class Work:
    """The model, and what it is asked: each way to ask it gives the answers' texts."""

    def __init__(self, options):
        self.options = options
        self.model = load_model(options.model, dtype=getattr(torch, options.dtype), device=options.device).eval()
        self.processor = load_processor(options.model)
        self.decoding = GenerationSettings(options.max_new_tokens)
        rng = random.Random(0)
        rows = [world.sample_conversation(rng, bias=0.5) for _ in range(options.images)]
        self.images = [world.draw(scene) for scene, _, _ in rows]
        self.samples = [Annotation(n, str(n), str(n), question, "") for n, (_, question, _) in enumerate(rows)]
        self.texts = [f"{question} {answer}" for _, question, answer in rows]

    def ours(self, steps, size):
        maker = ImageWeakened(steps=steps, decoding=self.decoding)
        pairs = zip(batches(self.samples, size), batches(self.images, size), strict=True)
        made = [maker.make(self.model, self.processor, *pair) for pair in pairs]
        return [each.rejected for batch in made for responses in batch for each in responses]

    def theirs(self, steps, size):
        """By `generate` with pixels, which every step processes again."""
        answers = {}
        for batch in batches(range(len(self.images)), size):
            for step in steps:
                ids = [self.samples[n].sample_id for n in batch]
                shown, asked = [self.images[n] for n in batch], [self.samples[n].prompt for n in batch]
                with weaken(self.model, step, sample_ids=ids):  # in such a block our answers come of model.generate
                    responses = generate(self.model, self.processor, shown, asked, self.decoding)
                answers |= {(n, step): each.text for n, each in zip(batch, responses, strict=True)}
        return [answers[n, step] for n in range(len(self.images)) for step in steps]

    def our_texts(self, size):
        asked = batches(self.texts, size)
        responses = [generate_text(self.model, self.processor, batch, self.decoding) for batch in asked]
        return [each.text for batch in responses for each in batch]

    def their_texts(self):
        return [self._decoded(self.model.generate(**inputs, **self._greedy())[0, n:]) for inputs, n in self._prompts()]

    def continuous(self):
        """By `generate_batch`, with as much cache as the prompts need: by default it takes most of the memory."""
        ids = [inputs["input_ids"][0].tolist() for inputs, _ in self._prompts()]
        config = ContinuousBatchingConfig(num_blocks=2 * len(ids), max_batch_tokens=2048)
        greedy = GenerationConfig(**self._greedy(), eos_token_id=self.model.generation_config.eos_token_id)
        options = {"generation_config": greedy, "continuous_batching_config": config, "warmup": False}
        found = self.model.generate_batch(ids, **options)
        return [self._decoded(found[f"req_{n}"].generated_tokens) for n in range(len(ids))]

    def _prompts(self):
        prompts = Prompts.of(self.model, self.processor, self.texts, None)
        for number in range(len(prompts)):
            inputs = prompts.inputs([number])
            yield inputs, inputs["input_ids"].shape[1]

    def _greedy(self):
        pad = self.processor.tokenizer.pad_token_id
        return {"max_new_tokens": self.options.max_new_tokens, "do_sample": False, "pad_token_id": pad}

    def _decoded(self, tokens):
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def groups(work):
    """{title: (what, name -> its way)}."""
    sizes = work.options.batch_sizes
    weakened = {}
    for title, steps in (("one step", [900]), (f"{len(SEVERAL_STEPS)} steps", SEVERAL_STEPS)):
        ways = {f"{OURS}, batches of {size}": partial(work.ours, steps, size) for size in sizes}
        ways[LOOP] = partial(work.theirs, steps, 1)
        ways |= {f"generate, batches of {size}": partial(work.theirs, steps, size) for size in sizes}
        weakened[f"image_weakened, {title}"] = ("Answers to weakened images, a pass over all of them", ways)
    ways = {f"{OURS}, batches of {size}": partial(work.our_texts, size) for size in sizes}
    ways |= {LOOP: work.their_texts, "generate_batch": work.continuous}
    return weakened | {"text alone": ("Answers to prompts of text alone, a pass over all of them", ways)}


def measure(work, what, ways, progress):
    options, rows, answers = work.options, {}, {}
    for name, way in list(ways.items()):
        try:
            answers[name] = way()
        except Exception as error:  # a peer that does not run here: said in the table
            rows[name] = {"missing": f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]}
    running = {name: way for name, way in ways.items() if name in answers}
    timing = options.warmup, options.repeats, 1, progress, flush_buffer(options.device)
    tokenizer = work.processor.tokenizer
    for name, seconds in interleaved(running, *timing).items():
        # With the token that ended it.
        tokens = sum(len(ids) + 1 for ids in tokenizer(answers[name], add_special_tokens=False)["input_ids"])
        same = sum(a == b for a, b in zip(answers[name], answers[LOOP], strict=True)) / len(answers[name])
        rows[name] = summary(seconds) | {"same_answers": same}
        rows[name]["answers_per_second"] = len(answers[name]) / rows[name]["median"]
        rows[name]["tokens_per_second"] = tokens / rows[name]["median"]
    rows = {name: rows[name] for name in ways}
    add_ratios(rows, LOOP)
    shape = {"images": options.images, "max_new_tokens": options.max_new_tokens}
    return {"what": what, "shape": shape, "reference": LOOP, "rows": rows}


def main(arguments):
    logging.set_verbosity_error()
    options = parse(arguments)
    model = "demo" if options.model == CHECKPOINT else options.model  # its path says where this tree lies
    results, work = Results("bootstrap", vars(options) | {"model": model}, options.output), Work(options)
    jobs = {
        title: (len(ways) * (options.warmup + options.repeats), partial(measure, work, what, ways))
        for title, (what, ways) in groups(work).items()
    }
    found = results.run(jobs)
    ours = [row for group in found["groups"].values() for name, row in group["rows"].items() if name.startswith(OURS)]
    return int(any("missing" in row for row in ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
