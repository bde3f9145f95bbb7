"""Bad recipes and options: a sentence by name, before anything is loaded, and nothing on disk."""

import pytest
from bad_input import Bad, check, table


def instead(old, new):
    """Rewrites a part of the recipe."""

    def prepare(world):
        path = world / "run.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return prepare


def bytes_of(change):
    """Rewrites the recipe's bytes."""

    def prepare(world):
        path = world / "run.yaml"
        path.write_bytes(change(path.read_bytes()))

    return prepare


def added(section, option):
    return instead(f"{section}: {{", f"{section}: {{{option}, ")


def nothing(world):
    pass


@table(
    Bad(
        "a key twice in a section",
        added("train", "lora_r: 4"),
        "train",
        "run.yaml, line 5: found 'lora_r' a second time, the first is in line 4; keep one of them.",
    ),
    Bad(
        "a section twice",
        bytes_of(lambda data: data + b"train: {lora_r: 4}\n"),
        "train",
        "found 'train' a second time, the first is in line 4; keep one of them.",
    ),
    Bad(
        "a list for a number",
        instead("lora_r: 2", "lora_r: [2, 4]"),
        "train",
        "run.yaml, section 'train', 'lora_r': found a list, expected a whole number.",
    ),
    Bad(
        "a map for a text",
        instead("model_name_or_path: model", "model_name_or_path: {a: b}"),
        "train",
        "run.yaml, 'model_name_or_path': found a map, expected text.",
    ),
    Bad(
        "a text for a flag",
        instead("use_cpu: true", "use_cpu: 'true'"),
        "train",
        "run.yaml, section 'train', 'use_cpu': found the text 'true', expected true or false; write it without",
    ),
    Bad(
        "a number within quotes",
        added("train", "learning_rate: '2e-6'"),
        "train",
        "'learning_rate': found the text '2e-6', expected a number; write it without quotes.",
    ),
    Bad(
        "a number within quotes, nested",
        added("train", "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: '1e-7'}"),
        "train",
        "lr_scheduler_kwargs: found the text '1e-7' for min_lr, expected a number; take the quotes off.",
    ),
    Bad(
        "a number for a text",
        instead("dataset: pairs.json", "dataset: 2024"),
        "train",
        "run.yaml, section 'train', 'dataset': found 2024, expected text; put it in quotes.",
    ),
    Bad(
        "null for what cannot be null",
        added("train", "learning_rate: null"),
        "train",
        "run.yaml, section 'train', 'learning_rate': found null, expected a number; leave it out for its default.",
    ),
    Bad(
        "an empty text",
        instead("dataset: pairs.json", "dataset: ''"),
        "train",
        "dataset: found an empty text, expected a value; leave it out for its default.",
    ),
    Bad(
        "a control character",
        bytes_of(lambda data: data.replace(b"pairs.json", b"pairs\x07.json")),
        "train",
        "run.yaml, line 4: found the control character U+0007, expected text; delete it.",
    ),
    Bad(
        "a control character, escaped",
        instead("dataset: pairs.json", 'dataset: "pairs\\0.json"'),
        "train",
        "run.yaml, line 4: found the character U+0000 in a text, expected it on one line; delete it.",
    ),
    Bad(
        "a tab",
        bytes_of(
            lambda data: data.replace(b"        report_to", b"\t\treport_to").replace(b"{dataset", b"\n\tdataset")
        ),
        "train",
        "found character '\\t' that cannot start any token",
    ),
    Bad(
        "UTF-16",
        bytes_of(lambda data: data.decode().encode("utf-16")),
        "train",
        "run.yaml: found UTF-16 text, expected a recipe in UTF-8; save it in that encoding.",
    ),
    Bad(
        "Latin-1",
        bytes_of(lambda data: data.replace(b"pairs.json", "grün.json".encode("latin-1"))),
        "train",
        "that no text has, expected a recipe in UTF-8; save it in that encoding.",
    ),
    Bad(
        "an alias",
        bytes_of(lambda data: data.replace(b"dataset: pairs.json", b"dataset: &a x, adapter: *a")),
        "train",
        "run.yaml, line 4: found an alias; write the value out.",
    ),
    Bad(
        "a tag that runs code",
        instead("dataset: pairs.json", "dataset: !!python/object/apply:os.getcwd []"),
        "train",
        "run.yaml, line 4: found the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'.",
    ),
    Bad(
        "two documents",
        bytes_of(lambda data: data + b"---\ntrain: {lora_r: 4}\n"),
        "train",
        "found a second document, expected one.",
    ),
)
def test_bad_recipes(bad, world, capsys):
    check(bad, world, capsys)


OPTIONS = {
    "--output_dir null": "--output_dir: found null, expected text; leave it out for its default.",
    "--seed null": "--seed: found null, expected a whole number; leave it out for its default.",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps: found 0, expected a whole number of at least 1.",
    "--per_device_train_batch_size -2": "per_device_train_batch_size: found -2, expected a whole number of at least",
    "--checkpointing half": "checkpointing: found 'half', expected one of none, selective, every_N, full, offload, N",
    "--checkpointing every_1": "checkpointing: found 'every_1', expected one of none, selective, every_N, full, offl",
    "--lora_r 0": "lora_r: found 0, expected a whole number of at least 1.",
    "--lora_alpha 0": "lora_alpha: found 0, expected a whole number of at least 1.",
    "--max_steps 0": "max_steps: found 0, expected a whole number of at least 1, or -1 for num_train_epochs.",
    "--learning_rate nan": "learning_rate: found nan, expected a positive number.",
    "--learning_rate 1e999": "learning_rate: found inf, expected a positive number.",
    "--save_steps 0": "save_steps: found 0.0, expected a share of all steps below 1, or a whole number.",
    "--label_smoothing_factor 0.1": "label_smoothing_factor: found 0.1, expected 0.0: it smooths the token labels",
    "--do_eval": "do_eval: found True, expected False: a flag for scripts, which no trainer reads; use eval_strategy.",
    "--neftune_noise_alpha 5": "neftune_noise_alpha: found 5.0, expected None: policy and reference would get",
    "--push_to_hub": "push_to_hub: found True, expected False: no command uploads; when it is done, use hf upload",
    "--train_sampling_strategy group_by_length": "train_sampling_strategy: found 'group_by_length', expected another",
    "--lora_dropout 0.1": "lora_dropout: found 0.1 with disable_dropout true, expected 0; set disable_dropout",
    "--eval_strategy epoch": "eval_strategy: found 'epoch' without pairs to evaluate on, expected some; give",
    "--eval_fraction 0.5": "eval_fraction: found 0.5 with eval_strategy 'no', expected None; set eval_strategy to",
    "--lr_scheduler_type constant --warmup_steps 3": "warmup_steps: found 3.0 with lr_scheduler_type 'constant'",
    "--use_weighting maybe": "--use_weighting: found 'maybe', expected true or false; see bpo-fast train --help.",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_bad_options_of_training(options, world, capsys):
    check(Bad(options, nothing, f"train {options}", OPTIONS[options]), world, capsys)


def test_a_folder_as_the_recipe(world, capsys):
    from bpo_fast.cli import main as cli

    assert cli.main(["train", "--config", "images"]) == 2
    assert "--config: found the folder 'images', expected a file or one of " in capsys.readouterr().err
