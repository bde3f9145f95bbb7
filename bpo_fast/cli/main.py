"""The command `bpo-fast`: parse, call, print. Each command imports what it needs when it runs."""

import argparse
import errno
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bpo_fast import __version__
from bpo_fast.cli.parser import Parser
from bpo_fast.cli.quiet import end_bars, quiet, without_logged
from bpo_fast.runs.interrupts import interruptible
from bpo_fast.runs.numbers import SEED, check_numbers

_REMEDIES = {
    errno.ENOSPC: "make room on the disk, and the same command goes on",
    errno.EDQUOT: "make room on the disk, and the same command goes on",
    errno.EACCES: "change its permissions or name another",
    errno.ENAMETOOLONG: "choose a shorter name",
}

# What `plan` reads where it is given no recipe: the paper's settings on one card.
PLANNED_RECIPE = "llava15-13b-a40"


@interruptible()
@quiet()
def bootstrap(argv: Sequence[str]) -> None:
    """Make preference pairs from annotated images."""
    from bpo_fast.cli.bootstrap_options import BootstrapArguments
    from bpo_fast.cli.recipe import carried_options, parse_arguments

    (arguments,) = parse_arguments([BootstrapArguments], argv, command="bootstrap", description=bootstrap.__doc__)
    from bpo_fast.bootstrap import bootstrap as make_pairs
    from bpo_fast.data.pairs import MANIFEST_FILE, SKIPPED_FILE
    from bpo_fast.runs.files import read_json

    options = {"model_init_kwargs": arguments.load_options(), **arguments.run_options()}
    pairs = make_pairs(arguments.model_name_or_path, None, dry_run=arguments.dry_run, **options)
    if arguments.dry_run:
        return
    if pairs is None:
        print(f"The parts of this process are done in {arguments.output_dir}; others are not.")
        return
    counts = read_json(Path(arguments.output_dir) / MANIFEST_FILE)["counts"]
    cut = counts["rejected_truncated"]
    cut = f"; {cut:,} rejected responses were cut at max_new_tokens" if cut else ""
    print(
        f"{counts['pairs']:,} pairs in {arguments.output_dir} ({counts['skipped']:,} records skipped, see "
        f"{SKIPPED_FILE}{cut}).",
        _next("train", *carried_options(argv), "--dataset", arguments.output_dir, "--output_dir", "ADAPTER"),
    )


@quiet()
def export(argv: Sequence[str]) -> None:
    """Write preference pairs in the form of another trainer: LLaVA's, RLAIF-V's or LLaMA-Factory's."""
    from bpo_fast.cli.options import ExportArguments
    from bpo_fast.cli.recipe import parse_arguments

    if argv and not argv[0].startswith("-"):
        argv = ["--dataset", *argv]
    (arguments,) = parse_arguments([ExportArguments], argv, command="export", description=export.__doc__)
    from bpo_fast.data.export import PAIRS_FILE, export_pairs

    done = export_pairs(arguments.dataset, arguments.output_dir, arguments.format)
    left_out = f", {done.left_out:,} left out that {arguments.format} has no place for" if done.left_out else ""
    print(f"{done.pairs:,} pairs in {Path(arguments.output_dir, PAIRS_FILE)}{left_out}.")


@interruptible()
@quiet()
def browse(argv: Sequence[str]) -> None:
    """Write preference pairs as a page to look at: offline, searched and sorted in a browser."""
    from bpo_fast.cli.options import BrowseArguments
    from bpo_fast.cli.recipe import parse_arguments

    if argv and not argv[0].startswith("-"):
        argv = ["--dataset", *argv]
    (arguments,) = parse_arguments([BrowseArguments], argv, command="browse", description=browse.__doc__)
    from bpo_fast.data.pairs import count_skipped, load_preference_dataset, undecoded_rows
    from bpo_fast.report.browse import write_browser

    dataset = load_preference_dataset(arguments.dataset, image_folder=arguments.image_folder)
    options = _without(asdict(arguments), "dataset", "image_folder")
    counts = write_browser(
        undecoded_rows(dataset),
        name=arguments.dataset,
        total=len(dataset),
        left_out=count_skipped(arguments.dataset),
        **options,
    )
    unreadable = f", {counts['unreadable']:,} of which cannot be shown" if counts["unreadable"] else ""
    print(
        f"{counts['pairs']:,} pairs with {counts['images']:,} images{unreadable}. Next: open "
        f"{Path(arguments.output_dir, 'index.html')} in a browser"
    )


@interruptible()
@quiet()
def train(argv: Sequence[str]) -> None:
    """Train an adapter on preference pairs, or on their chosen answers with --loss_type sft."""
    from bpo_fast.cli.help import train_groups
    from bpo_fast.cli.options import TrainArguments
    from bpo_fast.cli.recipe import carried_options, parse_arguments
    from bpo_fast.losses.config import LOSS_OPTIONS
    from bpo_fast.train.config import BPOConfig
    from bpo_fast.train.options import REFUSED

    arguments, config = parse_arguments(
        [TrainArguments, BPOConfig],
        argv,
        command="train",
        description=train.__doc__,
        groups=train_groups(LOSS_OPTIONS),
        hidden=REFUSED,
    )
    from bpo_fast.plan.before import forecast_of
    from bpo_fast.plan.cards import card_here
    from bpo_fast.train.run import train as train_adapter

    trained = train_adapter(
        config,
        arguments.model_name_or_path,
        arguments.dataset,
        _lora(arguments),
        image_folder=arguments.image_folder,
        eval_dataset=arguments.eval_dataset,
        eval_fraction=arguments.eval_fraction,
        model_init_kwargs=arguments.load_options(),
        forecast=lambda lengths: forecast_of(argv, lengths, card_here()),
    )
    if config.process_index == 0:
        where = ("--questions", "QUESTIONS", "--image_folder", "IMAGES", "--output_dir", "SCORES")
        done = "finished before, nothing is done again" if trained.was_finished else f"{trained.num_pairs:,} pairs"
        print(
            f"Adapter in {config.output_dir} ({done}, {trained.num_steps:,} steps).",
            _next("evaluate", *carried_options(argv), "--adapter", config.output_dir, "--kind", "pope", *where),
        )


@interruptible()
@quiet()
def evaluate(argv: Sequence[str]) -> None:
    """Score a model's answers about images."""
    from bpo_fast.cli.options import EvaluateArguments
    from bpo_fast.cli.recipe import parse_arguments

    (arguments,) = parse_arguments([EvaluateArguments], argv, command="evaluate", description=evaluate.__doc__)
    from bpo_fast.evaluate.run import ANSWERS_FILE, SCORES_FILE, SKIPPED_FILE
    from bpo_fast.evaluate.run import evaluate as score

    load_options = arguments.load_options()
    options = _without(asdict(arguments), "model_name_or_path", *load_options)
    scores = score(arguments.model_name_or_path, None, model_init_kwargs=load_options, **options)
    print(json.dumps(scores, indent=2))
    change = "without --adapter" if arguments.adapter else "with --adapter ADAPTER"
    skipped = scores["num_skipped"]
    one, more = "1 question whose image cannot be read is", f"{skipped:,} questions whose images cannot be read are"
    skipped = f"; {one if skipped == 1 else more} left out, see {SKIPPED_FILE}" if skipped else ""
    # Standard output holds the scores alone, for other programs to read.
    print(
        f"Scores in {arguments.output_dir} ({SCORES_FILE}; answers in {ANSWERS_FILE}{skipped}). Next: to compare, the "
        f"same command {change} and with another --output_dir",
        file=sys.stderr,
    )


def _lora(arguments):
    """The adapter that the options of a training ask for."""
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.target_modules,
        task_type="CAUSAL_LM",
    )


def _next(*command: str) -> str:
    return f"Next: {shlex.join(['bpo-fast', *command])}"


def _without(options: dict, *names: str) -> dict:
    return {name: value for name, value in options.items() if name not in names}


@quiet()
def plan(argv: Sequence[str]) -> None:
    """Say what a training will hold on a card and how long it will take: without a GPU, weights or network."""
    from bpo_fast.cli.help import PLAN_GROUPS
    from bpo_fast.cli.options import PlanArguments
    from bpo_fast.cli.recipe import parse_arguments
    from bpo_fast.train.config import BPOConfig
    from bpo_fast.train.options import REFUSED

    if not any(option.partition("=")[0] == "--config" for option in argv):
        argv = ["--config", PLANNED_RECIPE, *argv]
    arguments, config = parse_arguments(
        [PlanArguments, BPOConfig],
        # Counted on fake tensors that say they are on the CPU, in the precision of a training on a GPU.
        ["--bf16", "true", *argv, "--use_cpu", "true"],
        command="plan",
        section="train",
        description=plan.__doc__,
        groups=PLAN_GROUPS,
        hidden=REFUSED,
    )
    from bpo_fast.plan.cards import card_here, find_card
    from bpo_fast.plan.fit import fit
    from bpo_fast.plan.lengths import PAPER_MIX, read_lengths
    from bpo_fast.plan.report import as_json, as_text
    from bpo_fast.plan.run import Planned
    from bpo_fast.plan.run import plan as make_plan
    from bpo_fast.plan.shapes import find_config, image_tokens

    name = arguments.model or arguments.model_name_or_path
    model, lengths = find_config(name), PAPER_MIX
    if arguments.batch_lengths:
        lengths = read_lengths(arguments.batch_lengths, image_tokens(model))
        config.per_device_train_batch_size = len(arguments.batch_lengths)
    config.per_device_train_batch_size = arguments.pairs or config.per_device_train_batch_size
    card = find_card(arguments.gpu) if arguments.gpu else card_here()
    load = arguments.load_options()
    planned = Planned(name, model, config, _lora(arguments), load["dtype"], load["quantization"], lengths)
    planned, found = fit(planned, card) if arguments.fit else (planned, make_plan(planned, card))
    print(json.dumps(as_json(planned, found), indent=2) if arguments.json else as_text(planned, found))


@quiet()
def merge(argv: Sequence[str]) -> None:
    """Put an adapter into its model's weights, for programs that load no adapters."""
    from bpo_fast.cli.options import MergeArguments
    from bpo_fast.cli.recipe import parse_arguments

    (arguments,) = parse_arguments([MergeArguments], argv, command="merge", description=merge.__doc__)
    from bpo_fast.models.merge import merge_adapter

    options = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    merge_adapter(arguments.model_name_or_path, arguments.adapter, arguments.output_dir, **options)
    where = ("--questions", "QUESTIONS", "--image_folder", "IMAGES", "--output_dir", "SCORES")
    print(
        f"Model in {arguments.output_dir}.",
        _next("evaluate", "--model_name_or_path", arguments.output_dir, "--kind", "pope", *where),
    )


@quiet()
def demo(argv: Sequence[str]) -> None:
    """Run the whole method on a miniature world and write a report."""
    parser = Parser(prog="bpo-fast demo", description=demo.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output_dir", default="bpo_output/demo", help="Folder of run and report (default: %(default)s)."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Random seeds, one run each (default: 0).")
    arguments = parser.parse_args(argv)
    for seed in arguments.seeds:
        check_numbers(argparse.Namespace(seed=seed), {"seed": SEED})
    from bpo_fast.demo import pipeline

    pipeline.run(arguments.output_dir, seeds=tuple(arguments.seeds))
    print(
        f"Report in {Path(arguments.output_dir, 'report.html')} (its figures in results.json). Next: open it in a "
        "browser; for a model and images of your own, see bpo-fast bootstrap --help"
    )


@without_logged()
def doctor(argv: Sequence[str]) -> int:
    """Show what this machine has, what is missing, and the line that installs it."""
    Parser(prog="bpo-fast doctor", description=doctor.__doc__, allow_abbrev=False).parse_args(argv)
    from bpo_fast.doctor import run

    return run()


COMMANDS = {
    command.__name__: command for command in (bootstrap, browse, export, plan, train, evaluate, merge, demo, doctor)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bpo-fast`; a user's mistake is one sentence on standard error.

    Returns:
        Exit status: 0 when all went well, 2 for a mistake in the arguments or the data, 130 when
        interrupted and 143 when asked to end by SIGTERM.
    """
    summaries = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="bpo-fast",
        description="Bootstrapped Preference Optimization of multimodal language models.",
        epilog=f"commands:\n{summaries}\n\nbpo-fast COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bpo-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    traceback = False
    try:
        arguments = parser.parse_args(argv)
        traceback = arguments.traceback or "--traceback" in arguments.options
        arguments.options = [option for option in arguments.options if option != "--traceback"]
        return COMMANDS[arguments.command](arguments.options) or 0
    except KeyboardInterrupt as stopped:
        end_bars()
        where = getattr(stopped, "where", None) or "the same command resumes where this one stopped."
        print(f"bpo-fast: interrupted; {where}", file=sys.stderr)
        return getattr(stopped, "status", 130)
    # A mistake of the user, or something that this machine lacks, with a sentence that says what to do.
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        end_bars()
        if traceback:
            raise
        print(f"bpo-fast: error: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    """What an error says; one of the operating system, which says little, in the form of ours."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno, "name another")
    name = error.filename2 or error.filename or "disk"
    return f"{name}: found that it cannot be used ({error.strerror}), expected a file or folder that can; {remedy}."


if __name__ == "__main__":
    sys.exit(main())
