"""The report's figures, from `results.json`."""

from matplotlib.figure import Figure

NAMES = {"base": "Before", "sft": "SFT on chosen", "bpo": "BPO"}
COLORS = {"base": "#9aa3ad", "sft": "#d99a3d", "bpo": "#2f6fb0"}
TRUE, TYPICAL = "#2b8a57", "#c2504b"
INK, MUTED, RULE = "#22303c", "#5b6873", "#dfe4e8"


def _axes(figure, rows, columns, place):
    axes = figure.add_subplot(rows, columns, place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _title(axes, text):
    axes.set_title(text, loc="left", fontsize=11, color=INK, pad=12)


def _panels(columns):
    return Figure(figsize=(4.4 * columns, 3.4), layout="constrained", facecolor="white")


def scores_figure(results: dict) -> Figure:
    """Bars of the mean over seeds, a dot for each seed, in percent."""
    panels = (
        ("Responses with a hallucinated object", "chair", "response_rate"),
        ("Objects that are hallucinated", "chair", "object_rate"),
        ("Yes/no questions answered right", "pope", "accuracy"),
    )
    figure = _panels(len(panels))
    for place, (title, kind, rate) in enumerate(panels, start=1):
        axes = _axes(figure, 1, len(panels), place)
        means = [100 * results["mean"][method][kind][rate] for method in NAMES]
        bars = axes.bar(list(NAMES.values()), means, width=0.62, color=[COLORS[method] for method in NAMES])
        if len(results["seeds"]) > 1:
            for column, method in enumerate(NAMES):
                dots = [100 * run["scores"][method][kind][rate] for run in results["seeds"]]
                axes.scatter([column] * len(dots), dots, s=12, color=INK, zorder=3)
        axes.bar_label(bars, [f"{mean:.0f} %" for mean in means], padding=6, fontsize=10, color=INK)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 25))
        _title(axes, title)
    return figure


def logps_figure(run: dict) -> Figure:
    """Log-probs of fixed pairs, kept out of training, against the training step."""
    figure = _panels(2)
    shared = None
    for place, method in enumerate(("bpo", "sft"), start=1):
        axes = _axes(figure, 1, 2, place)
        history = run["logps"][method]
        steps = [point["step"] for point in history]
        for name, color in (("chosen", TRUE), ("rejected", TYPICAL)):
            values = [point[name] for point in history]
            axes.plot(steps, values, color=color, linewidth=2)
            axes.annotate(name, (steps[-1], values[-1]), (-4, 7), textcoords="offset points", ha="right", color=color)
        axes.set_xlabel("training step", color=MUTED, fontsize=9)
        axes.set_ylabel("log-prob of a sequence (nats)", color=MUTED, fontsize=9)
        _title(axes, NAMES[method])
        shared = shared or axes
        if axes is not shared:
            axes.sharey(shared)
            shared.autoscale()
    return figure


def likelihood_figure(likelihood: dict) -> Figure:
    """Probability of the true and of the typical object's words against the noise step."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
    axes = _axes(figure, 1, 1, 1)
    for name, color, label in (("true", TRUE, "the object in the picture"), ("typical", TYPICAL, "the typical one")):
        shown, *noisy = likelihood[name]
        axes.plot(likelihood["steps"][1:], noisy, color=color, linewidth=2, marker="o", markersize=4, label=label)
        axes.scatter([0], [shown], color=color, marker="D", s=26)
    axes.set_xlabel("noise step on the image features (0: the picture as it is)", color=MUTED, fontsize=9)
    axes.set_ylabel("probability of its words", color=MUTED, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    _title(axes, "Effect of image-weakened prompting")
    return figure
