"""Errors of the page of pairs, whose fixes `tests/mutations.py` takes out; most need a browser to be seen."""

from mutation_lists.mutation import Mutation

_PAGE = "bpo_fast/report/browse/page"
_BROWSER = "tests/report/browse/test_in_a_browser.py"

MUTATIONS = [
    Mutation(
        "texts of the data that run as HTML",
        f"{_PAGE}/card.js",
        "  element.append(...children.filter((child) => child !== null));\n",
        '  for (const child of children) element.insertAdjacentHTML("beforeend", child?.outerHTML ?? child ?? "");\n',
        f"{_BROWSER}::test_texts_of_the_data_stay_texts",
    ),
    Mutation(
        "pairs without a log-prob gap before those with the smallest",
        f"{_PAGE}/selection.js",
        "(Number.isNaN(keys[pair]) ? unknown : known).push(pair);",
        "known.push(pair);",
        f"{_BROWSER}::test_pairs_come_in_the_order_asked_for_and_those_without_a_value_last",
    ),
    Mutation(
        "a search that reads its words as a pattern",
        f"{_PAGE}/selection.js",
        r'term.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&")',
        "term",
        f"{_BROWSER}::test_a_search_finds_the_words_in_any_text_of_a_pair_and_in_its_id",
    ),
    Mutation(
        "a search that reads the first file of texts alone",
        f"{_PAGE}/selection.js",
        "file < number; file++",
        "file < 1; file++",
        f"{_BROWSER}::test_a_search_finds_the_words_in_any_text_of_a_pair_and_in_its_id",
    ),
    Mutation(
        "differences that are not the fewest",
        f"{_PAGE}/differences.js",
        "reach[place - 1] < reach[place + 1]",
        "reach[place - 1] > reach[place + 1]",
        f"{_BROWSER}::test_differences_are_the_fewest_and_keep_the_texts",
    ),
    Mutation(
        "a single word that is equal between others taken for different",
        f"{_PAGE}/differences.js",
        "equal[0] < Math.max(changed[0], changed[1])",
        "equal[0] <= Math.max(changed[0], changed[1]) + 1",
        f"{_BROWSER}::test_differences_of_a_pair_made_by_hand",
    ),
    Mutation(
        "a long word that makes the page wider than a phone",
        f"{_PAGE}/browse.css",
        "white-space: pre-wrap; overflow-wrap: anywhere;",
        "white-space: pre-wrap;",
        f"{_BROWSER}::test_it_fits_a_phone_and_every_text_stands_out_in_light_and_dark",
    ),
    Mutation(
        "a log-prob that is no number in a file of JSON",
        "bpo_fast/report/browse/records.py",
        "isinstance(value, int | float) and math.isfinite(value)",
        "isinstance(value, int | float)",
        "tests/report/browse/test_records.py::test_a_log_prob_that_is_no_number_leaves_the_gap_open",
    ),
    Mutation(
        "the thumbnail of an image that was changed since",
        "bpo_fast/report/browse/thumbnails.py",
        "status.st_size, status.st_mtime_ns",
        "status.st_size, None",
        "tests/report/browse/test_thumbnails.py::test_an_image_is_made_once_and_again_only_when_it_changes",
    ),
    Mutation(
        "a page over files that browse did not write",
        "bpo_fast/report/browse/write.py",
        '        claim_folder(folder, {"command": "browse"}, record=_RECORD)\n',
        "",
        "tests/report/browse/test_write.py::test_a_folder_of_something_else_is_left_alone",
    ),
    Mutation(
        "a page whose data are taken away before there is another",
        "bpo_fast/report/browse/write.py",
        "        shutil.rmtree(unfinished, ignore_errors=True)\n        with",
        '        [shutil.rmtree(data) for data in folder.glob("data-*")]\n        with',
        "tests/report/browse/test_write.py::test_a_run_that_fails_at_any_pair_leaves_the_page_of_before",
    ),
]
