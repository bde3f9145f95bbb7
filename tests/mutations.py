"""Takes the fix of each known error out again and sees its regression test fail: `python tests/mutations.py`.

The errors are ones that public kernels and trainers have had. Each runs in a copy of the source tree, which is left
alone; a test that passes without its fix ends the script with code 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = "tests/kernels/interpreted/kernel_checks.py"
COPIED = ("bpo_fast", "kernels", "recipes", "tests", "examples", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """In `file`, `fixed` becomes `broken`; then `test` must fail."""

    error: str
    file: str
    fixed: str
    broken: str
    test: str


MUTATIONS = [
    Mutation(
        "true-class gradient rounded before the -1 (Triton)",
        "kernels/sequence_logps_backward.py",
        "tl.where(columns == target.to(tl.int32), 1.0 - p, -p) * grad",
        "tl.where(columns == target.to(tl.int32), 1.0 - p.to(tl.bfloat16).to(tl.float32), -p) * grad",
        f"{INTERPRETED}::test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero",
    ),
    Mutation(
        "true-class gradient rounded before the -1 (PyTorch)",
        "bpo_fast/ops/token_logps.py",
        "rows.exp_().mul_(-scale / log_sum.exp())",
        "rows.exp_().mul_(-scale / log_sum.exp()).copy_(rows.to(logits.dtype))",
        "tests/ops/test_token_logps.py::test_gradient_of_a_nearly_certain_target_is_not_rounded_to_zero",
    ),
    Mutation(
        "columns past the vocabulary add exp(0)",
        "kernels/rows.py",
        'x = tl.load(logits + columns, mask=inside, other=float("-inf"))',
        "x = tl.load(logits + columns, mask=inside, other=0.0)",
        f"{INTERPRETED}::test_token_logps",
    ),
    Mutation(
        "columns past the vocabulary add exp(0) (from hidden states)",
        "kernels/rows.py",
        'x = tl.load(logits + columns, mask=inside, other=float("-inf"))',
        "x = tl.load(logits + columns, mask=inside, other=0.0)",
        f"{INTERPRETED}::test_linear_token_logps",
    ),
    Mutation(
        "row offsets of 32 bits",
        "kernels/sequence_logps.py",
        "    row = tl.program_id(0).to(tl.int64)\n    plane",
        "    row = tl.program_id(0)\n    plane",
        f"{INTERPRETED}::test_rows_beyond_two_to_the_31_elements",
    ),
    Mutation(
        "labels read as if they were packed and aligned",
        "bpo_fast/ops/token_logps.py",
        "        targets.contiguous(),\n",
        "        targets,\n",
        f"{INTERPRETED}::test_targets_that_are_a_view_at_an_odd_offset",
    ),
    Mutation(
        "a result that changes with the chunk (gradient of the head)",
        "bpo_fast/ops/head_products.py",
        "_multiply(gradient.t(), hidden.to(gradient.dtype), grad_weight, add=True)",
        "_multiply(gradient.t(), hidden.to(gradient.dtype), grad_weight, add=False)",
        "tests/ops/test_linear_token_logps.py::test_the_chunk_changes_nothing_beyond_rounding",
    ),
    Mutation(
        "a result that changes with the chunk (mean over each)",
        "bpo_fast/ops/head_sweep.py",
        "rows[chunk] = times_head(gradient, head.weight)",
        "rows[chunk] = times_head(gradient, head.weight) / len(gradient)",
        "tests/ops/test_linear_token_logps.py::test_the_chunk_changes_nothing_beyond_rounding",
    ),
    Mutation(
        "the loss stuck at ln 2",
        "bpo_fast/ops/head_sweep.py",
        'grads["hidden"] = (grad[:, None] * rows).to(ctx.hidden_dtype)',
        'grads["hidden"] = torch.zeros_like(rows, dtype=ctx.hidden_dtype)',
        "tests/losses/test_dpo.py::test_loss_leaves_ln_2_when_trained",
    ),
    Mutation(
        "the first loss not ln 2 (dropout left on)",
        "bpo_fast/train/trainer.py",
        "        if args.disable_dropout:\n",
        "        if False:\n",
        "tests/train/test_trainer.py::test_the_first_step_is_ln_2_with_margins_of_zero",
    ),
    Mutation(
        "the first loss not ln 2 (reference in another precision)",
        "bpo_fast/ops/head_sweep.py",
        "    both[:count], both[half : half + count] = hidden, ref_hidden\n",
        "    both[:count], both[half : half + count] = hidden, ref_hidden.half()\n",
        "tests/losses/test_dpo.py::test_policy_equal_to_reference_gives_ln_2_and_margins_of_exactly_zero",
    ),
    Mutation(
        "image tokens off by one",
        "bpo_fast/train/collator.py",
        "torch.nonzero(packing.input_ids == self.image_token_id).flatten()",
        "torch.nonzero(packing.input_ids == self.image_token_id).flatten() + 1",
        "tests/train/test_trainer.py::test_parity_with_trl",
    ),
    Mutation(
        "image tokens miscounted without a word",
        "bpo_fast/models/packed_forward.py",
        "        if len(image_features) != len(image_rows):\n",
        "        if False:\n",
        "tests/models/test_packed_forward.py::test_image_rows_that_do_not_match_are_named",
    ),
    Mutation(
        "a 16-bit image that comes out white",
        "bpo_fast/data/images.py",
        '    if image.mode.startswith("I;16"):\n',
        "    if False:\n",
        "tests/data/test_images.py::test_16_bits_become_8_and_not_white",
    ),
    Mutation(
        "a data set that decodes an image otherwise than the reader",
        "bpo_fast/data/pairs.py",
        '"images": List(_UprightImage())',
        '"images": List(Image(mode="RGB"))',
        "tests/data/test_images.py::test_a_data_set_gives_what_the_reader_gives",
    ),
    Mutation(
        "a transparent image on black",
        "bpo_fast/data/images.py",
        "    if image.has_transparency_data:\n",
        "    if False:\n",
        "tests/data/test_images.py::test_what_is_transparent_lies_on_white",
    ),
    Mutation(
        "an image path that leaves its folder",
        "bpo_fast/data/images.py",
        "    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):\n",
        "    if False:\n",
        "tests/data/test_images.py::test_paths_that_leave_the_folder",
    ),
    Mutation(
        "an image link that leaves its folder",
        "bpo_fast/data/images.py",
        "os.path.realpath(path)).is_relative_to(os.path.realpath(root))",
        "os.path.abspath(path)).is_relative_to(os.path.abspath(root))",
        "tests/data/test_images.py::test_paths_that_leave_the_folder",
    ),
    Mutation(
        "chosen equal to rejected",
        "bpo_fast/train/collator.py",
        "        if len(branches) == 2 and branches[0] == branches[1]:\n",
        "        if False:\n",
        "tests/train/test_collator.py::test_the_same_answers_are_no_preference",
    ),
    Mutation(
        "an image's placeholder typed in an answer",
        "bpo_fast/models/prompt.py",
        '        check_content(answer, "answer", tags)\n',
        "",
        "tests/train/test_check_pairs.py::test_each_bad_row_is_listed_with_its_reason",
    ),
    Mutation(
        "an unknown role of a conversation",
        "bpo_fast/models/conversation.py",
        "        if role not in ROLES:\n",
        "        if False:\n",
        "tests/models/test_prompt.py::test_what_is_no_conversation_is_one_sentence",
    ),
    Mutation(
        "an option's text taken for true: average_logps='no'",
        "bpo_fast/losses/config.py",
        "            if not isinstance(value := getattr(self, name), bool):\n",
        "            if not isinstance(value := getattr(self, name), object):\n",
        "tests/losses/test_mistakes.py::test_errors_name_the_argument",
    ),
    Mutation(
        "a sequence without a label",
        "bpo_fast/losses/dpo.py",
        "    _check_labelled(labels)\n",
        "",
        "tests/losses/test_mistakes.py::test_errors_name_the_argument",
    ),
    Mutation(
        "an empty synonym, which every text holds",
        "bpo_fast/evaluate/chair.py",
        "                if not isinstance(phrase, str) or not phrase.strip():\n",
        "                if not isinstance(phrase, str):\n",
        "tests/evaluate/test_chair.py::test_mistakes_are_one_sentence",
    ),
    Mutation(
        "a key twice in a JSON file",
        "bpo_fast/runs/files.py",
        "    if len(value) < len(pairs):\n",
        "    if False:\n",
        "tests/runs/test_files.py::test_a_damaged_file_is_one_sentence_with_the_place",
    ),
    Mutation(
        "noise ids that are cut to whole numbers",
        "bpo_fast/models/weaken.py",
        '        check_indices("sample_ids", sample_ids, ("B",), dtypes=INTEGER_DTYPES, otherwise="a list of ints")\n',
        "        sample_ids = torch.as_tensor(sample_ids)\n",
        "tests/models/test_weaken.py::test_ids_are_a_list_or_a_tensor_of_whole_numbers",
    ),
    Mutation(
        "a check before training that moves its random numbers",
        "bpo_fast/train/check_pairs.py",
        "        generator=torch.Generator(),  # training's own random numbers stay as they are\n",
        "",
        "tests/train/test_check_pairs.py::test_training_draws_the_same_numbers_after_it",
    ),
    Mutation(
        "a check of pairs that forgets an image file's change",
        "bpo_fast/train/check_pairs.py",
        "    return [status.st_size, status.st_mtime_ns]",
        "    return [status.st_size]",
        "tests/train/test_check_pairs.py::test_what_changed_is_tried_again",
    ),
    Mutation(
        "an adapter whose tensor names do not fit",
        "bpo_fast/models/load.py",
        "        if keys:\n",
        "        if False:\n",
        "tests/models/test_load.py::test_an_adapter_that_does_not_fit_is_told_in_a_sentence",
    ),
    Mutation(
        "a checkpoint that lacks tensors",
        "bpo_fast/models/load.py",
        "    if missing:\n",
        "    if False:\n",
        "tests/models/test_load.py::test_a_model_that_is_not_whole_is_told_in_a_sentence",
    ),
    Mutation(
        "a checkpoint with more layers than its configuration",
        "bpo_fast/models/load.py",
        "    if left:\n",
        "    if False:\n",
        "tests/models/test_load.py::test_a_checkpoint_with_more_layers_than_its_configuration_is_refused",
    ),
    Mutation(
        "code of a model's own taken for configuration",
        "bpo_fast/models/weights.py",
        'if "auto_map" in read_config(file) and not trust_remote_code:',
        "if False:",
        "tests/models/test_load.py::test_a_processor_that_is_not_whole_is_told_in_a_sentence",
    ),
    Mutation(
        "an adapter that went to NaN",
        "bpo_fast/models/weights.py",
        "if tensor.is_floating_point() and not tensor.isfinite().all():",
        "if False:",
        "tests/models/test_weights.py::test_an_adapter_that_went_to_nan_is_refused",
    ),
    Mutation(
        "an adapter known by its path only",
        "bpo_fast/models/weights.py",
        'digest.update(hashlib.file_digest(opened, "sha256").digest())',
        "pass",
        "tests/models/test_weights.py::test_an_adapter_trained_anew_into_its_folder_has_another_fingerprint",
    ),
    Mutation(
        "a loaded adapter of which a sample is read",
        "bpo_fast/models/weights.py",
        "if not whole and len(values) > _VALUES:",
        "if len(values) > 16:\n            values = values[:16]\n        if len(values) > _VALUES:",
        "tests/models/test_weights.py::test_of_a_loaded_adapter_every_value_counts_but_only_while_it_is_active",
    ),
    Mutation(
        "vision targets by a regular expression",
        "bpo_fast/models/lora.py",
        '        _check_inside("target_modules", targets, chosen, linears)\n',
        "",
        "tests/models/test_lora.py::test_what_is_not_trained_exactly_is_refused_by_name",
    ),
    Mutation(
        "vision targets of a user's own adapter",
        "bpo_fast/models/lora.py",
        "outside = [path for path in layers if path not in inside]",
        "outside = []",
        "tests/models/test_lora.py::test_a_users_own_adapter_that_reaches_further_is_refused",
    ),
    Mutation(
        "an adapter on the embeddings or the head",
        "bpo_fast/models/lora.py",
        "apart = {part for table in tables for part in table.modules()}",
        "apart = set()",
        "tests/models/test_lora.py::test_a_users_own_adapter_that_reaches_further_is_refused",
    ),
    Mutation(
        "target names that match nothing",
        "bpo_fast/models/lora.py",
        '    _check_names("target_modules", names, linears, f"linears in {where}")\n',
        "",
        "tests/models/test_lora.py::test_what_is_not_trained_exactly_is_refused_by_name",
    ),
    Mutation(
        "layers to transform forgotten where they are number 0",
        "bpo_fast/models/lora.py",
        "if peft_config.layers_to_transform not in (None, []):",
        "if peft_config.layers_to_transform:",
        "tests/models/test_lora.py::test_the_adapter_is_on_just_what_the_options_name_in_the_decoder",
    ),
    Mutation(
        "an initialisation that changes the base (PiSSA, OLoRA)",
        "bpo_fast/models/lora.py",
        'if init is not True and init != "gaussian":',
        "if False:",
        "tests/models/test_lora.py::test_what_is_not_trained_exactly_is_refused_by_name",
    ),
    Mutation(
        "an adapter that scales itself to nothing",
        "bpo_fast/models/lora.py",
        "not 0 < alpha < math.inf",
        "not 0 <= alpha < math.inf",
        "tests/models/test_lora.py::test_what_is_not_trained_exactly_is_refused_by_name",
    ),
    Mutation(
        "a trained adapter of another name taken for a fresh one",
        "bpo_fast/models/lora.py",
        "if not _adds_zero(module, adapter):",
        'if adapter == "default" and not _adds_zero(module, adapter):',
        "tests/models/test_lora.py::test_a_users_own_fresh_adapter_is_taken_and_a_trained_one_refused_whatever_its_name",
    ),
    Mutation(
        "parameters of the base that are trained, too",
        "bpo_fast/models/lora.py",
        "    if foreign:\n",
        "    if False:\n",
        "tests/models/test_lora.py::test_a_users_own_adapter_that_reaches_further_is_refused",
    ),
    Mutation(
        "a decoder that drops the packing on its way trained wrongly",
        "bpo_fast/models/packed_forward.py",
        "    if calls.unpacked:\n",
        "    if False:\n",
        "tests/models/test_layers.py::test_layers_without_the_packing_are_refused",
    ),
    Mutation(
        "layers that call no attention trained wrongly",
        "bpo_fast/models/packed_forward.py",
        "    if calls.packed != num_layers:\n",
        "    if False:\n",
        "tests/models/test_layers.py::test_layers_without_the_packing_are_refused",
    ),
    Mutation(
        "attention sinks left out",
        "bpo_fast/models/attention.py",
        "        calls.ignored.update(name for name in tensors if name not in _POSITIONS)\n",
        "",
        "tests/models/test_layers.py::test_layers_without_the_packing_are_refused",
    ),
    Mutation(
        "a window that closes in the mask alone",
        "bpo_fast/models/packed_forward.py",
        "    _check_reaches(decoder.config, packing)\n",
        "",
        "tests/models/test_layers.py::test_sequences_beyond_a_reach_are_refused",
    ),
    Mutation(
        "a family that needs more than packed rows have trained wrongly",
        "bpo_fast/train/start_check.py",
        "    if mean <= most and reason is None:\n",
        "    if reason is None:\n",
        "tests/train/test_families.py::test_other_families_are_refused_by_name_and_size",
    ),
    Mutation(
        "a family that differs in images let through by a first batch without any",
        "bpo_fast/train/start_check.py",
        "        if collator.image_token_id is not None and not any(map(_shows_an_image, examples)):\n",
        "        if False:\n",
        "tests/train/test_families.py::test_a_first_batch_without_images_hides_nothing",
    ),
    Mutation(
        "a difference hidden by the rounding of half precision",
        "bpo_fast/train/start_check.py",
        "        if _can_be_float32(base):\n",
        "        if False:\n",
        "tests/train/test_families.py::test_other_families_are_refused_in_half_precision_with_small_weights",
    ),
    Mutation(
        "a state beside attention let through by small weights",
        "bpo_fast/train/start_check.py",
        "            return output.token_logps, _convolutions(base.get_decoder())\n",
        "            return output.token_logps, None\n",
        "tests/train/test_families.py::test_convolutions_are_refused_however_small_their_weights",
    ),
    Mutation(
        "a log-prob that is no number let through",
        "bpo_fast/train/start_check.py",
        "    if mean <= most and reason is None:\n",
        "    if not mean > most and reason is None:\n",
        "tests/train/test_start_check.py::test_a_refusal_leaves_all_as_it_was",
    ),
    Mutation(
        "packed rows compared with packed attention's own kind of attention",
        "bpo_fast/models/packed_forward.py",
        "    decoder.set_attn_implementation(model._unpacked_attention)\n",
        "",
        "tests/train/test_start_check.py::test_the_model_is_compared_with_the_attention_it_was_loaded_with",
    ),
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
        "scores of an adapter that was trained again into the same folder",
        "bpo_fast/runs/folder.py",
        'if there["weights"] == here["weights"] or',
        'if there["path"] == here["path"] or',
        "tests/evaluate/test_run.py::test_an_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "responses of a model that was changed in its folder",
        "bpo_fast/answers/given.py",
        "path, weights = str(self.model), weights_fingerprint(self.model)",
        'path, weights = str(self.model), ""',
        "tests/bootstrap/test_run.py::test_a_model_or_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "responses of another data type",
        "bpo_fast/answers/given.py",
        '"dtype": str(dtype).removeprefix("torch."),',
        '"dtype": None,',
        "tests/bootstrap/test_run.py::test_a_model_or_adapter_trained_again_into_the_same_folder_is_another_run",
    ),
    Mutation(
        "a damaged line of a journal dropped with all behind it",
        "bpo_fast/runs/journal.py",
        '                if not line.endswith(b"\\n") and _is_cut_off(line):\n',
        "                if not line.startswith(_START):\n",
        "tests/runs/test_journal.py::test_any_other_damage_is_named_and_nothing_is_dropped",
    ),
    Mutation(
        "half a batch of a killed run kept, and the rest answered in another batch",
        "bpo_fast/runs/journal.py",
        "                if not left:\n",
        "                if True:\n",
        "tests/runs/test_journal.py::test_cut_at_any_byte_it_goes_on_with_whole_batches_and_ends_the_same",
    ),
    Mutation(
        "pairs of an earlier selection kept beside new responses",
        "bpo_fast/answers/batches.py",
        "                    (folder / name).unlink(missing_ok=True)\n",
        "                    pass\n",
        "tests/bootstrap/test_run.py::test_a_run_that_goes_on_is_unfinished_until_its_pairs_are_whole",
    ),
    Mutation(
        "the answer to another image of the same name",
        "bpo_fast/answers/batches.py",
        "    return fingerprint([question.id, question.image, question.question, size])\n",
        "    return fingerprint([question.id, question.image, question.question])\n",
        "tests/answers/test_batches.py::test_an_image_is_known_by_name_and_size",
    ),
    Mutation(
        "a demo of another model in the same folder is taken for this one's",
        "bpo_fast/demo/pipeline.py",
        '"model": weights_fingerprint(model_path)',
        '"model": "tiny"',
        "tests/demo/test_pipeline.py::test_a_run_is_known_by_what_its_model_holds_not_by_its_path",
    ),
    Mutation(
        "a description with words after its end counts as whole",
        "bpo_fast/demo/grade.py",
        "_DESCRIPTION.fullmatch(answer)",
        "_DESCRIPTION.match(answer)",
        "tests/demo/test_grade.py::test_broken_answers_keep_the_grades_of_what_they_say",
    ),
]


def run(mutation, tree):
    """Whether the mutation's test passes in `tree`, once with its fix and once without."""
    path = tree / mutation.file
    text = path.read_text()
    results = []
    for source in (text, text.replace(mutation.fixed, mutation.broken)):
        path.write_text(source)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if mutation.test.startswith(INTERPRETED):
            environment["TRITON_INTERPRET"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.test]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        # Code 1 is a failed test and a negative one a crash, as of an address that wrapped; 2 and more: no test ran.
        if done.returncode > 1:
            raise RuntimeError(f"{mutation.test} did not run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
        results.append(done.returncode == 0)
    path.write_text(text)
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only errors whose name holds this text")
    options = parser.parse_args(arguments)
    chosen = [mutation for mutation in MUTATIONS if options.match in mutation.error]
    width = max(len(mutation.error) for mutation in chosen)
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        for number, mutation in enumerate(chosen, start=1):
            start = time.perf_counter()
            with_fix, without = run(mutation, tree)
            good = with_fix and not without
            silent += not good
            verdict = "passes with its fix, fails without" if good else f"with fix {with_fix}, without {without}"
            seconds = time.perf_counter() - start
            print(f"[{number}/{len(chosen)}] {mutation.error:<{width}}  {verdict}  ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} errors, {silent} not caught")
    return 1 if silent else 0


if __name__ == "__main__":
    sys.exit(main())
