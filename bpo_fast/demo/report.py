"""The demo's report: one HTML page that holds its pictures."""

import base64
import io
import os
import re
from html import escape
from pathlib import Path

from bpo_fast.demo import world
from bpo_fast.evaluate.run import ANSWERS_FILE
from bpo_fast.report.figures import NAMES, likelihood_figure, logps_figure, scores_figure
from bpo_fast.runs.files import read_json, replacing

NUM_SAMPLES = 8

_STYLE = """
:root { color: #22303c; background: #f4f6f8; font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
* { box-sizing: border-box; }
body { margin: 0; }
main { max-width: 980px; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.6rem; }
h2 { font-size: 1.2rem; letter-spacing: -0.01em; margin: 0 0 0.4rem; }
p { margin: 0 0 1rem; max-width: 68ch; color: #43525e; }
section { background: #fff; border: 1px solid #e3e8ec; border-radius: 14px; padding: 1.5rem; margin-top: 1.25rem; }
section img.figure { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.scroll img.figure { min-width: 560px; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 1rem; }
.number { background: #fff; border: 1px solid #e3e8ec; border-radius: 14px; padding: 1.1rem 1.3rem; }
.number b { display: block; font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.03em; }
.number span { color: #5b6873; font-size: 0.9rem; }
.number.bpo b { color: #2f6fb0; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.25rem; }
.sample { display: grid; grid-template-columns: 96px 1fr; gap: 1rem; align-items: start; }
.sample img { width: 96px; border-radius: 10px; border: 1px solid #e3e8ec; }
.sample dl { margin: 0; font-size: 0.9rem; line-height: 1.45; }
.sample dt { color: #5b6873; font-size: 0.78rem; }
.sample dd { margin: 0 0 0.5rem; }
mark { background: #fbe1df; color: #9c2f2a; border-radius: 4px; padding: 0 0.2em; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.4rem 0.6rem; border-bottom: 1px solid #e9edf0; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: #5b6873; }
"""


def write_report(output_dir: str | os.PathLike, results: dict) -> Path:
    """Write `report.html` from a finished run; return its path.

    Args:
        output_dir: folder of `bpo_fast.demo.pipeline.run`, whose first seed gives the curves and the sample pictures.
        results: what the run's `results.json` holds.
    """
    first = results["seeds"][0]
    mean, num_seeds = results["mean"], len(results["seeds"])
    num_heldout = results["settings"]["num_heldout"]
    over = "one run" if num_seeds == 1 else f"mean of {num_seeds} runs; dots are the single ones"
    numbers = "".join(
        f'<div class="number {method}"><b>{100 * mean[method]["chair"]["response_rate"]:.0f} %</b>'
        f"<span>{escape(name)}</span></div>"
        for method, name in NAMES.items()
    )
    sections = [
        _section(
            "Held-out pictures, before and after",
            f"{num_heldout} pictures a run, drawn where nothing is typical ({over}). A response hallucinates when it "
            "names an object that its picture does not show. Half of the yes/no questions ask for an object that is "
            "there, the other half for the one that usually would be and is not.",
            _figure(scores_figure(results), "Bar charts of hallucination rates and yes/no accuracy"),
        ),
        _section(
            "What training does to the answers",
            "Pairs kept out of training: the annotated answer is the chosen one, the model's own answer to the "
            "weakened picture the rejected one. BPO pushes the rejected answer away; SFT, on the same chosen answers "
            "for as many steps, has never seen it.",
            _figure(logps_figure(first), "Log-probs of chosen and rejected answers against training steps"),
        ),
        _section(
            "Why weakened pictures show the prior",
            "Noise on the image features of pictures that break the habit. As the picture fades, the word for what is "
            "there loses its probability, and the word for what usually is there gains it.",
            _figure(likelihood_figure(first["likelihood"]), "Likelihood of true and typical words against noise step"),
        ),
        _section(
            "Sample answers",
            f"The first {NUM_SAMPLES} held-out pictures, not chosen. Objects that are not in the picture are "
            "<mark>marked</mark>.",
            _samples(Path(output_dir) / f"seed-{first['seed']}", first),
        ),
        _section("All figures", "", _table(results)),
        _section("Settings", "BPO and SFT share all of them but the loss.", _settings(results["settings"])),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>BPO on a miniature world</title>'
        f"<style>{_STYLE}</style></head><body><main>"
        "<h1>A small LLaVA learns to trust its eyes</h1>"
        "<p>It grew up where a red circle nearly always stands beside two blue squares, and says so even when the "
        "picture shows something else. Bootstrapped Preference Optimization takes the model's own answers to weakened "
        "pictures as what not to say. Responses with a hallucinated object:</p>"
        f'<div class="numbers">{numbers}</div>{"".join(sections)}</main></body></html>\n'
    )
    path = Path(output_dir) / "report.html"
    with replacing(path) as file:
        file.write(page)
    return path


def _section(title, text, content):
    paragraph = f"<p>{text}</p>" if text else ""
    return f"<section><h2>{title}</h2>{paragraph}{content}</section>"


def _figure(figure, alt):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=160)
    return f'<div class="scroll"><img class="figure" alt="{alt}" src="{_data_uri(stream.getvalue())}"></div>'


def _data_uri(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _samples(folder, run):
    questions = read_json(folder / "heldout" / "descriptions.json")[:NUM_SAMPLES]
    answers = {method: read_json(folder / "scores" / f"{method}-chair" / ANSWERS_FILE) for method in NAMES}
    cards = []
    for row, question in enumerate(questions):
        png = (folder / "heldout" / "images" / question["image"]).read_bytes()
        lines = "".join(
            f"<dt>{escape(name)}</dt>"
            f"<dd>{_marked(answers[method][row]['answer'], run['scores'][method]['chair']['hallucinated'][row])}</dd>"
            for method, name in NAMES.items()
        )
        truth = escape(" and ".join(question["objects"]))
        cards.append(f'<div class="sample"><img alt="{truth}" src="{_data_uri(png)}"><dl>{lines}</dl></div>')
    return f'<div class="samples">{"".join(cards)}</div>'


def _marked(answer, hallucinated):
    text = escape(answer)
    words = [word for name in hallucinated for word in world.synonym_table()[name]]
    if not words:
        return text
    pattern = "|".join(sorted(words, key=len, reverse=True))
    return re.sub(rf"\b(?:{pattern})\b", r"<mark>\g<0></mark>", text, flags=re.IGNORECASE)


def _table(results):
    columns = (
        ("responses", "chair", "response_rate"),
        ("objects", "chair", "object_rate"),
        ("yes/no accuracy", "pope", "accuracy"),
        ("F1", "pope", "f1"),
        ("says yes", "pope", "yes_ratio"),
    )
    rows = [(f"seed {run['seed']}", run["scores"]) for run in results["seeds"]]
    if len(rows) > 1:
        rows.append(("mean", results["mean"]))
    head = "".join(f"<th>{title}</th>" for title, _, _ in columns)
    body = "".join(
        f"<tr><td>{label}, {escape(name)}</td>"
        + "".join(f"<td>{100 * scores[method][kind][rate]:.1f} %</td>" for _, kind, rate in columns)
        + "</tr>"
        for label, scores in rows
        for method, name in NAMES.items()
    )
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _settings(settings):
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in settings.items()
    )
    return f'<div class="scroll"><table>{rows}</table></div>'
