"""What the demo's report holds."""

import os
from functools import partial
from pathlib import Path

from bpo_fast.demo import world
from bpo_fast.evaluate.run import ANSWERS_FILE
from bpo_fast.report import page
from bpo_fast.report.figures import bar_chart, line_chart
from bpo_fast.runs.files import read_json, replacing

NUM_SAMPLES = 8
NAMES = {"base": "Before", "sft": "SFT on chosen", "bpo": "BPO"}
_COLORS = {"Before": "#9aa3ad", "SFT on chosen": "#d99a3d", "BPO": "#2f6fb0"}
_TRUE, _TYPICAL, _INK = "#2b8a57", "#c2504b", "#22303c"
# What a rate says, its scorer and its name there.
_CHARTS = (
    ("Answers with a hallucinated object", "chair", "response_rate"),
    ("Named objects that are hallucinated", "chair", "object_rate"),
    ("Yes/no questions answered correctly", "pope", "accuracy"),
)
_RATES = (*_CHARTS, ("F1 of yes/no answers", "pope", "f1"), ("Yes/no questions answered yes", "pope", "yes_ratio"))


def write_report(output_dir: str | os.PathLike, results: dict) -> Path:
    """Write `report.html` from a finished run; return its path.

    Args:
        output_dir: folder of `bpo_fast.demo.pipeline.run`, whose first seed gives the curves and the sample images.
        results: what the run's `results.json` holds.
    """
    first, settings = results["seeds"][0], results["settings"]
    num_runs = len(results["seeds"])
    runs = "" if num_runs == 1 else f" (mean of {num_runs} runs with other images, a dot for each)"
    rates = {method: results["mean"][method]["chair"]["response_rate"] for method in NAMES}
    content = [
        page.number_cards(
            (f"{100 * rate:.0f} %", NAMES[method], _COLORS["BPO"] if method == "bpo" else _INK)
            for method, rate in rates.items()
        ),
        page.section(
            "Held-out images, before and after",
            f"{settings['num_heldout']} images, none of them typical{runs}. An answer hallucinates when it "
            "names an object that its image does not show. Half of the yes/no questions ask for an object that is "
            "there, the other half for the typical one, which is not.",
            _scores(results),
        ),
        page.section(
            "What training does to the answers",
            "Pairs kept out of training: the chosen answer is the annotated one, the rejected answer is the model's "
            "own about the weakened image. BPO makes the rejected answers unlikely; SFT, with as many steps on the "
            "same chosen answers, never sees them.",
            _logps(first["logps"]),
        ),
        page.section(
            "Why weakened images show the language prior",
            "Noise on the image features of images that are not typical. As the noise grows, the word for the object "
            "in the image becomes less likely and the word for the typical object more likely.",
            _likelihood(first["likelihood"]),
        ),
        page.section(
            "Sample answers",
            f"The first {NUM_SAMPLES} held-out images. Objects that are not in the image are marked.",
            _samples(Path(output_dir) / f"seed-{first['seed']}", first),
        ),
        page.section("All figures", "", _table(results)),
        page.section("Settings", "BPO and SFT share all of them but the loss.", page.table((), settings.items())),
    ]
    path = Path(output_dir) / "report.html"
    with replacing(path) as file:
        file.write(
            page.page(
                "A tiny LLaVA before and after BPO",
                "The model was pretrained in a miniature world where a red circle nearly always comes with two blue "
                "squares, and it says so even when the image shows something else. Bootstrapped Preference "
                "Optimization trains it against its own answers to weakened images. Answers with a hallucinated "
                "object:",
                content,
            )
        )
    return path


def _scores(results):
    panels = []
    for title, scorer, rate in _CHARTS:
        percentages = {
            name: [100 * run["scores"][method][scorer][rate] for run in results["seeds"]]
            for method, name in NAMES.items()
        }
        panels.append(page.chart(title, partial(bar_chart, percentages, _COLORS), width=280))
    return page.charts(panels)


def _logps(logps):
    values = [point[side] for history in logps.values() for point in history for side in ("chosen", "rejected")]
    margin = 0.05 * (max(values) - min(values))
    panels = []
    for method in ("bpo", "sft"):
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
        panels.append(page.chart(NAMES[method], draw, width=430))
    return page.charts(panels)


def _likelihood(likelihood):
    steps = [step or 0 for step in likelihood["steps"]]
    lines = {"object in the image": (steps, likelihood["true"]), "typical object": (steps, likelihood["typical"])}
    draw = partial(
        line_chart,
        lines,
        dict(zip(lines, (_TRUE, _TYPICAL), strict=True)),
        x_label="noise step (0: no noise)",
        y_label="probability of its words",
        y_range=(0, 1.05 * max(likelihood["true"] + likelihood["typical"])),
    )
    return page.charts([page.chart("Effect of image-weakened prompting", draw, width=640)])


def _samples(folder, run):
    questions = read_json(folder / "heldout" / "descriptions.json")[:NUM_SAMPLES]
    answers = {method: read_json(folder / "scores" / f"{method}-chair" / ANSWERS_FILE) for method in NAMES}
    synonyms = world.synonym_table()
    samples = []
    for number, question in enumerate(questions):
        answers_html = {}
        for method, name in NAMES.items():
            hallucinated = run["scores"][method]["chair"]["hallucinated"][number]
            words = [word for item in hallucinated for word in synonyms[item]]
            answers_html[name] = page.marked(answers[method][number]["answer"], words)
        png = (folder / "heldout" / "images" / question["image"]).read_bytes()
        samples.append((png, " and ".join(question["objects"]), answers_html))
    return page.sample_cards(samples)


def _table(results):
    runs = [(f"seed {run['seed']}", run["scores"]) for run in results["seeds"]]
    if len(runs) > 1:
        runs.append(("mean", results["mean"]))
    rows = [
        [f"{title}, {label}", *(f"{100 * scores[method][scorer][rate]:.1f} %" for method in NAMES)]
        for title, scorer, rate in _RATES
        for label, scores in runs
    ]
    return page.table(["", *NAMES.values()], rows)
