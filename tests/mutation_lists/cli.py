"""Errors of options and recipes, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "the last of two equal keys of a recipe",
        "bpo_fast/cli/yaml_file.py",
        "            if key in lines:\n",
        "            if False:\n",
        "tests/cli/test_yaml_file.py::test_what_has_no_or_two_meanings_is_refused_with_its_line",
    ),
    Mutation(
        "numbers of a recipe read as text",
        "bpo_fast/cli/yaml_file.py",
        r"[0-9]+(?:\.[0-9]*)?)(?:[eE]",
        r"[0-9]+(?:\.[0-9]*))(?:[eE]",
        "tests/cli/test_recipe.py::test_options_win_over_the_section_and_the_section_over_the_shared_keys",
    ),
    Mutation(
        "a text of a recipe for a number or a flag",
        "bpo_fast/cli/recipe.py",
        "    elif not fits(value, hint):\n",
        "    elif False:\n",
        "tests/cli/test_recipe.py::test_mistakes_of_a_recipe",
    ),
    Mutation(
        "null for an option that has no null",
        "bpo_fast/cli/recipe.py",
        '        _check_null(f"--{name}", hints[name])\n',
        "",
        "tests/cli/test_recipe.py::test_mistakes_of_the_command_line",
    ),
    Mutation(
        "label_smoothing_factor and other options without effect",
        "bpo_fast/train/options.py",
        '        raise ValueError(f"{name}: found {value!r}, expected {defaults[name]!r}: {why}.")\n',
        "        pass\n",
        "tests/train/test_options.py::test_an_option_without_effect_is_refused_by_name",
    ),
    Mutation(
        "values of options without effect",
        "bpo_fast/train/options.py",
        "        if why := values.get(value):\n",
        "        if why := None:\n",
        "tests/train/test_options.py::test_a_value_without_effect_is_refused_by_name",
    ),
    Mutation(
        "any text as a flag that is set",
        "bpo_fast/train/options.py",
        "    _check_flags(config)\n",
        "",
        "tests/train/test_options.py::test_a_mistake_is_named",
    ),
    Mutation(
        "arguments of the scheduler unread",
        "bpo_fast/train/options.py",
        "    _check_scheduler(config)\n",
        "",
        "tests/train/test_options.py::test_a_mistake_is_named",
    ),
    Mutation(
        "lora_dropout switched off without a word",
        "bpo_fast/cli/options.py",
        "        if self.lora_dropout and config.disable_dropout:\n",
        "        if False:\n",
        "tests/cli/test_recipe.py::test_mistakes_of_training_options",
    ),
    Mutation(
        "numbers out of their range",
        "bpo_fast/runs/numbers.py",
        "or not allowed.holds(value):",
        "or False:",
        "tests/cli/test_recipe.py::test_mistakes_of_training_options",
    ),
    Mutation(
        "evaluations during training without pairs to evaluate on",
        "bpo_fast/cli/options.py",
        "        if evaluates and not given:\n",
        "        if False:\n",
        "tests/cli/test_recipe.py::test_mistakes_of_training_options",
    ),
]
