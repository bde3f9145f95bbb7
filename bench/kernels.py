"""Time and memory of the losses beside their peers: `python bench/kernels.py` prints tables, writes JSON and a chart.

One DPO step on one pair, forward and backward, reference live, every candidate on the same tensors in one interleaved
run; peak memory of each in a fresh process. Two levels: `linear_dpo_loss` from hidden states (peers: eager PyTorch and
Liger's chunked DPO, which always makes the head's gradient, so ours and eager are timed with a trained head too), and
`dpo_loss` from logits (peer: eager PyTorch). The floor is the bare matrix products of the linear level.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from measure import RESULTS, environment, extra_peak, interleaved, peak_memory, summary, write_json

import bpo_fast

BETA = 0.1
LINEAR = ("bpo_fast", "eager", "bpo_fast, trained head", "eager, trained head", "Liger, trained head")
LOGITS = ("bpo_fast from logits", "eager from logits")
FLOOR = "floor: bare products"
FLOOR_TOKENS = 512


def eager_sequence_logps(logits, targets):
    logps = F.log_softmax(logits.float(), dim=-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return logps.masked_fill(targets == -100, 0).sum(-1)


def eager_dpo(logits, ref_logits, labels):
    """DPO as it is written by hand: shift, log-softmax of all logits, gather, sum."""
    targets = labels[:, 1:]
    with torch.no_grad():
        ref = eager_sequence_logps(ref_logits()[:, :-1], targets)
    chosen, rejected = (eager_sequence_logps(logits()[:, :-1], targets) - ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def make_steps(options, names):
    """name -> one training step without arguments; steps return the loss. The tensors behind them are made here."""
    generator = torch.Generator(options.device).manual_seed(0)

    def random(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, device=options.device) * scale
        return values.to(getattr(torch, options.dtype))

    tokens, vocab_size = options.tokens // 2, options.vocab_size
    labels = torch.randint(0, vocab_size, (2, tokens), generator=generator, device=options.device)
    labels[:, : tokens - int(tokens * options.response_fraction)] = -100
    steps = {}
    if FLOOR in names or set(names) & set(LINEAR):
        hidden = random(2, tokens, options.hidden_size).requires_grad_()
        ref_hidden = random(2, tokens, options.hidden_size)
        head = random(vocab_size, options.hidden_size, scale=options.hidden_size**-0.5)

        def linear(function, trained):
            def step():
                hidden.grad = None
                weight = head.detach().requires_grad_(trained)
                loss = function(weight)
                loss.backward()
                return loss.item()

            return step

        def ours(weight):
            return bpo_fast.linear_dpo_loss(hidden, weight, labels, ref_hidden=ref_hidden, beta=BETA).loss

        def eager(weight):
            return eager_dpo(lambda: hidden @ weight.t(), lambda: ref_hidden @ weight.t(), labels)

        liger_loss = LigerFusedLinearDPOLoss(beta=BETA)

        def liger(weight):
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            return liger_loss(weight, hidden, targets, ref_input=ref_hidden, ref_weight=weight)[0]

        def floor():
            rows = hidden.detach().flatten(0, 1)[: int((labels[:, 1:] != -100).sum())]
            for chunk in rows.split(FLOOR_TOKENS):
                chunk @ head.t()
                chunk @ head.t() @ head

        steps = {
            "bpo_fast": linear(ours, False),
            "eager": linear(eager, False),
            "bpo_fast, trained head": linear(ours, True),
            "eager, trained head": linear(eager, True),
            "Liger, trained head": linear(liger, True),
            FLOOR: floor,
        }
    if set(names) & set(LOGITS):
        logits = random(2, tokens, vocab_size).requires_grad_()
        ref_logits = random(2, tokens, vocab_size)

        def from_logits(function):
            def step():
                logits.grad = None
                loss = function()
                loss.backward()
                return loss.item()

            return step

        steps |= {
            "bpo_fast from logits": from_logits(
                lambda: bpo_fast.dpo_loss(logits, labels, ref_logits=ref_logits, beta=BETA).loss
            ),
            "eager from logits": from_logits(lambda: eager_dpo(lambda: logits, lambda: ref_logits, labels)),
        }
    return {name: steps[name] for name in names}


def measure_level(options, names, baseline, arguments):
    """Table rows of candidates that share their tensors: losses, seconds, extra peak bytes, ratios to baseline."""
    steps = make_steps(options, names)
    losses = {name: step() for name, step in steps.items()}
    samples = interleaved(steps, options.warmup, options.repeats)
    del steps
    rows = {}
    for name in names:
        rows[name] = {"loss": losses[name], "seconds": samples[name], **summary(samples[name])}
        rows[name]["peak_bytes"] = None if name == FLOOR else peak_memory(__file__, *arguments, "--peak", name)
    for row in rows.values():
        row["time_ratio"] = row["median"] / rows[baseline]["median"]
        row["peak_ratio"] = row["peak_bytes"] and row["peak_bytes"] / rows[baseline]["peak_bytes"]
    return rows


def print_table(rows, baseline):
    print(f"{'':<26}{'median s':>10}{'min':>8}{'max':>8}{'x ' + baseline:>20}{'peak MiB':>10}{'x':>8}{'loss':>11}")
    for name, row in rows.items():
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        share = "" if row["peak_ratio"] is None else f"{row['peak_ratio']:.3f}"
        loss = "" if row["loss"] is None else f"{row['loss']:.6f}"
        times = f"{row['median']:>10.3f}{row['min']:>8.3f}{row['max']:>8.3f}{row['time_ratio']:>20.2f}"
        print(f"{name:<26}{times}{peak:>10}{share:>8}{loss:>11}")


def plot(path, levels):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(levels), 2, figsize=(11, 1.2 + 0.45 * sum(map(len, levels.values()))), squeeze=False
    )
    for (title, rows), (time_axis, peak_axis) in zip(levels.items(), axes, strict=True):
        names = list(rows)[::-1]
        colours = ["#1b6ca8" if name.startswith("bpo_fast") else "#b8b8b8" for name in names]
        bars = time_axis.barh(names, [rows[name]["median"] for name in names], color=colours)
        time_axis.bar_label(bars, fmt="%.2f", padding=3)
        time_axis.set_title(f"{title}: seconds a step (median)")
        bars = peak_axis.barh(names, [(rows[name]["peak_bytes"] or 0) / 2**20 for name in names], color=colours)
        peaks = [rows[name]["peak_bytes"] for name in names]
        peak_axis.bar_label(bars, ["" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks], padding=3)
        peak_axis.set_title(f"{title}: extra peak memory, MiB")
        peak_axis.set_yticklabels([])
        for axis in (time_axis, peak_axis):
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the chosen and rejected row together")
    parser.add_argument("--hidden-size", type=int, default=4096 if cuda else 1024)
    parser.add_argument("--vocab-size", type=int, default=128256)
    parser.add_argument(
        "--logits-vocab-size", type=int, default=128256 if cuda else 32064, help="for the logits level"
    )
    parser.add_argument("--response-fraction", type=float, default=1.0, help="share of positions that are a response")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON path; the chart lies beside it (default: bench/results/)")
    parser.add_argument("--peak", metavar="NAME", help="print the extra peak memory of one candidate and end")
    return parser.parse_args(arguments)


def main(arguments):
    options = parse(arguments)
    if options.peak:
        (step,) = make_steps(options, [options.peak]).values()
        print(extra_peak(step, options.device))
        return
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    levels = {"linear_dpo_loss": measure_level(options, [*LINEAR, FLOOR], "eager", arguments)}
    options.vocab_size = options.logits_vocab_size
    logits_arguments = [*arguments, "--vocab-size", str(options.logits_vocab_size)]
    levels["dpo_loss"] = measure_level(options, list(LOGITS), "eager from logits", logits_arguments)
    output = options.output or RESULTS / f"kernels-{options.device}.json"
    write_json(output, {"environment": environment(), "settings": settings, "levels": levels})
    plot(output.with_suffix(".png"), levels)
    for (title, rows), baseline in zip(levels.items(), ("eager", "eager from logits"), strict=True):
        print(f"\n{title}, {options.tokens} tokens, {options.device}, {options.dtype}")
        print_table(rows, baseline)
    print(f"\nwritten: {output} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])
