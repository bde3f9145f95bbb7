"""The page itself: one HTML file with its style, its scripts and a summary, all but the data."""

from collections.abc import Mapping
from importlib import resources

from bpo_fast.report import page
from bpo_fast.report.browse.index import Index, KindFigures
from bpo_fast.report.browse.records import UNREADABLE

_SCRIPTS = ("data.js", "differences.js", "selection.js", "card.js", "browse.js")  # later ones use earlier ones
_MOST_REASONS = 12  # lines of the table of what was left out
_INK = "inherit"  # large numbers in the color of the text, in light and dark


def document(name: str, data_folder: str, index: Index, counts: Mapping[str, int], left_out: Mapping[str, int]) -> str:
    """The page as HTML.

    Args:
        name: of the data set.
        data_folder: folder of the data, beside the page.
        index: of the pairs, for their figures.
        counts, left_out: of `write_browser`.
    """
    pairs, images, unreadable = (counts[name] for name in ("pairs", "images", "unreadable"))
    numbers = [(pairs, "pair" if pairs == 1 else "pairs"), (images, "image" if images == 1 else "images")]
    numbers += [(count, mark) for mark, count in index.marks.most_common() if mark != UNREADABLE]
    cards = [(f"{number:,}", label, _INK) for number, label in numbers]
    if unreadable:
        label = f"{'image' if unreadable == 1 else 'images'} that cannot be shown"
        cards.insert(2, (f"{unreadable:,}", label, "var(--bad)"))
    if left_out:
        cards.append((f"{sum(left_out.values()):,}", "records left out", _INK))
    tables = [page.section("Kinds", "", _kinds(index.kinds))]
    if left_out:
        tables.append(page.section("Left out", "", _reasons(left_out)))
    content = [
        page.number_cards(cards),
        f'<div class="tables">{"".join(tables)}</div>',
        _file("body.html"),
        *(f"<script>\n{_file(script)}</script>" for script in _SCRIPTS),
        f'<script defer src="{data_folder}/index.js"></script>',
    ]
    return page.page(
        "Preference pairs", f"The pairs of {name}.", content, head_html=f"<style>{_file('browse.css')}</style>"
    )


def _kinds(kinds: Mapping[str, KindFigures]) -> str:
    has_gaps = any(figures.gaps for figures in kinds.values())
    header = ["", "pairs", "share", "words chosen", "words rejected", *(["log\u2011prob gap"] if has_gaps else [])]
    rows, total = [], sum(figures.pairs for figures in kinds.values())
    for kind, figures in sorted(kinds.items(), key=lambda item: -item[1].pairs):
        row = [kind or "no kind given", f"{figures.pairs:,}", f"{100 * figures.pairs / total:.1f} %"]
        row += [_mean(figures.chosen_words, figures.pairs), _mean(figures.rejected_words, figures.rejected)]
        rows.append(row + ([_mean(figures.gap, figures.gaps)] if has_gaps else []))
    return page.table(header, rows)


def _mean(total, count):
    return f"{total / count:,.1f}" if count else ""


def _reasons(left_out: Mapping[str, int]) -> str:
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    rows = [[reason, f"{count:,}"] for reason, count in most[:_MOST_REASONS]]
    if others := most[_MOST_REASONS:]:
        rows.append([f"{len(others):,} other reasons", f"{sum(count for _, count in others):,}"])
    return page.table(["", "records"], rows)


def _file(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
