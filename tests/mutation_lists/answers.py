"""Errors of generated answers and weakened images, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
    Mutation(
        "sampling seeded by the place in a batch",
        "bpo_fast/answers/generate.py",
        "range(len(prompts)) if seeds is None else seeds",
        "range(len(prompts))",
        "tests/answers/test_decode.py::test_batch_size_and_order_change_no_answer[sampled]",
    ),
    Mutation(
        "level tokens chosen by the rounding of a batch",
        "bpo_fast/answers/decode.py",
        "if row is not None and not certain[n]:",
        "if False:",
        "tests/answers/test_decode.py::test_rounding_that_goes_with_the_batch_changes_no_answer[greedy]",
    ),
    Mutation(
        "a nucleus whose border is taken for certain",
        "bpo_fast/answers/sampling.py",
        "    in_doubt = level | ((before - top_p).abs() <= near)\n",
        "    in_doubt = torch.zeros_like(level)\n",
        "tests/answers/test_sampling.py::test_a_draw_is_unsure_where_level_tokens_stand_at_the_border_of_the_nucleus",
    ),
    Mutation(
        "ended rows dropped from the cache alone",
        "bpo_fast/answers/decode.py",
        "self._mask, self._positions = self._mask[rows], self._positions[rows]",
        "self._mask, self._positions = self._mask[: len(rows)], self._positions[: len(rows)]",
        "tests/answers/test_decode.py::test_rows_that_end_are_dropped_and_the_others_go_on",
    ),
    Mutation(
        "answers decoded with all that a backward pass would need",
        "bpo_fast/answers/decode.py",
        "@torch.no_grad()\ndef decode(",
        "def decode(",
        "tests/answers/test_decode.py::test_rows_that_end_are_dropped_and_the_others_go_on",
    ),
    Mutation(
        "a family that needs more than one-dimensional positions decoded without",
        "bpo_fast/answers/plain.py",
        "known[with_images] = _alike(base, prompts.trial())",
        "known[with_images] = True",
        "tests/answers/test_decode.py::test_a_family_that_needs_more_answers_by_its_own_generate[Qwen2-VL]",
    ),
    Mutation(
        "noise that goes with the place in a batch",
        "bpo_fast/answers/prompts.py",
        "self.noise.sample_ids[number])",
        "number)",
        "tests/models/test_weakened_features.py::test_each_image_has_its_noise_at_each_step_in_one_map_or_in_tiles",
    ),
    Mutation(
        "tiles of an image with noise of the first tile",
        "bpo_fast/models/weakened_features.py",
        "return add_noise(x.reshape(1, -1), copy.step, **options).view_as(x)",
        "return torch.stack([add_noise(tile[None], copy.step, **options)[0] for tile in x])",
        "tests/models/test_weakened_features.py::test_each_image_has_its_noise_at_each_step_in_one_map_or_in_tiles",
    ),
    Mutation(
        "a vision tower run again for every step",
        "bpo_fast/models/weakened_features.py",
        "                stack.enter_context(_computed_once(find(model)))\n",
        "                find(model)\n",
        "tests/models/test_weakened_features.py::test_steps_of_an_image_share_what_is_below_their_noise",
    ),
    Mutation(
        "an image that leaks past the noise",
        "bpo_fast/bootstrap/image_weakened.py",
        "if not equal_logits(*(next_logits(prompts, row) for row in range(2))):",
        "if False:",
        "tests/bootstrap/test_image_weakened.py::test_an_image_that_reaches_the_decoder_past_the_noise_is_refused",
    ),
]
