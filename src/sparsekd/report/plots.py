"""Pictures of a run as SVG text: vector, no scripts, readable on white and on dark paper, colour-blind safe."""

from __future__ import annotations

import io
import itertools
import math
import re
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from sparsekd.records import Record

# Okabe and Ito's colours; grey axes stand out on white and on black
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#808080"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00")
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": GREY}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sparsekd",  # the same picture has the same bytes
    "font.size": 10,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
}


def loss_curve(history: Record) -> str:
    """Training and validation loss against tokens trained on."""
    figure, axes = _figure()
    steps = history["steps"]
    tokens = {0: 0} | {step["step"]: step["num_tokens"] for step in steps}
    axes.plot([s["num_tokens"] for s in steps], [s["loss"] for s in steps], color=BLUE, alpha=0.6, label="training")
    validations = history["validations"]
    axes.plot(
        [tokens[v["step"]] for v in validations],
        [v["loss"] for v in validations],
        "o-",
        color=ORANGE,
        label="validation",
    )
    kept = next(v for v in validations if v["step"] == history["best_step"])
    axes.plot([tokens[kept["step"]]], [kept["loss"]], "o", ms=12, mfc="none", color=GREEN, label="weights kept")
    axes.set(xlabel="tokens trained on", ylabel="loss (nats)")
    axes.legend(**LEGEND)
    return svg(figure)


def ranks(plan: Record) -> str:
    """Rank of each matrix by layer, as a share of full rank; the output energy lost; and, where the KL of cutting each
    matrix alone is known, what was predicted and, where it was probed, what was measured."""
    known = plan["predicted_kl"] is not None
    figure, (left, middle, *right) = figures(3 if known else 2)
    for (name, members), color, marker in _by_kind(plan["matrices"]):
        layers = range(len(members))
        full = [min(m["in_features"], m["out_features"]) for m in members]
        style = {"color": color, "marker": marker, "ms": 4, "label": name}
        left.plot(layers, [(m["rank"] or f) / f for m, f in zip(members, full, strict=True)], **style)
        middle.plot(layers, [m["relative_error"] or math.nan for m in members], **style)  # dense: nothing lost
        if known:
            right[0].plot(layers, [m["predicted_kl"] or math.nan for m in members], **style)
            measured = [m["probed_kl"] or math.nan for m in members]
            right[0].plot(layers, measured, marker, ms=8, mfc="none", color=color)
    left.set(xlabel="layer", ylabel="rank / full rank", ylim=(0, 1.05))
    middle.set(xlabel="layer", ylabel="output energy lost", yscale="log")
    middle.legend(**LEGEND)
    if known:
        right[0].set(xlabel="layer", ylabel="KL predicted (nats a token)", yscale="log")
        if any(m["probed_kl"] for m in plan["matrices"]):
            right[0].set_title("open: measured, at the rank first planned", fontsize=9)
    return svg(figure)


def widths(plan: Record) -> str:
    """Neurons kept in each layer, as a share of the dense width; and, where it is known, the KL of cutting each layer's
    MLP alone that was predicted."""
    mlps = [list(lines) for _, lines in itertools.groupby(plan["matrices"], lambda m: m["name"].rpartition(".")[0])]
    known = plan["predicted_kl"] is not None
    figure, (left, *right) = figures(2 if known else 1)
    style: dict[str, Any] = {"color": BLUE, "marker": "o", "ms": 4}
    # all parameters of a matrix that writes neurons belong to one of them
    left.plot(range(len(mlps)), [m["parameters_after"] / m["parameters_before"] for m, *_ in mlps], **style)
    left.set(xlabel="layer", ylabel="neurons / dense width", ylim=(0, 1.05))
    if known:
        right[0].plot(range(len(mlps)), [sum(m["predicted_kl"] or 0 for m in mlp) or math.nan for mlp in mlps], **style)
        right[0].set(xlabel="layer", ylabel="KL predicted (nats a token)", yscale="log")
    return svg(figure)


def layers(plan: Record) -> str:
    """What the method weighed each layer by; those that were removed are open."""
    gone = {m["name"] for m in plan["matrices"] if not m["parameters_after"]}
    scores = plan["layer_scores"]
    figure, (axes,) = figures(1)
    axes.plot(range(len(scores)), list(scores.values()), "o-", color=BLUE, ms=4)
    removed = [number for number, layer in enumerate(scores) if any(name.startswith(f"{layer}.") for name in gone)]
    values = [list(scores.values())[number] for number in removed]
    axes.plot(removed, values, "o", color=BLUE, ms=4, mfc="white", label="removed")
    axes.set(xlabel="layer", ylabel="what the layer does, by the method")
    axes.legend(**LEGEND)
    return svg(figure)


def spectrum(found: Record) -> str:
    """Energy left out against rank kept (median and range over layers), effective ranks, and the predicted loss."""
    figure, (left, middle, right) = figures(3)
    for (name, members), color, marker in _by_kind(found["matrices"]):
        left_out = np.array([_left_out(m) for m in members])
        shares = np.linspace(0, 1, left_out.shape[1])
        left.fill_between(shares, left_out.min(0), left_out.max(0), color=color, alpha=0.15, lw=0)
        left.plot(shares, np.median(left_out, 0), color=color, label=name)
        layers = range(len(members))
        full = [min(m["in_features"], m["out_features"]) for m in members]
        style = {"color": color, "marker": marker, "ms": 4}
        middle.plot(layers, [m["effective_rank"] / f for m, f in zip(members, full, strict=True)], label=name, **style)
        middle.plot(
            layers, [m["weight_effective_rank"] / f for m, f in zip(members, full, strict=True)], ":", color=color
        )
        kl = members[0]["predicted_kl"] is not None
        right.plot(layers, [m["predicted_kl" if kl else "relative_error"] for m in members], **style)
    left.set(xlabel="rank kept / full rank", ylabel="energy left out", yscale="log", ylim=(1e-5, 1.2))
    middle.set(xlabel="layer", ylabel="effective rank / full rank", ylim=(0, 1.05), title="dotted: of the weight alone")
    what = "predicted KL (nats a token)" if kl else "energy lost"
    right.set(xlabel="layer", ylabel=f"{what} at {found['reduction']:.0%}", yscale="log")
    left.legend(**LEGEND)
    return svg(figure)


def damage(found: Record) -> str:
    """Predicted KL against neurons kept, a line for each MLP, its colour from the first layer's to the last one's; and
    the width of each MLP with a width a layer and with one width."""
    figure, (left, right) = figures(2, height=3.6, width=9.6)
    mlps = found["mlps"]
    colors = matplotlib.colormaps["viridis"].resampled(min(len(mlps), 32))  # a bar of more colours is no vectors
    scale = Normalize(0, max(1, len(mlps) - 1))
    for layer, mlp in enumerate(mlps):
        kl = [value or math.nan for value in mlp["predicted_kl"]]  # all neurons: nothing lost
        left.plot(mlp["kept"], kl, color=colors(scale(layer)), lw=1.2)
    with matplotlib.rc_context(_STYLE):
        figure.colorbar(ScalarMappable(scale, colors), ax=left, label="layer")
    left.set(xlabel="neurons kept", ylabel="KL predicted (nats a token)", yscale="log")
    for name, color, style in (("global", BLUE, "o"), ("uniform", GREY, "--")):
        kl = found["predicted_kl_by_allocation"][name]
        widths = [mlp["neurons_by_allocation"][name] for mlp in mlps]
        right.plot(range(len(mlps)), widths, style, color=color, ms=4, label=f"{name}: {kl:.3g} in all")
    right.set(xlabel="layer", ylabel=f"neurons kept at {found['reduction']:.0%} removed")
    right.set_ylim(bottom=0)
    right.legend(**LEGEND)
    return svg(figure)


def _left_out(matrix: Record) -> Any:
    """Energy left out at 101 shares of full rank."""
    full = min(matrix["in_features"], matrix["out_features"])
    lost = np.zeros(full + 1)
    energy = np.array(matrix["energy"])
    lost[: len(energy)] = energy[::-1].cumsum()[::-1]
    return np.maximum(np.interp(np.linspace(0, full, 101), np.arange(full + 1), lost), 1e-12)


def _by_kind(matrices: list[Record]) -> Any:
    """(kind such as gate_proj, its matrices in depth order), colour, marker."""
    kinds: dict[str, list[Record]] = {}
    for matrix in matrices:
        kinds.setdefault(matrix["name"].rpartition(".")[2], []).append(matrix)
    return zip(kinds.items(), (BLUE, ORANGE, GREEN), "os^", strict=False)


def perplexities(evaluation: Record) -> str:
    """Strict perplexity of the three models on each text, with standard errors."""
    models = evaluation["models"]
    texts = list(models["dense"])
    figure, all_axes = figures(len(texts))
    for axes, text in zip(all_axes, texts, strict=True):
        for position, (name, color) in enumerate(zip(models, (GREY, ORANGE, BLUE), strict=True)):
            result = models[name][text]
            axes.bar(position, result["perplexity"], yerr=result["standard_error"], color=color, ecolor=GREY, capsize=3)
        axes.set(title=text, xticks=range(len(models)), ylabel="perplexity")
        axes.set_xticklabels(["dense", "compressed", "distilled"])
        if models["compressed"][text]["perplexity"] > 10 * models["dense"][text]["perplexity"]:
            axes.set_yscale("log")
    return svg(figure)


def rounds(found: list[Record]) -> str:
    """Perplexity to dense against what is removed, before and after each round's training."""
    texts = list(found[0]["models"]["dense"])
    figure, all_axes = figures(len(texts))
    for axes, text in zip(all_axes, texts, strict=True):
        for name, color, marker in (("compressed", ORANGE, "s"), ("distilled", BLUE, "o")):
            points = [(100 * one["mlp_reduction"], one["ratios"][name][text]) for one in found if name in one["ratios"]]
            x, ratios = zip(*points, strict=True)
            errors = np.array([ratio["standard_error"] for ratio in ratios], float)  # None is nan: no bar is drawn
            axes.errorbar(x, [r["ratio"] for r in ratios], errors, color=color, marker=marker, capsize=3, label=name)
        axes.axhline(1, ls=":", color=GREY)
        axes.set(title=text, xlabel="MLP parameters removed (%)", ylabel="perplexity / dense")
    all_axes[0].legend(**LEGEND)
    return svg(figure)


def calibration(evaluation: Record) -> str:
    """Accuracy against confidence in bins of equal mass; below the diagonal a model is too sure of itself."""
    models = evaluation["models"]
    texts = list(models["dense"])
    figure, all_axes = figures(len(texts))
    for axes, text in zip(all_axes, texts, strict=True):
        axes.plot([0, 1], [0, 1], ":", color=GREY)
        for (name, results), color, marker in zip(models.items(), (GREY, ORANGE, BLUE), "os^", strict=True):
            bins = results[text]["calibration"]["bins"]
            axes.plot(
                [b["confidence"] for b in bins],
                [b["accuracy"] for b in bins],
                color=color,
                marker=marker,
                ms=4,
                label=name,
            )
        axes.set(title=text, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    all_axes[0].legend(**LEGEND)
    return svg(figure)


def _figure() -> tuple[Figure, Any]:
    figure, axes = figures(1)
    return figure, axes[0]


def figures(count: int, height: float = 3.2, width: float = 6.4) -> tuple[Figure, list[Any]]:
    """`count` axes in rows of up to three, each row `height` inches high and at least `width` wide."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(width, 4.2 * columns), rows * height), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def svg(figure: Figure) -> str:
    """The figure as SVG text without metadata: the same picture has the same bytes."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)  # names of RDF schemas, which are URLs
    return text[text.index("<svg") :]
