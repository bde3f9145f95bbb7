"""The page of 5,000 pairs in a real browser, opened from the disk."""

import json
import random
import re

import pytest
from headless import LACKS, headless, open_page, settle
from PIL import Image

from bpo_fast.data.formats import preference_row
from bpo_fast.report.browse import write_browser

pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = pytest.mark.skipif(LACKS is not None, reason=LACKS or "")

NUM_PAIRS, PAGE = 5000, 20
KINDS = {"image_weakened": ("300", "500", "700"), "error_injected": ("count", "object"), "self_generated": ("",)}
WORDS = ["a", "red", "blue", "circle", "square", "cat", "dog", "lies", "near", "under", "two", "three", "man", "woman"]
WICKED = "</script><script>window.entered = 1</script><img src=x onerror='window.entered = 2'>\"'&amp;\u2028\\ {{7*7}}"
RTL, EMOJI = "قطة حمراء على الطاولة", "A 👩‍👩‍👧‍👦 family, 🇨🇭 and 😀"
LONG_WORD = "w" * 3000


def make_rows(folder):
    """Rows whose first ones are made by hand, the others drawn."""
    rng = random.Random(0)
    for number in range(30):
        size = rng.choice([(640, 480), (480, 640), (64, 64)])
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"{number}.jpg")
    (folder / "damaged.jpg").write_bytes(b"no image")

    def sentence(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = []
    for number in range(NUM_PAIRS):
        kind = rng.choice(list(KINDS))
        gap = None if number % 7 == 3 else round(rng.gauss(4, 9), 3)
        extra = {"chosen_logp": None, "rejected_logp": None} if gap is None else {"chosen_logp": -90.0 + gap}
        row = preference_row(f"{rng.randrange(30)}.jpg", sentence(3, 8), sentence(5, 60), sentence(5, 60))
        details = json.dumps({"step": number % 1000})
        row |= {"id": f"s{rng.randrange(10**6)}", "rejected_type": kind, "variant": rng.choice(KINDS[kind])}
        row |= {"source": rng.choice(("llava", "textvqa")), "rejected_truncated": number % 50 == 0, "details": details}
        rows.append(row | {"rejected_logp": -90.0} | extra)

    def say(number, chosen, rejected, **columns):
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            rows[number][name][0]["content"][0]["text"] = text
        rows[number] |= columns

    say(0, "A red cat sits on the old table.", "A blue cat sits on the table, asleep.", id="by-hand")
    say(1, WICKED, f"{WICKED} more", id=WICKED, source=WICKED)
    say(2, RTL, RTL.replace("حمراء", "زرقاء"))
    say(3, EMOJI, EMOJI.replace("👦", "👧"))
    say(4, " ".join(rng.choices(WORDS, k=10_000)), f"{LONG_WORD} {sentence(9, 9)}", id="long")
    rows[5] |= {"images": ["damaged.jpg"]}
    rows[6] |= {"images": ["gone.jpg", "1.jpg"]}
    rows[8] |= {"id": "twins"}
    rows[19] |= {"id": "twins"}
    say(7, "Only here: Zeppelin (v2.0) over Zürich.", "A cat.")
    for row in rows:
        row["images"] = [str(folder / image) for image in row["images"]]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browse")
    rows = make_rows(folder)
    write_browser(iter(rows), folder / "page", name="five thousand", left_out={"an <empty> answer": 3})
    return folder / "page" / "index.html", rows


@pytest.fixture(scope="module")
def browser():
    with headless() as driver:
        yield driver


class Page:
    """The page as a reader has it."""

    def __init__(self, browser, file, rows):
        self.browser, self.file, self.rows = browser, file, rows

    def open(self, address=""):
        open_page(self.browser, self.file, address)

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def choose(self, control, value):
        """Choose an option of a select, by its beginning."""
        script = (
            "const [id, text] = arguments; const select = document.getElementById(id);"
            "select.value = [...select.options].find((each) => each.text.startsWith(text)).value;"
            "select.dispatchEvent(new Event('change'))"
        )
        self.run(script, control, value)
        self.pause()

    def pause(self):
        """Let the browser take the change of the address in, then wait."""
        self.browser.execute_async_script("setTimeout(arguments[0], 20)")
        settle(self.browser)

    def press(self, *keys):
        for key in keys:
            self.find("body").send_keys(key)
            self.pause()

    def search(self, words):
        self.run("document.getElementById('query').value = arguments[0]", words)
        self.run("document.getElementById('query').dispatchEvent(new Event('input'))")
        self.browser.execute_async_script("setTimeout(arguments[0], 270)")
        settle(self.browser)

    def ids(self):
        return self.texts(".pair .id bdi")


@pytest.fixture
def page(browser, rows):
    page = Page(browser, *rows)
    page.open()
    return page


def response(row, side):
    return row[side][0]["content"][0]["text"]


def gap(row):
    return None if row["chosen_logp"] is None else row["chosen_logp"] - row["rejected_logp"]


def ids(rows):
    return [row["id"] for row in rows]


def test_it_opens_from_the_disk_without_errors_and_asks_nothing_of_a_network(page):
    page.browser.get_log("performance")
    page.open()
    page.press(Keys.ARROW_RIGHT)
    assert page.text("#count") == "5,000 pairs"
    assert page.browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
    assert len(urls) >= 3
    assert {url.partition(":")[0] for url in urls} <= {"file", "about"}
    assert page.text(".numbers").startswith("5,000pairs32images2images that cannot be shown")
    assert "an <empty> answer3" in page.text(".tables")


def test_pairs_come_in_the_order_asked_for_and_those_without_a_value_last(page):
    rows = page.rows
    assert page.ids() == ids(rows[:PAGE])
    known = sorted((row for row in rows if gap(row) is not None), key=gap)
    page.choose("sort", "log-prob gap")
    assert page.ids() == ids(known[:PAGE])
    page.find("#descending").click()
    page.pause()
    assert page.ids() == ids(known[: -PAGE - 1 : -1])
    page.open("#sort=gap&descending=true&page=250")
    assert page.ids() == ids([row for row in rows if gap(row) is None][-PAGE:])
    page.open("#sort=length")
    longer = sorted(
        rows, key=lambda row: len(response(row, "rejected").split()) - len(response(row, "chosen").split())
    )
    assert page.ids() == ids(longer[:PAGE])
    page.open("#sort=id")
    natural = sorted(rows, key=lambda row: int(row["id"][1:]) if re.fullmatch(r"s\d+", row["id"]) else -1)
    numbered = [row for row in natural if re.fullmatch(r"s\d+", row["id"])]
    assert [each for each in page.ids() if each in set(ids(numbered))] == ids(numbered)[: PAGE - 3]
    page.open("#sort=random")
    first = page.ids()
    page.open("#sort=random")
    assert page.ids() == first != ids(rows[:PAGE])


def test_pairs_are_filtered_by_kind_variant_source_and_what_is_said_of_them(page):
    def count(wanted):
        return f"{sum(map(wanted, page.rows)):,} of 5,000 pairs"

    page.choose("kind", "error_injected")
    assert page.text("#count") == count(lambda row: row["rejected_type"] == "error_injected")
    assert set(page.texts(".pair .kind")) == {"error_injected"}
    page.choose("variant", "count")
    page.choose("source", "llava")
    both = ("error_injected", "count", "llava")
    assert page.text("#count") == count(lambda row: (row["rejected_type"], row["variant"], row["source"]) == both)
    page.find("#clear").click()
    page.pause()
    assert page.text("#count") == "5,000 pairs"
    page.choose("mark", "rejected cut off")
    assert page.text("#count") == count(lambda row: row["rejected_truncated"])
    page.choose("variant", "none")
    assert page.text("#count") == count(lambda row: row["rejected_truncated"] and row["variant"] == "")
    page.open("#kind=no+such+kind")
    assert page.text("#count") == "0 of 5,000 pairs"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        ('ZEPPELIN "(v2.0) over"', r"zeppelin \(v2\.0\) over"),
        ("zürich", "zürich"),
        ('"three man woman"', "three man woman"),
        ("s123", "s123"),
        ("قطة", "قطة"),
    ],
)
def test_a_search_finds_the_words_in_any_text_of_a_pair_and_in_its_id(page, words, pattern):
    page.search(words)
    wanted = []
    for row in page.rows:
        texts = [row["id"], row["prompt"][0]["content"][1]["text"], response(row, "chosen"), response(row, "rejected")]
        if any(re.search(pattern, text, re.IGNORECASE) for text in texts):
            wanted.append(row)
    assert wanted
    assert page.text("#count") == f"{len(wanted)} of 5,000 pairs"
    assert page.ids() == ids(wanted[:PAGE])
    assert page.run("return CSS.highlights.get('found').size") > 0


def test_a_search_wants_all_its_words_and_stands_beside_a_filter(page):
    page.choose("kind", "self_generated")
    page.search("zeppelin cat")
    first = page.rows[7]
    assert page.ids() == ([first["id"]] if first["rejected_type"] == "self_generated" else [])
    page.search("zeppelin dog")
    assert page.ids() == []
    assert page.text("#list") == "No pair is like that."


def test_pages_and_keys(page):
    rows = page.rows
    page.press("j", "j", "j", "k")
    assert page.text(".pair.current .id bdi") == rows[1]["id"]
    assert page.run("return document.activeElement.classList.contains('current')")
    page.press(Keys.ARROW_RIGHT)
    assert page.ids() == ids(rows[PAGE : 2 * PAGE])
    page.press("k")
    assert page.text(".pair.current .id bdi") == rows[PAGE - 1]["id"]
    page.press("j")
    assert page.text(".pair.current .id bdi") == rows[PAGE]["id"]
    page.press(Keys.ARROW_LEFT)
    assert page.text("#pages") == "250"
    page.run("const page = document.getElementById('page'); page.value = 9999; page.onchange()")
    page.pause()
    assert page.ids() == ids(rows[-PAGE:])
    page.press(Keys.ARROW_RIGHT, "/")
    assert page.run("return document.activeElement.id") == "query"
    # A key is a letter where one writes.
    page.find("#query").send_keys("j", Keys.ESCAPE)
    page.browser.execute_async_script("setTimeout(arguments[0], 270)")
    settle(page.browser)
    assert page.run("return [document.activeElement.id, state.query]") == ["", "j"]
    page.press("?")
    assert page.run("return document.getElementById('keys').open")


def test_an_address_leads_to_a_pair_and_back(page):
    page.run("document.querySelectorAll('.pair .id')[1].click()")
    page.pause()
    assert page.ids() == [WICKED]
    link = page.run("return location.hash")
    page.browser.back()
    page.pause()
    assert page.ids() == ids(page.rows[:PAGE])
    page.open(link)
    assert page.ids() == [WICKED]
    assert page.text("#count") == "1 of 5,000 pairs"
    assert page.run("return scrollY") > 100
    page.open()
    page.run("document.querySelectorAll('.pair')[8].querySelector('header a:last-child').click()")
    page.pause()
    assert page.ids() == ["twins", "twins"]
    assert page.texts(".pair:last-child header a") == ["#twins", "all 2 of this id"]
    page.open("#page=3&sort=constructor&kind=image_weakened")
    weakened = [row for row in page.rows if row["rejected_type"] == "image_weakened"]
    assert page.ids() == ids(weakened[2 * PAGE : 3 * PAGE])


def test_differences_of_a_pair_made_by_hand(page):
    def card(selector):
        return page.texts(f".pair:first-child {selector}")

    assert card(".chosen ins") == ["red", "old"]
    assert card(".rejected del") == ["blue", ", asleep"]
    assert card(".chosen .text") + card(".rejected .text") == [
        response(page.rows[0], s) for s in ("chosen", "rejected")
    ]
    page.press("d")
    assert card(".both del") == ["blue", ", asleep"]
    assert card(".both ins") == ["red", "old"]
    assert card(".both .text") == ["A blue red cat sits on the old table, asleep."]
    # By more than color.
    decorations = [
        page.run("return getComputedStyle(document.querySelector(arguments[0])).textDecoration", f".pair {tag}")
        for tag in ("ins", "del")
    ]
    assert "underline" in decorations[0]
    assert "line-through" in decorations[1]
    # A family of four is one sign, a flag too.
    assert page.texts(".pair:nth-child(4) .both del") == ["👩‍👩‍👧‍👧"]


def common_length(a, b):
    """Length of the longest common part of two lists, by the textbook's table."""
    row = [0] * (len(b) + 1)
    for each in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            diagonal, row[column] = row[column], diagonal + 1 if each == other else max(row[column], row[column - 1])
    return row[-1]


def test_differences_are_the_fewest_and_keep_the_texts(page):
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS[: rng.randint(1, 8)], k=rng.randint(0, 40))) for _ in range(120)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    runs = page.run("return arguments[0].map(([a, b]) => runsOf(a.split(' '), b.split(' ')))", pairs)
    for (chosen, rejected), found in zip(pairs, runs, strict=True):
        a, b = chosen.split(" "), rejected.split(" ")
        assert sum(run[0] for run in found if run[2]) == common_length(a, b)
        at = [0, 0]
        for of_a, of_b, equal in found:
            if equal:
                assert a[at[0] : at[0] + of_a] == b[at[1] : at[1] + of_b]
            at = [at[0] + of_a, at[1] + of_b]
        assert at == [len(a), len(b)]
    for (chosen, rejected), parts in zip(
        pairs, page.run("return arguments[0].map((pair) => differences(...pair))", pairs), strict=True
    ):
        assert "".join(part["chosen"] for part in parts) == chosen
        assert "".join(part["rejected"] for part in parts) == rejected
    # Of two words that are equal by chance between long differences nothing is left, of one beside a single word is.
    joined = page.run(
        "return [differences('one two three a four five', 'six seven a eight nine'),"
        " differences('a red cat', 'a blue cat')]"
    )
    assert [part["equal"] for part in joined[0]] == [False]
    assert [part["equal"] for part in joined[1]] == [True, False, True]


def test_texts_of_the_data_stay_texts(page):
    second = ".pair:nth-child(2)"
    assert page.text(f"{second} .chosen .text") == WICKED
    assert page.text(f"{second} .rejected .text") == f"{WICKED} more"
    assert page.text(f"{second} .id bdi") == WICKED
    assert page.texts(f"{second} header bdi")[-2] == WICKED
    assert page.run("return [window.entered, document.querySelectorAll('.pair script, .text img').length]") == [
        None,
        0,
    ]
    assert (
        page.run("return [...document.getElementById('source').options].map((each) => each.value)")[-1] == f"={WICKED}"
    )
    assert page.run("return document.querySelector('.pair:nth-child(3) .text').dir") == "auto"
    folded = page.find(".pair:nth-child(5) .chosen .text")
    assert folded.size["height"] < 400
    page.run("document.querySelector('.pair:nth-child(5) .unfold').click()")
    assert folded.size["height"] > 5000
    assert len(page.text(".pair:nth-child(5) .chosen .text").split()) == 10_000


def test_an_image_that_cannot_be_shown_leaves_its_reason(page):
    damaged, gone = page.text(".pair:nth-child(6) .missing"), page.text(".pair:nth-child(7) .missing")
    assert "damaged.jpg: found a file that cannot be decoded" in damaged
    assert "gone.jpg: found no such file" in gone
    assert len(page.texts(".pair:nth-child(7) .images > *")) == 2
    page.choose("mark", "image unreadable")
    assert page.ids() == ids(page.rows[5:7])
    page.open()
    sizes = page.run("return [...document.querySelectorAll('.pair:first-child img')].map((e) => e.naturalWidth)")
    assert sizes[0] in (320, 240, 64)


def emulate(page, width, scheme):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


CUT_OFF = """
const cut = (e) => e.clientWidth && e.scrollWidth > e.clientWidth + 8;
return [...document.querySelectorAll(".pair *")].filter(cut).map((e) => e.className);
"""
CONTRAST = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const behind = (e) => { const c = rgba(getComputedStyle(e).backgroundColor);
  return c[3] === 0 ? behind(e.parentElement) : c; };
return [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() && !e.disabled
  && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
  const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort();
  return [(b + 0.05) / (a + 0.05), `${e.tagName}.${e.className}`]; }).sort((a, b) => a[0] - b[0])[0];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_every_text_stands_out_in_light_and_dark(page, width, scheme):
    try:
        emulate(page, width, scheme)
        page.open()
        page.run("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert page.run("return innerWidth") == width
        # Nothing of a card is cut off at its side, but for the space that a line ends with.
        assert page.run(CUT_OFF) == []
        ratio, where = page.run(CONTRAST)
        assert ratio >= 4.5, where
        ground = page.run("return getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 384) == (scheme == "dark")
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
