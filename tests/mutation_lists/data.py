"""Errors of files, images and scores, whose fixes `tests/mutations.py` takes out."""

from mutation_lists.mutation import Mutation

MUTATIONS = [
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
]
