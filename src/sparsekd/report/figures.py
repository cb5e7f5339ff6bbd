"""Pictures of the paper's experiments, in the style of the run's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from sparsekd.recipe import method_named
from sparsekd.records import Record
from sparsekd.report import speed
from sparsekd.report.experiments import mean_ratio
from sparsekd.report.plots import BLUE, COLORS, GREEN, GREY, LEGEND, ORANGE, figures, svg


def all_figures(found: Record) -> dict[str, str]:
    """The pictures that an experiment has, by title."""
    if "measured" in found:
        return speed.pictures(found)
    made = {"Calibration": _calibration(found)}
    if found["experiment"] in ("II", "III", "V", "svd"):
        made = {"Perplexity against reduction": _reductions(found)} | made
    if found["experiment"] == "IV":
        made = {"The same student by two teachers": _teachers(found)} | made
    if "attribution" in found:
        made = {"What changes perplexity": _attribution(found)} | made
    if found["experiment"] == "methods" and len(found["recipe"]["rounds"]) != 1:
        made = {"Perplexity by method": _methods(found)} | made
    if "recovery" in found:
        made = {"Recovery": _recovery(found["recovery"])} | made
    return made


def _reductions(found: Record) -> str:
    """Perplexity to dense before and after distillation with 95 % bands, and every seed's point."""
    figure, all_axes = figures(len(found["texts"]))
    pruned = [name for name, arm in found["arms"].items() if next(iter(arm.values()))["mlp_reduction"]]
    x = [100 * next(iter(found["arms"][name].values()))["mlp_reduction"] for name in pruned]
    for axes, text in zip(all_axes, found["texts"], strict=True):
        for key, color, marker, label in (("before", ORANGE, "s", "pruned"), ("after", BLUE, "o", "and distilled")):
            compared = [found["ratios"][name][text][key] for name in pruned]
            low, high = zip(*map(_bounds, compared), strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(x, [one["ratio"] for one in compared], marker=marker, color=color, label=label)
            for seed in found["arms"][pruned[0]]:
                axes.plot(x, _of_seed(found, pruned, seed, key, text), marker, ms=3, mfc="none", color=color)
        if "Dense+KD" in found["arms"]:
            control = found["ratios"]["Dense+KD"][text]["after"]["ratio"]
            axes.axhline(control, ls="--", color=GREEN, label="dense, distilled")
        axes.axhline(1, ls=":", color=GREY)
        axes.set(title=text, xlabel="MLP parameters removed (%)", ylabel="perplexity / dense", yscale="log")
        _plain_ticks(axes)
    all_axes[0].legend(**LEGEND)
    return svg(figure)


def _of_seed(found: Record, names: list[str], seed: str, key: str, text: str) -> list[float]:
    stage = {"before": "compressed", "after": "distilled"}[key]
    models = [found["arms"][name][seed]["models"] for name in names]
    return [m[stage][text]["perplexity"] / m["dense"][text]["perplexity"] for m in models]


def _attribution(found: Record) -> str:
    """A bar a cause and text: the factor on perplexity with its 95 % interval."""
    causes = list(dict.fromkeys(row["cause"] for row in found["attribution"]))
    figure, all_axes = figures(1, height=0.2 * max(2.5, len(found["texts"])) * len(causes) + 1.2, width=9.6)
    axes = all_axes[0]
    height = 0.8 / len(found["texts"])
    for number, (text, color) in enumerate(zip(found["texts"], itertools.cycle(COLORS))):
        rows = [row for row in found["attribution"] if row["text"] == text]
        y = np.arange(len(causes)) + number * height
        nats = np.array([row["nats"] for row in rows])
        low, high = np.log([_bounds(row) for row in rows]).T
        spread = [nats - low, high - nats]
        axes.barh(y, nats, height, xerr=spread, color=color, ecolor=GREY, capsize=2, label=text)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.set(xlabel="change of log-perplexity (nats)", yticks=np.arange(len(causes)) + 0.4 - height / 2)
    axes.set_yticklabels(causes)
    axes.invert_yaxis()
    axes.legend(**LEGEND)
    return svg(figure)


def _recovery(curve: Record) -> str:
    """Validation perplexity to the distilled dense model's against tokens, and the curve through it, carried on to ten
    times as far."""
    figure, all_axes = figures(1)
    axes = all_axes[0]
    axes.plot(curve["tokens"], np.exp(curve["gaps"]), "o", color=BLUE, label="measured")
    if "fit" in curve:
        fit = curve["fit"]
        tokens = np.geomspace(curve["tokens"][0], 10 * curve["tokens"][-1], 100)
        label = f"{fit['floor']:.3f} + {fit['scale']:.3g} tokens^-{fit['power']:.2f} nats"
        axes.plot(tokens, np.exp(fit["floor"] + fit["scale"] * tokens ** -fit["power"]), color=ORANGE, label=label)
    axes.set(xlabel="tokens trained on (thousands)", ylabel="perplexity / Dense+KD", xscale="log")
    ticks = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
    axes.set_xticks([1000 * n for n in ticks], [f"{n:,}" for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.9 * curve["tokens"][0], 12 * curve["tokens"][-1])
    axes.legend(**LEGEND)
    return svg(figure)


def _teachers(found: Record) -> str:
    """Both students with 95 % intervals, a line for each seed, and the paired ratio, which is known far better."""
    figure, all_axes = figures(len(found["texts"]))
    last, swapped = list(found["arms"])[-2:]
    for axes, text in zip(all_axes, found["texts"], strict=True):
        for position, (name, color) in enumerate(((last, ORANGE), (swapped, BLUE))):
            after = found["ratios"][name][text]["after"]
            low, high = _bounds(after)
            spread = [[after["ratio"] - low], [high - after["ratio"]]]
            axes.bar(position, after["ratio"], yerr=spread, color=color, ecolor=GREY, capsize=3)
        for seed in found["arms"][last]:
            axes.plot((0, 1), _of_seed(found, [last, swapped], seed, "after", text), "o-", ms=3, color=GREY)
        paired = next(pattern for pattern in found["patterns"] if pattern["text"] == text)
        interval = f" ({paired['interval'][0]:.3f} to {paired['interval'][1]:.3f})" if paired["interval"] else ""
        axes.set(title=text, xticks=(0, 1), ylabel="perplexity / dense")
        axes.set_xlabel(f"second to first: {paired['ratio']:.3f}{interval}")
        axes.set_xticklabels(["taught by the dense model", "by the distilled one"])
    return svg(figure)


def _methods(found: Record) -> str:
    """Perplexity to dense after training, mean over texts, by what each method took from the MLPs; dashed where only
    zeros are left, which save nothing. First seed."""
    figure, (axes,) = figures(1)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, by_seed in found["arms"].items():
        method, _, percent = name.rpartition(" ")
        if percent.endswith("%") and " " not in method:  # the arms at 10.32 % are no methods
            removed = 100 * next(iter(by_seed.values()))["mlp_reduction"]
            lines.setdefault(method, []).append((removed, _after(found, name)))
    for number, (method, points) in enumerate(sorted(lines.items(), key=lambda line: line[1][-1][1])):
        style = {"color": f"C{number % 10}", "marker": "os^Dvp"[number % 6], "ms": 4, "label": method}
        axes.plot(*zip(*points, strict=True), ls="--" if method_named(method).FORM == "mask" else "-", **style)
    axes.axhline(_after(found, "Dense+KD"), ls=":", color=GREY, label="Dense+KD")
    axes.set(xlabel="MLP parameters removed, %", ylabel="perplexity to dense, trained", yscale="log")
    axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 30))  # what is beyond is no language model
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(**LEGEND, fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return svg(figure)


def _after(found: Record, arm: str) -> float:
    """The mean of its ratios to the dense model, over the texts."""
    mean = mean_ratio([found["ratios"][arm][text]["after"] for text in found["texts"]])
    assert mean is not None
    return mean


def _calibration(found: Record) -> str:
    """Accuracy minus confidence against confidence, of the dense model and of the distilled arms; first seed."""
    figure, all_axes = figures(len(found["texts"]))
    arms = {name: next(iter(by_seed.values()))["models"] for name, by_seed in found["arms"].items()}
    shown = {"dense": (next(iter(arms.values()))["dense"], GREY)}
    names = list(arms)
    if found["experiment"] == "methods":
        picked = sorted(names, key=lambda name: _after(found, name))[:3]
    else:
        picked = [names[0], names[len(names) // 2], names[-1]]
    shown |= {n: (arms[n]["distilled"], c) for n, c in zip(dict.fromkeys(picked), (GREEN, BLUE, ORANGE), strict=False)}
    for axes, text in zip(all_axes, found["texts"], strict=True):
        for (name, (results, color)), marker in zip(shown.items(), "Dos^", strict=False):
            bins = results[text]["calibration"]["bins"]
            x = [b["confidence"] for b in bins]
            axes.plot(x, [b["accuracy"] - b["confidence"] for b in bins], marker=marker, ms=4, color=color, label=name)
        axes.axhline(0, ls=":", color=GREY)
        axes.set(title=text, xlabel="confidence", ylabel="accuracy - confidence", xlim=(0, 1))
    all_axes[0].legend(**LEGEND)
    return svg(figure)


def _bounds(comparison: Record) -> tuple[float, float]:
    """The 95 % interval; where it is unknown, what is drawn as nothing."""
    low, high = comparison["interval"] or (math.nan, math.nan)
    return low, high


def _plain_ticks(axes: Any) -> None:
    """Ratios such as 1.5 instead of powers of ten, where a few of them span the axis."""
    low, high = axes.get_ylim()
    if high / low < 30:
        ticks = [tick for tick in (0.7, 0.85, 1, 1.2, 1.5, 2, 3, 5, 10, 20) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([], minor=True)
