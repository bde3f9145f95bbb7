"""The command `bpo-fast`: parse, call, print. Each command imports what it needs when it runs."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

# Every other training argument changes how a run goes, not what it ends with.
_DECIDING_FIELDS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
    "simpo_gamma",
    "max_length",
    "disable_dropout",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def bootstrap(argv):
    """Make preference pairs from annotated pictures."""
    from bpo_fast.cli.recipe import BootstrapArguments, parse_arguments

    (arguments,) = parse_arguments([BootstrapArguments], argv, command="bootstrap")
    from bpo_fast.bootstrap import bootstrap
    from bpo_fast.data.pairs import METADATA_FILE
    from bpo_fast.runs.files import read_json

    load_options = arguments.load_options()
    options = _without(asdict(arguments), "model_name_or_path", *load_options)
    bootstrap(arguments.model_name_or_path, None, model_init_kwargs=load_options, **options)
    counts = read_json(Path(arguments.output_dir) / METADATA_FILE)["counts"]
    print(
        f"{counts['pairs']} pairs of {counts['records']} records in {arguments.output_dir}; {counts['skipped']} "
        f"skipped (reasons in skipped.jsonl), {counts['rejected_truncated']} responses cut at max_new_tokens"
    )


def train(argv):
    """Train an adapter on preference pairs, or on their chosen answers with --loss_type sft."""
    from bpo_fast.cli.recipe import TrainArguments, parse_arguments
    from bpo_fast.train.checkpoints import last_complete_checkpoint
    from bpo_fast.train.config import BPOConfig
    from bpo_fast.train.trainer import BPOTrainer

    arguments, config = parse_arguments([TrainArguments, BPOConfig], argv, command="train")
    from peft import LoraConfig

    from bpo_fast.data import load_preference_dataset
    from bpo_fast.data.pairs import dataset_fingerprint
    from bpo_fast.models.load import load_model, load_processor
    from bpo_fast.runs.folder import claim_folder

    dataset = load_preference_dataset(arguments.dataset, image_folder=arguments.image_folder)
    settings = asdict(arguments) | {name: getattr(config, name) for name in _DECIDING_FIELDS}
    del settings["image_folder"]
    settings["dataset"] = dataset_fingerprint(dataset)
    is_main_process = config.process_index == 0
    if is_main_process:
        claim_folder(config.output_dir, settings, record="run.json")
    checkpoint = config.resume_from_checkpoint or last_complete_checkpoint(config.output_dir)
    if checkpoint and is_main_process:
        print(f"resuming from {checkpoint}")
    trainer = BPOTrainer(
        model=load_model(arguments.model_name_or_path, device=config.device, **arguments.load_options()),
        args=config,
        train_dataset=dataset,
        processing_class=load_processor(arguments.model_name_or_path),
        peft_config=LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if is_main_process:
        print(f"adapter in {config.output_dir}")


def evaluate(argv):
    """Score a model's answers about pictures."""
    from bpo_fast.cli.recipe import EvaluateArguments, parse_arguments

    (arguments,) = parse_arguments([EvaluateArguments], argv, command="evaluate")
    from bpo_fast.evaluate.run import evaluate
    from bpo_fast.models.load import load_model, load_processor

    load_options = arguments.load_options()
    options = _without(asdict(arguments), "model_name_or_path", *load_options)
    model = load_model(arguments.model_name_or_path, adapter=arguments.adapter, **load_options)
    scores = evaluate(model, load_processor(arguments.model_name_or_path), **options)
    print(json.dumps(scores, indent=2))


def _without(options, *names):
    return {name: value for name, value in options.items() if name not in names}


def demo(argv):
    """Run the whole method on a miniature world and write a report."""
    parser = _parser("demo", demo.__doc__)
    parser.add_argument("--output_dir", default="bpo-demo", help="Folder of the run and its report (%(default)s).")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="One run a seed (0).")
    arguments = parser.parse_args(argv)
    from bpo_fast.demo import pipeline

    pipeline.run(arguments.output_dir, seeds=tuple(arguments.seeds))


def doctor(argv):
    """Say what this machine has, what is missing, and the line that adds it."""
    _parser("doctor", doctor.__doc__).parse_args(argv)
    from bpo_fast.doctor import run

    return run()


COMMANDS = {command.__name__: command for command in (bootstrap, train, evaluate, demo, doctor)}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help).")


def _parser(command, description):
    return _Parser(prog=f"bpo-fast {command}", description=description, allow_abbrev=False)


def main(argv=None):
    """Run `bpo-fast`; a user's mistake is one sentence on standard error.

    Returns:
        `int`: exit status, 0 when all went well, 2 for a mistake in the arguments or the data, 130 when interrupted.
    """
    summaries = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="bpo-fast",
        description="Bootstrapped Preference Optimization of multimodal language models.",
        epilog=f"commands:\n{summaries}\n\nbpo-fast COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help=argparse.SUPPRESS)
    traceback = False
    try:
        arguments = parser.parse_args(argv)
        traceback = arguments.traceback
        return COMMANDS[arguments.command](arguments.options) or 0
    except KeyboardInterrupt:
        print("bpo-fast: interrupted; the same command goes on where this one stopped.", file=sys.stderr)
        return 130
    # A mistake of the user, or something this machine lacks, comes as one of these, with a sentence that says what to
    # do.
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if traceback:
            raise
        print(f"bpo-fast: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
