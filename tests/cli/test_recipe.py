from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from bpo_fast.cli.options import BootstrapArguments, EvaluateArguments, TrainArguments
from bpo_fast.cli.recipe import carried_options, parse_arguments
from bpo_fast.evaluate.run import SCORERS
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


def test_options_win_over_the_section_and_the_section_over_the_shared_keys(recipe):
    config = recipe(
        "model_name_or_path: llava\ndtype: float16\n"
        "bootstrap: {noise_step: 900, batch_size: 4, dtype: bfloat16, temperature: 5e-1, do_sample: true}\n"
        "train: {learning_rate: 3e-4, lora_target_modules: [q_proj, v_proj], lr_scheduler_kwargs: {a: 1},\n"
        "  disable_dropout: true}\n"
    )
    arguments = bootstrap(*config, "--batch-size=2")
    assert (arguments.noise_step, arguments.batch_size, arguments.dtype) == (900, 2, "bfloat16")
    assert (arguments.temperature, arguments.do_sample) == (0.5, True)
    arguments, training = train(*config)
    assert (arguments.dtype, arguments.lora_target_modules) == ("float16", ["q_proj", "v_proj"])
    assert (training.learning_rate, training.lr_scheduler_kwargs) == (3e-4, {"a": 1})
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
        ("a: [1\nb: 2", r"recipe\.yaml: found .* at line 2, column \d+, expected YAML\.$"),
        ("bootstrap: {noise_step: many}", "^--noise_step: found 'many', expected int; see bpo-fast bootstrap --help"),
        ("bootstrap: {noise_step: 1.5}", r"^--noise_step: found '1\.5', expected int; see"),
        ("bootstrap: {noise_step: [1, 2]}", "^bootstrap: found '2' by itself, expected options as --name value"),
        (
            "bootstrap: {noise_target: image}",
            "^--noise_target: found 'image', expected one of 'features', 'pixels', 'projected'; see",
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
        (["--noise_step", "many"], "^--noise_step: found 'many', expected int; see bpo-fast bootstrap --help"),
        (["--noise_step"], "^--noise_step: found another number of values, expected one argument; see bpo-fast"),
        (["--config"], "^--config: found no value, expected a recipe"),
    ],
)
def test_mistakes_of_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(*MODEL, *argv)


def test_missing_options_and_recipes():
    with pytest.raises(
        ValueError,
        match=r"^--model_name_or_path: found nothing, expected a value for each; see bpo-fast bootstrap --help",
    ):
        bootstrap()
    with pytest.raises(
        FileNotFoundError,
        match=r"^--config: found no file 'none', expected a file or one of llava-1\.5-13b, llava-1\.5-7b, tiny\.$",
    ):
        bootstrap("--config", "none")


def test_quantization_none_loads_unquantized():
    assert bootstrap(*MODEL).load_options() == {"dtype": "auto", "quantization": None}
    assert bootstrap(*MODEL, "--quantization", "nf4").load_options()["quantization"] == "nf4"


def test_carried_options_are_those_that_the_next_command_needs():
    argv = ["--noise_step", "3", "--config=a.yaml", "--image_folder", "i", "--model-name-or-path", "m", "--dtype=auto"]
    assert carried_options(argv) == ["--config=a.yaml", "--model-name-or-path", "m", "--dtype=auto"]


@pytest.mark.parametrize(
    ("arguments", "option", "table"),
    [
        (BootstrapArguments, "noise_target", TARGETS),
        (BootstrapArguments, "schedule", SCHEDULES),
        (EvaluateArguments, "kind", SCORERS),
    ],
)
def test_choices_are_the_entries_of_the_librarys_tables(arguments, option, table):
    (metadata,) = (item.metadata for item in fields(arguments) if item.name == option)
    assert metadata["choices"] == list(table)


@pytest.mark.parametrize("arguments", [BootstrapArguments, TrainArguments, EvaluateArguments])
def test_help_gives_every_option_a_sentence_and_its_default(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([arguments], ["--help"], command="bootstrap", description="What it does.")
    text = " ".join(capsys.readouterr().out.split())
    assert " What it does. " in text
    for item in fields(arguments):
        sentence = item.metadata["help"]
        assert sentence[0].isupper() or sentence.startswith("nf4 ")
        assert sentence.endswith(".")
        default = "null" if item.default is None else item.default
        assert (sentence if item.default is MISSING else f"{sentence} (default: {default})") in text
    assert "(default: None)" not in text
