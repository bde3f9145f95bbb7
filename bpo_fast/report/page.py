"""Parts of a report: one HTML page that needs no other file.

Arguments are plain text, which is escaped here, unless they are called `content` or `*_html`.
"""

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from html import escape

NARROW = 300  # CSS pixels; the width of a chart on a phone
_BREAKPOINT = 760  # a page narrower than this shows the narrow charts

# No text is smaller than 12 pixels, 0.75rem. What can be wider than a phone scrolls in its own box.
STYLE = """
:root {
  --ink: #22303c; --text: #43525e; --muted: #5b6873; --ground: #f4f6f8; --card: #fff; --rule: #e3e8ec;
  --bad: #9c2f2a; --bad-ground: #fbe1df;
  color: var(--ink); background: var(--ground);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
* { box-sizing: border-box; }
body { margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.6rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.01em; margin: 0 0 0.4rem; }
p { margin: 0 0 1rem; max-width: 68ch; color: var(--text); }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 1.5rem; margin-top: 1.25rem;
}
.charts { display: flex; flex-wrap: wrap; gap: 1.25rem 1rem; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 0.95rem; font-weight: 600; margin-bottom: 0.4rem; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 1.25rem; }
.scroll img { display: block; max-width: 100%; height: auto; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 1rem; }
.number { background: var(--card); border: 1px solid var(--rule); border-radius: 14px; padding: 1.1rem 1.3rem; }
.number b { display: block; font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.03em; }
.number span { color: var(--muted); font-size: 0.9rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.25rem; }
.sample { display: grid; grid-template-columns: 96px 1fr; gap: 1rem; align-items: start; }
.sample img { width: 96px; border-radius: 10px; border: 1px solid var(--rule); }
.sample dl { margin: 0; font-size: 0.9rem; line-height: 1.45; }
.sample dt { color: var(--muted); font-size: 0.8rem; }
.sample dd { margin: 0 0 0.5rem; }
mark { background: var(--bad-ground); color: var(--bad); border-radius: 4px; padding: 0 0.2em; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.4rem 0.6rem; border-bottom: 1px solid var(--rule); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; width: 50%; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; }
@media (max-width: 640px) {
  main { padding: 1.5rem 0.75rem 2rem; }
  section { padding: 1rem; }
  th, td { padding: 0.4rem 0.3rem; }
}
"""


def page(title: str, intro: str, content: Iterable[str], *, head_html: str = "") -> str:
    """The whole page: a heading, a paragraph, and parts as the functions below make them; `head_html` after STYLE."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>{head_html}</head><body><main><h1>{escape(title)}</h1><p>{escape(intro)}</p>"
        f"{''.join(content)}</main></body></html>\n"
    )


def section(title: str, text: str, content: str) -> str:
    """A card with a heading, a paragraph (left out where `text` is empty) and its content."""
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def number_cards(numbers: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers side by side: (number, label, color of the number)."""
    cards = "".join(
        f'<div class="number"><b style="color: {color}">{escape(number)}</b><span>{escape(label)}</span></div>'
        for number, label, color in numbers
    )
    return f'<div class="numbers">{cards}</div>'


def charts(content: Iterable[str]) -> str:
    """Charts side by side, below each other where there is no room."""
    return f'<div class="charts">{"".join(content)}</div>'


def chart(title: str, draw: Callable, *, width: int) -> str:
    """A chart under its title, drawn twice: for a wide page and for a phone.

    Args:
        title: what it shows; also the image's text for those who do not see it.
        draw: makes the matplotlib figure, given `width` in CSS pixels.
        width: CSS pixels on a wide page.
    """
    narrow, wide = (_data_uri(_png(draw(width=pixels))) for pixels in (NARROW, width))
    return (
        f'<figure style="width: {width}px"><figcaption>{escape(title)}</figcaption><div class="scroll"><picture>'
        f'<source media="(max-width: {_BREAKPOINT}px)" srcset="{narrow}" width="{NARROW}">'
        f'<img alt="{escape(title)}" src="{wide}" width="{width}"></picture></div></figure>'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; an empty `header` leaves the first line out."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def sample_cards(samples: Iterable[tuple[bytes, str, dict[str, str]]]) -> str:
    """Images with answers: (PNG, what it shows, {label: answer_html})."""
    cards = []
    for png, alt, answers_html in samples:
        lines = "".join(f"<dt>{escape(label)}</dt><dd>{answer}</dd>" for label, answer in answers_html.items())
        cards.append(f'<div class="sample"><img alt="{escape(alt)}" src="{_data_uri(png)}"><dl>{lines}</dl></div>')
    return f'<div class="samples">{"".join(cards)}</div>'


def marked(text: str, words: Iterable[str]) -> str:
    """`text` as HTML, with `words` marked wherever they stand as whole words.

    >>> marked("A red star & two squares.", ["star", "red star"])
    'A <mark>red star</mark> &amp; two squares.'
    """
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    if not longest_first:
        return escape(text)
    parts = re.split(rf"\b({'|'.join(longest_first)})\b", text, flags=re.IGNORECASE)
    return "".join(f"<mark>{escape(part)}</mark>" if number % 2 else escape(part) for number, part in enumerate(parts))


def marked_differences(text: str, other: str) -> str:
    """`text` as HTML, with the words marked that `other` has not at that place.

    >>> marked_differences("There are two red stars.", "There are three stars.")
    'There are <mark>two red</mark> stars.'
    """
    words = text.split()
    blocks = SequenceMatcher(None, other.split(), words, autojunk=False).get_opcodes()
    runs = [(escape(" ".join(words[start:end])), same == "equal") for same, _, _, start, end in blocks if end > start]
    return " ".join(run if same else f"<mark>{run}</mark>" for run, same in runs)


def _png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=192)  # two dots a CSS pixel
    return stream.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
