"""The page stands alone, escapes what it is given, and fits a phone."""

import base64
import io
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image
from reading import read_page

from bpo_fast.report import page

WICKED = '<i a="1">&'


def drawing(*, width):
    return Figure(figsize=(width / 96, 1))


def png():
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "png")
    return stream.getvalue()


def test_every_text_is_escaped():
    content = [
        page.number_cards([(WICKED, WICKED, "#123456")]),
        page.section(WICKED, WICKED, page.table([WICKED], [[WICKED]])),
        page.charts([page.chart(WICKED, drawing, width=400)]),
        page.sample_cards([(png(), WICKED, {WICKED: page.marked(WICKED, [])})]),
    ]
    source = page.page(WICKED, WICKED, content)
    read = read_page(source)
    assert "i" not in read.tags
    # title, heading, paragraph; card (2); section (2), table (2); caption; sample (2)
    assert read.text.count(WICKED) == 12
    assert read.alts == [WICKED, WICKED]


def test_a_section_without_text_has_no_paragraph():
    assert page.section("a", "", "<hr>") == "<section><h2>a</h2><hr></section>"


def test_a_table_without_header_has_only_its_rows():
    assert page.table((), [("a", 1)]) == '<div class="scroll"><table><tr><td>a</td><td>1</td></tr></table></div>'


def test_a_chart_is_drawn_for_a_wide_page_and_for_a_phone_at_two_dots_a_pixel():
    read = read_page(page.chart("a", drawing, width=400))
    assert read.widths == [page.NARROW, 400]
    for image, width in zip(read.images, read.widths, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/png;base64,")))) as drawn:
            assert drawn.width == 2 * width


def test_a_chart_shrinks_with_its_card_instead_of_being_cut():
    rules = dict(re.findall(r"^([^{\n]+) { (.*) }$", page.STYLE, flags=re.MULTILINE))
    assert "max-width: 100%; height: auto;" in rules[".scroll img"]
    # The figure has a width of its own, or the image's 100 % would be of nothing.
    assert rules["figure"] == "margin: 0; max-width: 100%;"
    assert '<figure style="width: 400px">' in page.chart("a", drawing, width=400)


def test_a_chart_on_a_phone_of_360_pixels_needs_no_scrolling():
    phone = page.STYLE.split("@media")[1]
    main = re.search(r"main { padding: [\d.]+rem ([\d.]+)rem", phone)[1]
    section = re.search(r"section { padding: ([\d.]+)rem; }", phone)[1]
    borders = 2
    assert 360 - borders - 2 * 16 * (float(main) + float(section)) >= page.NARROW


@pytest.mark.parametrize("unit", ["rem", "px"])
def test_no_text_of_the_page_is_smaller_than_12_pixels(unit):
    sizes = re.findall(rf"(?:font|font-size):[^;]*?([\d.]+){unit}", page.STYLE)
    assert sizes
    assert min(map(float, sizes)) * {"rem": 16, "px": 1}[unit] >= 12


def test_marked_takes_whole_words_of_any_case_and_the_longest_first():
    marked = page.marked("A red star & two Blue Squares, bluer.", ["blue square", "blue squares", "blue"])
    assert marked == "A red star &amp; two <mark>Blue Squares</mark>, bluer."
    assert page.marked("A red star.", []) == "A red star."


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a b c", "a b c", "a b c"),
        ("a x y c", "a b c", "a <mark>x y</mark> c"),
        ("a c", "a b c", "a c"),
        ("a b c", "", "<mark>a b c</mark>"),
        ("", "a", ""),
        ("<i> b", "b", "<mark>&lt;i&gt;</mark> b"),
        ("b a", "a b", "<mark>b</mark> a"),
    ],
)
def test_words_that_the_other_text_has_not_there_are_marked(text, other, expected):
    assert page.marked_differences(text, other) == expected
