"""Scoring K answers to one prompt: `python bench/scoring.py` prints tables, writes JSON and a chart.

From image and texts to log-probs, by bpo_fast.answers.score in one packed forward and answer by answer, and by
transformers: answer by answer, all answers in a padded batch, and with the prompt's keys and values kept and handed to
a padded batch of the answers. On the demo's checkpoint, and on a random LLaVA with 576 image tokens and answers as
long as those of BPO's three data sets.
"""

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import torch
from measure import add_ratios, interleaved, summary
from models import make_llava, make_pairs
from report import OURS
from results import Results

from bpo_fast.answers.score import score_answers
from bpo_fast.demo import tiny_llava, world
from bpo_fast.models.load import load_model, load_processor
from bpo_fast.models.packed_forward import enable_packed_forward, unpacked_forward
from bpo_fast.models.prompt import answer_ids, encode, render
from bpo_fast.plan.lengths import PAPER_MIX

ONE_BY_ONE = f"{OURS}, one by one"
# As throughput.py trains on a CPU.
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
SIZES |= {"vision_hidden_size": 256, "vision_layers": 8, "vocab_size": 32064, "image_size": 336, "patch_size": 14}
TOLERANCE = 1e-5  # nats a token


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.set_defaults(device="cpu", dtype="float32", base="dense", lengths="even")
    add = parser.add_argument
    add("--candidates", type=int, default=8, help="answers to the prompt, an even number")
    means = [mean for _, mean in PAPER_MIX.parts]
    add("--answer-tokens", type=int, nargs="*", default=sorted(means), help="means of an answer, a table each")
    add("--repeats", type=int, default=5, help="timed rounds, after one that is not")
    add("--output", type=Path, help="JSON path; the chart lies beside it (default: below bench/results)")
    for name, size in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, default=size)
    return parser.parse_args(arguments)


class Problem:
    """A model as it is scored by, an image, a prompt and K answers; its methods are the candidates of the table."""

    def __init__(self, model, processor, image, prompt, answers):
        enable_packed_forward(model)
        self.model, self.processor = model.eval(), processor
        self.image, self.prompt, self.answers = image, prompt, answers

    def ours(self):
        return [found.logp for found in score_answers(*self.asked(), self.answers)]

    def ours_one_by_one(self):
        return [score_answers(*self.asked(), [answer])[0].logp for answer in self.answers]

    def asked(self):
        return self.model, self.processor, self.image, self.prompt

    def rendered(self):
        """The prompt's text, that of the answers after it, and their ids."""
        prefix, branches = render(self.processor, self.prompt, self.answers)
        return prefix, branches, [answer_ids(self.processor, branch) for branch in branches]

    def encoded(self, texts):
        return encode(self.processor, texts, [[self.image]] * len(texts)).to(dtype=self.model.dtype)

    @torch.no_grad()
    def theirs_one_by_one(self):
        prefix, branches, ids = self.rendered()
        sums = []
        with unpacked_forward(self.model) as forward:
            for branch, answer in zip(branches, ids, strict=True):
                logits = forward(**self.encoded([prefix + branch])).logits[0]
                sums.append(logp(logits[-len(answer) - 1 : -1], answer))
        return sums

    @torch.no_grad()
    def theirs_in_a_batch(self):
        prefix, branches, ids = self.rendered()
        with unpacked_forward(self.model) as forward:
            logits = forward(**self.encoded([prefix + branch for branch in branches])).logits  # padded on the left
        return [logp(row[-len(answer) - 1 : -1], answer) for row, answer in zip(logits, ids, strict=True)]

    @torch.no_grad()
    def theirs_with_a_cache(self):
        prefix, _, ids = self.rendered()
        longest = max(map(len, ids))
        # What is padded on the right changes nothing before it.
        padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in ids])
        with unpacked_forward(self.model) as forward:
            seen = forward(**self.encoded([prefix]), use_cache=True, logits_to_keep=1)
            seen.past_key_values.batch_repeat_interleave(len(ids))
            logits = forward(input_ids=padded[:, :-1], past_key_values=seen.past_key_values).logits
        logits = torch.cat([seen.logits.expand(len(ids), 1, -1), logits], dim=1)
        return [logp(row[: len(answer)], answer) for row, answer in zip(logits, ids, strict=True)]

    def in_float64(self):
        """The log-probs that all are compared with."""
        self.model.double()
        expected = self.theirs_one_by_one()
        self.model.float()
        return expected


def logp(logits, answer):
    """Log-prob of an answer, from the logits that predict its tokens."""
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()


CANDIDATES = {
    OURS: Problem.ours,
    ONE_BY_ONE: Problem.ours_one_by_one,
    "transformers, one by one": Problem.theirs_one_by_one,
    "transformers, padded batch": Problem.theirs_in_a_batch,
    "transformers, prompt cached": Problem.theirs_with_a_cache,
}


def demo_problem(options):
    rng = random.Random(0)
    model, processor = load_model(tiny_llava.CHECKPOINT, device="cpu"), load_processor(tiny_llava.CHECKPOINT)
    scenes = [world.sample_scene(rng, 0.5) for _ in range(options.candidates)]
    answers = list(map(world.describe, scenes))
    return Problem(model, processor, world.draw(scenes[0]), world.QUESTIONS["describe"], answers)


def llava_problem(options, mean):
    model, processor = make_llava(options)
    wanted = argparse.Namespace(**vars(options), pairs=options.candidates // 2, steps=0, response_tokens=mean)
    pairs = make_pairs(wanted, processor.tokenizer)
    answers = [pair[side][0]["content"][0]["text"] for pair in pairs for side in ("chosen", "rejected")]
    return Problem(model, processor, pairs[0]["images"][0], pairs[0]["prompt"], answers)


def measure(make_problem, options, progress):
    problem = make_problem(options)
    counts, expected = list(map(len, problem.rendered()[2])), problem.in_float64()
    steps, rows = {}, {}
    for name, score in CANDIDATES.items():
        pairs = zip(score(problem), expected, counts, strict=True)
        error = max(abs(found - true) / count for found, true, count in pairs)
        rows[name] = {"loss_error": error, "gradient_error": None, "agrees": error <= TOLERANCE}
        steps[name] = partial(score, problem)
    for name, seconds in interleaved(steps, 0, options.repeats, 1, progress).items():
        rows[name] |= summary(seconds)
    add_ratios(rows, ONE_BY_ONE)
    config = problem.model.config
    shape = {"K": len(counts), "image tokens": config.image_seq_length, "answers' tokens": sum(counts)}
    shape |= {"H": config.text_config.hidden_size, "layers": config.text_config.num_hidden_layers}
    return {
        "what": "`score_answers`: log-probs of K answers to one prompt",
        "shape": shape,
        "reference": ONE_BY_ONE,
        "rows": rows,
    }


def main(arguments):
    options = parse(arguments)
    problems = {"demo's model": demo_problem}
    problems |= {f"answers of {mean} tokens": partial(llava_problem, mean=mean) for mean in options.answer_tokens}
    count = options.repeats * len(CANDIDATES)
    jobs = {title: (count, partial(measure, problem, options)) for title, problem in problems.items()}
    result = Results("scoring", vars(options), options.output).run(jobs)
    rows = [row for group in result["groups"].values() for row in group["rows"].values()]
    return int(not all(row["agrees"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
