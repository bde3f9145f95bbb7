"""What the demo's report holds: first what BPO gains and what it costs, then charts, samples and all figures."""

import os
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path

from bpo_fast.demo import world
from bpo_fast.demo.grade import GRADES
from bpo_fast.demo.negatives import KINDS, SHARES
from bpo_fast.evaluate.run import ANSWERS_FILE
from bpo_fast.report import page
from bpo_fast.runs.files import read_json, replacing

REPORT_FILE = "report.html"
NUM_SAMPLES = 8
METHODS = {"base": "Before", "sft": "SFT on chosen", "injected": "BPO on errors", "bpo": "BPO"}
_COLORS = dict(zip(METHODS.values(), ("#9aa3ad", "#d99a3d", "#8db4d9", "#2f6fb0"), strict=True))
_TRUE, _TYPICAL, _INK = "#2b8a57", "#c2504b", "#22303c"
# What a rate says, its scorer and its name there. The first ones are drawn, and tell gains and costs by their short
# names.
_MAIN_RATES = (
    ("Answers with a hallucinated object", "chair", "response_rate"),
    (GRADES["exact"], "description", "exact"),
    (GRADES["well_formed"], "description", "well_formed"),
    ("Yes/no questions answered correctly", "pope", "accuracy"),
)
_SHORT = (
    "answers with a hallucinated object",
    "exactly right answers",
    "answers in whole sentences",
    "yes/no accuracy",
)
RATES = (
    *_MAIN_RATES,
    ("Named objects that are hallucinated", "chair", "object_rate"),
    *((title, "description", name) for name, title in GRADES.items() if name not in ("exact", "well_formed")),
    ("F1 of yes/no answers", "pope", "f1"),
    ("Yes/no questions answered yes", "pope", "yes_ratio"),
)
_ERRORS = ("Error asked for", "Answers", "Changed", "At one place", "Fluent")
_BACKGROUND = (
    "The model was pretrained in a miniature world where a red circle nearly always comes with two blue squares, and "
    "it says so even when the image shows something else. Bootstrapped Preference Optimization trains it against its "
    "own answers to weakened images."
)
_NO_CHARTS = (
    "Charts: found no matplotlib, so tables stand in their place; to have charts, pip install matplotlib, delete "
    "{report} and repeat the command."
)


def summary(results: dict) -> list[str]:
    """What BPO gains and what it costs: a sentence each beside SFT and beside the model before training.

    Args:
        results: of the run, as `write_report` takes them.
    """
    mean, sentences = results["mean"], []
    for other, words in (("sft", "Beside SFT on the same pairs"), ("base", "Beside the model before training")):
        sides = {"gains": [], "costs": []}
        for name, (_, scorer, rate) in zip(_SHORT, _MAIN_RATES, strict=True):
            there, here = (_percent(mean[method][scorer][rate]) for method in (other, "bpo"))
            better = (mean["bpo"][scorer][rate] > mean[other][scorer][rate]) != (scorer == "chair")
            if there != here:
                sides["gains" if better else "costs"].append(f"{name} {here} instead of {there}")
        gains, costs = (", ".join(sides[side]) or "nothing in these figures" for side in ("gains", "costs"))
        sentences.append(f"{words}, BPO gains: {gains}. It costs: {costs}.")
    return sentences


def text_table(results: dict) -> list[str]:
    """All rates as lines of text."""
    rows = [["", *METHODS], *_rows(results)]
    width = max(len(row[0]) for row in rows)
    return ["".join([row[0].ljust(width), *(cell.rjust(10) for cell in row[1:])]) for row in rows]


def read_answers(folder: Path, method: str) -> dict[str, str]:
    """A method's descriptions of the held-out images, by the question's id; `folder` is that of a seed."""
    return {line["id"]: line["answer"] for line in read_json(folder / "scores" / f"{method}-chair" / ANSWERS_FILE)}


def write_report(output_dir: str | os.PathLike, results: dict) -> Path:
    """Write `report.html` from a finished run; return its path.

    Args:
        output_dir: folder of `bpo_fast.demo.pipeline.run`, whose first seed gives the curves and the sample images.
        results: what the run's `results.json` holds.
    """
    first, settings = results["seeds"][0], results["settings"]
    num_runs = len(results["seeds"])
    runs = "" if num_runs == 1 else f" (mean of {num_runs} runs with other images, a dot for each)"
    rates = {method: results["mean"][method]["chair"]["response_rate"] for method in METHODS}
    has_charts = find_spec("matplotlib") is not None
    content = [
        page.number_cards(
            (
                f"{100 * rate:.0f} %",
                f"{METHODS[method]}: answers with a hallucinated object",
                _COLORS["BPO"] if method == "bpo" else _INK,
            )
            for method, rate in rates.items()
        ),
        page.section(
            "Held-out images, before and after",
            f"{_BACKGROUND} Shown are {settings['num_heldout']} images, none of them typical{runs}. An "
            "answer hallucinates when it names an object that its image does not show. It is exactly right when it is "
            "the true description, word for word. Half of the yes/no questions ask for an object that is there, the "
            "other half for the typical one, which is not. BPO is trained on image-weakened answers, BPO on errors on "
            "error-injected ones for the same samples.",
            _scores(results, has_charts),
        ),
        page.section(
            "Two kinds of wrong answers",
            "To annotated answers the model makes wrong ones itself. Image-weakened: it answers from the image with "
            f"noise of step {settings['noise_step']} on it. Error-injected: it changes an object, an attribute, a "
            "count or a relation of the annotated answer, without a look at the image. Words that differ are marked.",
            _pairs(Path(output_dir) / f"seed-{first['seed']}", first),
        ),
        page.section(
            "What is wrong with them",
            "Error-injected answers by the error that was asked for: how many name another object, attribute or count "
            "than the annotated answer, how many do so at one place alone, and how many are by the grammar of this "
            f"world. {_left_out(results)} Below, how many descriptions of images that are not typical hallucinate, by "
            "the noise on the image.",
            page.table(_ERRORS, _error_rows(results["negatives"]["errors"]))
            + page.table(*_noise_rows(results["negatives"]["noise"])),
        ),
        page.section(
            "What training does to the answers",
            "Pairs kept out of training, of the kind that is trained on; for SFT those of BPO. BPO makes the rejected "
            "answers unlikely; SFT, with as many steps on the same chosen answers, never sees them. Log-probs of an "
            "answer in nats, by training step.",
            _logps(first["logps"], has_charts),
        ),
        page.section(
            "Why weakened images show the language prior",
            "Noise on the image features of images that are not typical. As the noise grows, the word for the object "
            "in the image becomes less likely and the word for the typical object more likely.",
            _likelihood(first["likelihood"], has_charts),
        ),
        page.section(
            "Sample answers",
            f"The first {NUM_SAMPLES} held-out images. Objects that are not in the image are marked.",
            _samples(Path(output_dir) / f"seed-{first['seed']}", first),
        ),
        page.section("All figures", "", page.table(["", *METHODS.values()], _rows(results))),
        page.section("Settings", _settings_words(results), page.table((), settings.items())),
    ]
    if not has_charts:
        note = _NO_CHARTS.format(report=REPORT_FILE)
        print(note)
        content.insert(1, page.section("Charts", note, ""))
    path = Path(output_dir) / REPORT_FILE
    with replacing(path) as file:
        file.write(page.page("A tiny LLaVA before and after BPO", " ".join(summary(results)), content))
    return path


def _settings_words(results):
    words = "All trainings share them but for the loss of SFT."
    if "sft" in results["settings"]["bpo_loss"]:
        words += " BPO's loss holds that of SFT on the chosen answers (sft) beside the preference term."
    seeds = results["settings_chosen_on_seeds"]
    if seeds:
        words += f" They were chosen on seeds {', '.join(map(str, seeds))}; figures of other seeds judge them."
    return words


def _scores(results, has_charts):
    if not has_charts:
        return page.table(["", *METHODS.values()], _rows(results, _MAIN_RATES))
    from bpo_fast.report.figures import bar_chart

    panels = []
    for title, scorer, rate in _MAIN_RATES:
        percentages = {
            name: [100 * run["scores"][method][scorer][rate] for run in results["seeds"]]
            for method, name in METHODS.items()
        }
        panels.append(page.chart(title, partial(bar_chart, percentages, _COLORS), width=430))
    return page.charts(panels)


def _logps(logps, has_charts):
    if not has_charts:
        header = [f"{METHODS[method]}, {side}" for method in logps for side in ("chosen", "rejected")]
        rows = [
            [points[0]["step"], *(f"{point[side]:.2f}" for point in points for side in ("chosen", "rejected"))]
            for points in zip(*logps.values(), strict=True)
        ]
        return page.table(["training step", *header], rows)
    from bpo_fast.report.figures import line_chart

    values = [point[side] for history in logps.values() for point in history for side in ("chosen", "rejected")]
    margin = 0.05 * (max(values) - min(values))
    panels = []
    for method in logps:
        steps = [point["step"] for point in logps[method]]
        lines = {side: (steps, [point[side] for point in logps[method]]) for side in ("chosen", "rejected")}
        draw = partial(
            line_chart,
            lines,
            {"chosen": _TRUE, "rejected": _TYPICAL},
            x_label="training step",
            y_label="log-prob of an answer (nats)",
            y_range=(min(values) - margin, max(values) + margin),
        )
        panels.append(page.chart(METHODS[method], draw, width=430))
    return page.charts(panels)


def _likelihood(likelihood, has_charts):
    steps = [step or 0 for step in likelihood["steps"]]
    lines = {"object in the image": (steps, likelihood["true"]), "typical object": (steps, likelihood["typical"])}
    if not has_charts:
        rows = zip(steps, *([f"{value:.3f}" for value in values] for _, values in lines.values()), strict=True)
        return page.table(["noise step (0: no noise)", *lines], rows)
    from bpo_fast.report.figures import line_chart

    draw = partial(
        line_chart,
        lines,
        dict(zip(lines, (_TRUE, _TYPICAL), strict=True)),
        x_label="noise step (0: no noise)",
        y_label="probability of its words",
        y_range=(0, 1.05 * max(likelihood["true"] + likelihood["typical"])),
    )
    return page.charts([page.chart("Effect of image-weakened prompting", draw, width=640)])


def _pairs(folder, run):
    image_of = {record["id"]: record["image"] for record in read_json(folder / "annotated" / "instruct.json")}
    samples = []
    for negatives in run["negatives"]["examples"]:
        weakened, injected = (negatives[kind] for kind in KINDS)
        chosen = weakened["chosen"]
        labels = {f"Error-injected: {injected['error']}": injected, "Image-weakened": weakened}
        answers_html = {weakened["question"]: escape(chosen)} | {
            label: page.marked_differences(each["rejected"], chosen) for label, each in labels.items()
        }
        png = (folder / "annotated" / "images" / image_of[weakened["id"]]).read_bytes()
        samples.append((png, chosen, answers_html))
    return page.sample_cards(samples)


def _error_rows(errors):
    return [
        [name, row["answers"], *(_percent(row[share]) for share in SHARES)]
        for name, row in sorted(errors.items(), key=lambda item: item[0] == "all")
    ]


def _left_out(results):
    asked = results["settings"]["num_annotations"] * len(results["seeds"])
    kept = results["negatives"]["errors"]["all"]["answers"]
    return f"Of {asked:,} answers {asked - kept:,} gave no pair: they came back as they were, or broken."


def _noise_rows(noise):
    """Header and rows of a table."""
    return ["Noise step", *map(str, noise["steps"])], [
        ["Descriptions that hallucinate", *map(_percent, noise["hallucinated"])]
    ]


def _samples(folder, run):
    questions = read_json(folder / "heldout" / "descriptions.json")[:NUM_SAMPLES]
    answers = {method: read_answers(folder, method) for method in METHODS}
    synonyms = world.synonym_table()
    samples = []
    for number, question in enumerate(questions):
        answers_html = {}
        for method, name in METHODS.items():
            hallucinated = run["scores"][method]["chair"]["hallucinated"][number]
            words = [word for item in hallucinated for word in synonyms[item]]
            answers_html[name] = page.marked(answers[method][question["id"]], words)
        png = (folder / "heldout" / "images" / question["image"]).read_bytes()
        samples.append((png, " and ".join(question["objects"]), answers_html))
    return page.sample_cards(samples)


def _rows(results, rates=RATES):
    """A row for each rate and seed, and for their mean where there are several."""
    runs = [(f"seed {run['seed']}", run["scores"]) for run in results["seeds"]]
    if len(runs) > 1:
        runs.append(("mean", results["mean"]))
    return [
        [f"{title}, {label}", *(_percent(scores[method][scorer][rate]) for method in METHODS)]
        for title, scorer, rate in rates
        for label, scores in runs
    ]


def _percent(rate):
    return f"{100 * rate:.1f} %"
