from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from bpo_fast.bootstrap.kinds import KINDS
from bpo_fast.cli import names
from bpo_fast.cli.bootstrap_options import BootstrapArguments
from bpo_fast.cli.options import EvaluateArguments, MergeArguments, TrainArguments
from bpo_fast.cli.recipe import carried_options, parse_arguments
from bpo_fast.data.export import FORMS
from bpo_fast.models.lora import LORA_TARGET_MODULES
from bpo_fast.models.weaken import SCHEDULES, TARGETS
from bpo_fast.train.trainer import BPOConfig

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
BOOTSTRAP = ["--annotations", "a.json", "--image_folder", "images", "--output_dir", "out"]
MODEL = ["--model_name_or_path", "llava"]
UNKNOWN = r"^--noise_stepp: found an unknown name, expected an option of 'bootstrap'; did you mean --noise_step\?$"


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def bootstrap(*argv):
    return parse_arguments([BootstrapArguments], [*BOOTSTRAP, *argv], command="bootstrap")[0]


def train(*argv):
    options = ["--dataset", "pairs", "--output_dir", "out", "--use_cpu"]
    return parse_arguments([TrainArguments, BPOConfig], [*argv, *options], command="train")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_by_every_command(path):
    # bfloat16 autocast is refused without hardware for it
    train_arguments, config = train("--config", str(path), "--bf16", "false")
    questions = ["--questions", "q.json", "--kind", "pope", "--image_folder", "images", "--output_dir", "out"]
    evaluate = parse_arguments([EvaluateArguments], ["--config", str(path), *questions], command="evaluate")[0]
    models = {train_arguments.model_name_or_path, bootstrap("--config", str(path)).model_name_or_path}
    assert models == {evaluate.model_name_or_path}
    assert config.learning_rate > 0


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_llava_recipes_hold_the_papers_settings(size):
    arguments, config = train("--config", f"llava-1.5-{size}", "--bf16", "false")
    assert arguments.model_name_or_path == f"llava-hf/llava-1.5-{size}-hf"
    assert (arguments.lora_r, arguments.lora_dropout) == (64, 0.0)
    assert (config.learning_rate, config.num_train_epochs, config.beta, config.loss_type) == (
        2e-6,
        2,
        0.1,
        ["sigmoid"],
    )
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
    assert (config.lr_scheduler_type, config.warmup_steps, config.weight_decay) == ("cosine", 0.03, 0.0)
    assert config.max_length == 2048
    assert bootstrap("--config", f"llava-1.5-{size}").max_response_words == 350


def test_the_mixture_is_the_papers():
    options = parse_arguments([BootstrapArguments], ["--config", "bpo-mix"], command="bootstrap")[0].run_options()
    counts = {source.name: source.samples for source in options["sources"]}
    assert counts == {"sharegpt4v": 57_906, "llavar": 55_445, "llava_instruct": 54_359}
    assert [maker.kind for maker in options["kinds"]] == ["image_weakened", "error_injected"]


def test_each_of_several_values_is_one_of_the_choices(recipe):
    with pytest.raises(ValueError, match=r"'kinds': found 'error_injecte', expected one of 'image_weakened', 'err"):
        bootstrap(*recipe("model_name_or_path: x\nbootstrap: {kinds: [sft, error_injecte]}"))


def test_options_win_over_the_section_and_the_section_over_the_shared_keys(recipe):
    config = recipe(
        "model_name_or_path: llava\ndtype: float16\n"
        "bootstrap: {noise_step: 900, batch_size: 4, dtype: bfloat16, temperature: 5e-1, do_sample: true}\n"
        "train: {learning_rate: 3e-4, lora_target_modules: [q_proj, v_proj],\n"
        "  lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-7}, disable_dropout: true}\n"
    )
    arguments = bootstrap(*config, "--batch-size=2")
    assert (arguments.noise_step, arguments.batch_size, arguments.dtype) == (900, 2, "bfloat16")
    assert (arguments.temperature, arguments.do_sample) == (0.5, True)
    arguments, training = train(*config)
    assert (arguments.dtype, arguments.lora_target_modules) == ("float16", ["q_proj", "v_proj"])
    assert (training.learning_rate, training.lr_scheduler_kwargs) == (3e-4, {"min_lr": 1e-7})
    arguments, training = train(*config, "--no_disable_dropout", "--lora_target_modules", "o_proj")
    assert (arguments.lora_target_modules, training.disable_dropout) == (["o_proj"], False)


def test_a_loss_is_one_name_or_several():
    assert train(*MODEL)[1].loss_type == ["sigmoid"]
    assert train(*MODEL, "--loss_type", "ipo")[1].loss_type == ["ipo"]
    assert train(*MODEL, "--loss_type", "sigmoid", "sft")[1].loss_type == ["sigmoid", "sft"]


def test_null_is_none_on_either_side(recipe):
    config = recipe("model_name_or_path: llava\nbootstrap: {noise_step: null, max_response_words: 7}")
    assert (bootstrap(*config).noise_step, bootstrap(*config).max_response_words) == (None, 7)
    assert bootstrap(*config, "--max_response_words", "null").max_response_words is None
    assert bootstrap(*config, "--max-response-words=null").max_response_words is None
    assert bootstrap(*config, "--noise_step", "3").noise_step == 3
    assert bootstrap(*MODEL).noise_step == 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "bootstrap: {noise_stop: 3}",
            r"recipe\.yaml, section 'bootstrap', 'noise_stop': found an unknown name, expected an option of "
            r"'bootstrap'; did you mean noise_step\?$",
        ),
        (
            "model_name: x",
            r"recipe\.yaml, 'model_name': found an unknown name, expected a section or an option that all commands "
            r"share; did you mean model_name_or_path\?$",
        ),
        (
            "bootsrap: {noise_step: 3}",
            r"recipe\.yaml, 'bootsrap': found an unknown name, .*; did you mean bootstrap\?$",
        ),
        (
            "noise_step: 3",
            r"recipe\.yaml, 'noise_step': found outside a section, expected in one; put it under 'bootstrap:'\.$",
        ),
        ("bootstrap: 3", r"recipe\.yaml, section 'bootstrap': found 3, expected a map from options to values\.$"),
        ("- a", r"recipe\.yaml: found a list, expected a map from options to values\.$"),
        (
            "bootstrap:\n  seed: 1\n  seed: 2",
            r"recipe\.yaml, line 3: found 'seed' a second time, the first is in line 2",
        ),
        ("model_name_or_path: [a, b]", r"recipe\.yaml, 'model_name_or_path': found a list, expected text\.$"),
        *(
            (
                f"bootstrap: {{{option}}}",
                rf"recipe\.yaml, section 'bootstrap', '{option.split(':')[0]}': {sentence}\.$",
            )
            for option, sentence in [
                ("noise_step: many", "found the text 'many', expected a whole number or null"),
                ("noise_step: 1.5", r"found 1\.5, expected a whole number or null"),
                ("noise_step: true", "found true, expected a whole number or null"),
                ("noise_step: '3'", "found the text '3', expected a whole number or null; write it without quotes"),
                ("noise_step: [1, 2]", "found a list, expected a whole number or null"),
                ("seed: null", "found null, expected a whole number; leave it out for its default"),
                ("temperature: {a: 1}", "found a map, expected a number or null"),
                ("do_sample: 'true'", "found the text 'true', expected true or false; write it without quotes"),
                ("do_sample: yes", "found the text 'yes', expected true or false"),
                ("do_sample: 1", "found 1, expected true or false"),
                ("annotations: 2024", "found 2024, expected text or null; put it in quotes"),
                ("annotations: {a: b}", "found a map, expected text or null"),
                ("noise_target: image", "found 'image', expected one of 'features', 'pixels', 'projected'"),
            ]
        ),
    ],
)
def test_mistakes_of_a_recipe(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(*recipe(text), *MODEL)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--noise_stepp", "3"], UNKNOWN),
        (["--noise_stepp=3"], UNKNOWN),
        (["--noise_stepp", "null"], UNKNOWN),
        (["--zzzzzzzz", "3"], r"^--zzzzzzzz: found an unknown name, expected an option of 'bootstrap'\.$"),
        (["data.json"], "^bootstrap: found 'data.json' by itself, expected options as --name value"),
        (
            ["--noise_step", "many"],
            "^--noise_step: found 'many', expected a whole number; see bpo-fast bootstrap --help",
        ),
        (["--noise_step"], "^--noise_step: found another number of values, expected one argument; see bpo-fast"),
        (["--config"], "^--config: found no value, expected a recipe"),
        (["--config", "tiny", "--config=tiny"], "^--config: found it twice, expected one recipe"),
        (["--config", "/"], r"^--config: found the folder '/', expected a file or one of bpo-mix, llava-1\.5-13b"),
        (
            ["--config", "x" * 300],
            r"^--config: found a name that is no file's \(File name too long\), expected a recipe",
        ),
        (["--do_sample", "maybe"], "^--do_sample: found 'maybe', expected true or false; see"),
        (["--output_dir", "null"], r"^--output_dir: found null, expected text; leave it out for its default\.$"),
        (["--seed=null"], "^--seed: found null, expected a whole number; leave it out for its default"),
        (["--model_name_or_path", ""], "^model_name_or_path: found an empty text, expected a value; leave it out"),
        (["--adapter="], "^adapter: found an empty text, expected a value; leave it out for its default"),
        (["--batch_size", "0"], "^batch_size: found 0, expected a whole number of at least 1"),
        (["--max_new_tokens", "-1"], "^max_new_tokens: found -1, expected a whole number of at least 1"),
        (["--seed", "-1"], "^seed: found -1, expected a whole number from 0 to"),
        (["--temperature", "nan"], "^temperature: found nan, expected a positive number"),
        (["--top_p", "1.5"], r"^top_p: found 1\.5, expected a number above 0 and at most 1"),
        (["--max_samples", "0"], "^max_samples: found 0, expected a whole number of at least 1"),
    ],
)
def test_mistakes_of_the_command_line(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        bootstrap(*MODEL, *argv)


def test_missing_options_and_recipes():
    with pytest.raises(
        ValueError,
        match=r"^--model_name_or_path: found nothing, expected a value for each; see bpo-fast bootstrap --help",
    ):
        bootstrap()
    with pytest.raises(
        FileNotFoundError,
        match=r"^--config: found no file 'none', expected a file or one of bpo-mix, llava-1\.5-13b, llava-1\.5-7b, "
        r"llava15-13b-24gb, llava15-13b-a40, llava15-7b-16gb, tiny\.$",
    ):
        bootstrap("--config", "none")


def test_quantization_none_loads_unquantized():
    assert bootstrap(*MODEL).load_options() == {"dtype": "auto", "quantization": None, "trust_remote_code": False}
    assert bootstrap(*MODEL, "--trust_remote_code").load_options()["trust_remote_code"] is True
    assert bootstrap(*MODEL, "--quantization", "nf4").load_options()["quantization"] == "nf4"


def test_carried_options_are_those_that_the_next_command_needs():
    assert carried_options(["--trust_remote_code", "--seed", "1"]) == ["--trust_remote_code"]
    argv = ["--noise_step", "3", "--config=a.yaml", "--image_folder", "i", "--model-name-or-path", "m", "--dtype=auto"]
    assert carried_options(argv) == ["--config=a.yaml", "--model-name-or-path", "m", "--dtype=auto"]


def test_names_are_the_entries_of_the_librarys_tables():
    assert tuple(TARGETS) == names.NOISE_TARGETS
    assert tuple(SCHEDULES) == names.SCHEDULES
    assert tuple(LORA_TARGET_MODULES) == names.LORA_TARGET_MODULES
    assert tuple(KINDS) == names.KINDS
    assert tuple(FORMS) == names.EXPORT_FORMS


@pytest.mark.parametrize("arguments", [BootstrapArguments, TrainArguments, EvaluateArguments, MergeArguments])
def test_help_gives_every_option_a_sentence_and_its_default(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([arguments], ["--help"], command="bootstrap", description="What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert " What it does. " in text
    for item in fields(arguments):
        sentence = item.metadata["help"]
        assert sentence[0].isupper() or sentence.startswith("nf4 ")
        assert sentence.endswith(".")
        default = {"None": "null", "False": "false", "True": "true"}.get(str(item.default), item.default)
        assert f"{sentence} ({'required' if item.default is MISSING else f'default: {default}'})" in text
    assert "(default: None)" not in text


def test_what_a_recipe_shares_reaches_the_commands_that_have_it(recipe):
    config = recipe("model_name_or_path: llava\nimage_folder: images\nquantization: nf4\nmerge: {adapter: a}")
    (merging,) = parse_arguments([MergeArguments], config, command="merge")
    assert (merging.model_name_or_path, merging.adapter, merging.output_dir) == ("llava", "a", "bpo_output/merge")


def test_values_of_a_recipe_get_the_types_of_their_options(recipe):
    arguments, config = train(
        *recipe(
            "model_name_or_path: llava\ntrain: {lora_target_modules: all-linear, learning_rate: 2e-6,\n"
            "  loss_weights: 2, num_train_epochs: 1, save_strategy: no, report_to: [none], optim_args: null}"
        )
    )
    assert arguments.lora_target_modules == ["all-linear"]
    assert (config.learning_rate, config.loss_weights, config.report_to) == (2e-6, [2], [])
    assert config.save_strategy == "no"
    assert type(config.num_train_epochs) is float


def test_every_output_folder_has_a_default_beside_the_others():
    assert bootstrap_defaults() == {
        "bootstrap": "bpo_output/bootstrap",
        "evaluate": "bpo_output/evaluate",
        "merge": "bpo_output/merge",
        "train": "bpo_output/train",
    }


def bootstrap_defaults():
    classes = {"bootstrap": BootstrapArguments, "evaluate": EvaluateArguments, "merge": MergeArguments}
    classes["train"] = BPOConfig
    return {name: item.default for name, kind in classes.items() for item in fields(kind) if item.name == "output_dir"}


PAIRS = ["--eval_dataset", "other"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_r", "0"], "^lora_r: found 0, expected a whole number of at least 1"),
        (["--lora_alpha", "0"], "^lora_alpha: found 0, expected a whole number of at least 1"),
        (["--lora_dropout", "1"], r"^lora_dropout: found 1\.0, expected a number in \[0, 1\)"),
        (
            ["--lora_dropout", "0.1"],
            r"^lora_dropout: found 0\.1 with disable_dropout true, expected 0; set disable_dr",
        ),
        (["--eval_fraction", "1"], r"^eval_fraction: found 1\.0, expected a number between 0 and 1"),
        (
            ["--eval_fraction", "0.1"],
            r"^eval_fraction: found 0\.1 with eval_strategy 'no', expected None; set eval_str",
        ),
        (PAIRS, "^eval_dataset: found 'other' with eval_strategy 'no', expected None; set eval_strategy"),
        ([*PAIRS, "--eval_fraction", "0.1"], "^eval_fraction: found it beside eval_dataset, expected one of them"),
        (
            ["--eval_strategy", "epoch"],
            "^eval_strategy: found 'epoch' without pairs to evaluate on, expected some; give",
        ),
        (
            ["--lora_target_modules", "all-linear", "q_proj"],
            r"^lora_target_modules: found \['all-linear', 'q_proj'\], expected all-linear by itself or names",
        ),
        (["--bf16_full_eval"], "^bf16_full_eval: found true, expected false, as it leaves evaluations during trai"),
        (["--eval_on_start"], "^eval_on_start: found True without pairs to evaluate on, expected some; give"),
    ],
)
def test_mistakes_of_training_options(argv, message):
    with pytest.raises(ValueError, match=message):
        train(*MODEL, *argv)


def test_evaluation_during_training_has_its_pairs():
    arguments, config = train(*MODEL, "--eval_strategy", "steps", "--eval_fraction", "0.1")
    assert (arguments.eval_fraction, arguments.eval_dataset, config.eval_strategy) == (0.1, None, "steps")
    assert train(*MODEL, *PAIRS, "--eval_on_start")[0].eval_dataset == "other"
    assert train(*MODEL, "--lora_dropout", "0.1", "--disable_dropout", "false")[0].lora_dropout == 0.1
    assert train(*MODEL, "--strict")[1].strict


def test_every_linear_is_a_word_of_its_own():
    assert train(*MODEL)[0].target_modules is None
    assert train(*MODEL, "--lora_target_modules", "q_proj")[0].target_modules == ["q_proj"]
    assert train(*MODEL, "--lora_target_modules", "all-linear")[0].target_modules == "all-linear"


def test_a_path_in_the_package_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(bootstrap("--config", "tiny").model_name_or_path)
    assert path.is_absolute()
    assert (path / "model.safetensors").is_file()
