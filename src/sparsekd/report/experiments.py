"""The tables of the paper's experiments: our ratios beside the paper's, and a verdict for each claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from sparsekd.records import Record
from sparsekd.report import speed
from sparsekd.report.tables import Titled, number, plus_minus


def all_tables(found: Record) -> list[Titled]:
    """What `reproduce` found: the arms, the claims, and where there are any the attribution and the recovery; of a
    table of speed what was measured."""
    if "measured" in found:
        return speed.reproduced(found)
    tables = [_methods(found), _arms(found), _claims(found), _distributions(found)]
    if found["experiment"] == "II":
        tables.append(_protocols(found))
    if "attribution" in found:
        tables.append(_attribution(found))
    if "recovery" in found:
        tables.append(_recovery(found))
    return [table for table in tables if table.rows]


def _methods(found: Record) -> Titled:
    """A row an arm of experiment `methods`: what is left, what it weighs, how fast it reads, and what was lost."""
    texts = found["texts"]
    header = ["arm", "of the MLPs", "of the model", "parameters", "MB", "prefill", "pruned", "distilled", "opens in"]
    rows = []
    for name, by_seed in found["arms"].items():
        arm, ratios = next(iter(by_seed.values())), found["ratios"][name]
        if not arm.get("facts"):
            continue
        facts, seconds = arm["facts"], (arm["prefill"] or {}).get("seconds")
        losses = [[ratios[text].get(key) for text in texts] for key in ("before", "after")]
        rows.append(
            [
                name,
                f"{arm['mlp_reduction']:.1%}",
                f"{arm['model_reduction']:.1%}",
                f"{facts['parameters']:,}",
                f"{facts['bytes'] / 1e6:.0f}",
                f"{seconds['dense'] / seconds['distilled']:.2f} x" if seconds else "",
                *("" if mean is None else _precise(mean) for mean in map(mean_ratio, losses)),
                ", ".join(facts["opens_in"]),
            ]
        )
    title = f"Every method: what is removed and left, and perplexity to dense, mean of {len(texts)} texts"
    return Titled(title, header, rows, "words")


def mean_ratio(comparisons: list[Record | None]) -> float | None:
    """The geometric mean; None where nothing was removed."""
    known = [one["nats"] for one in comparisons if one is not None]
    return math.exp(statistics.fmean(known)) if known else None


def _arms(found: Record) -> Titled:
    """A row an arm and text: perplexity to dense before and after training, the paper's beside it."""
    header = ["arm", "text", "removed", "rate", "pruned", "distilled", "to Dense+KD", "paper: pruned", "distilled"]
    rows = []
    for name, by_seed in found["arms"].items():
        arm = next(iter(by_seed.values()))
        ratios = found["ratios"][name]
        for text in found["texts"]:
            compared = [ratios[text].get(key) for key in ("before", "after", "after, to Dense+KD")]
            cells = [_ratio(comparison) if comparison else "" for comparison in compared]
            papers = [number(value) if value else "" for value in ratios["paper"].values()]
            rows.append([name, text, f"{arm['mlp_reduction']:.1%}", _rate(arm), *cells, *papers])
    return Titled("Perplexity to the dense model's, mean over seeds \u00b1 their standard deviation", header, rows)


def _rate(arm: Record) -> str:
    """The learning rate, and those at which a trial's numbers did not stay finite."""
    diverged = [rate for rate, loss in arm.get("losses", {}).items() if loss is None]
    return f"{arm['learning_rate']:g}" + (f" ({', '.join(diverged)}: diverges)" if diverged else "")


def _claims(found: Record) -> Titled:
    header = ["claim", "text", "ratio", "95 % interval", "claimed", "paper", "verdict"]
    rows = [
        [
            f"{p['claim']}: {p['model']} to {p['reference']}",
            p["text"],
            _precise(p["ratio"]),
            _interval(p),
            f"{p['side']} {p['bound']:g}",
            number(p["paper"]) if p["paper"] else "",
            p["verdict"],
        ]
        for p in found["patterns"]
    ]
    return Titled("What the paper claims", header, rows)


def _distributions(found: Record) -> Titled:
    """A row a model and text: how far its distributions are from the dense model's, and how well calibrated."""
    columns: dict[str, Callable[[Record], float | None]] = {
        "KL to dense": lambda r: r["agreement"] and r["agreement"]["kl"]["value"],
        "same likeliest token": lambda r: r["agreement"] and r["agreement"]["top1"]["value"],
        "calibration error": lambda r: r["calibration"]["expected_calibration_error"],
        "overconfidence": lambda r: r["calibration"]["overconfidence"]["value"],
        "Brier score": lambda r: r["calibration"]["brier"]["value"],
        "entropy": lambda r: r["calibration"]["entropy"]["value"],
    }
    first_arm = next(iter(found["arms"].values()))
    models = {"dense": [next(iter(first_arm.values()))["models"]["dense"]]}  # the same for every seed
    for name, by_seed in found["arms"].items():
        for stage, label in (("compressed", f"{name}, pruned"), ("distilled", name)):
            measured = [arm["models"][stage] for arm in by_seed.values() if stage in arm["models"]]
            models |= {label: measured} if measured else {}
    rows = [
        [name, text, *(_spread([column(results[text]) for results in measured]) for column in columns.values())]
        for name, measured in models.items()
        for text in found["texts"]
    ]
    return Titled("Distance to the dense model, and calibration", ["model", "text", *columns], rows)


def _spread(values: list[float | None]) -> str:
    """Mean over seeds and their sample standard deviation, if there are several; nothing where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return plus_minus(statistics.fmean(known), deviation, "{:.3f}".format)


def _attribution(found: Record) -> Titled:
    rows = [[a["cause"], a["text"], _ratio(a), _interval(a)] for a in found["attribution"]]
    return Titled("What changes perplexity, as a factor", ["cause", "text", "factor", "95 % interval"], rows)


def _recovery(found: Record) -> Titled:
    curve = found["recovery"]
    rows = [[f"{r} x Dense+KD", budget(t, curve["tokens"][-1])] for r, t in curve.get("tokens_for", {}).items()]
    return Titled("Tokens that the recovery curve asks for", ["perplexity on the validation blocks", "tokens"], rows)


def budget(tokens: float | None, measured: float) -> str:
    """Tokens beside those that the curve was fitted on: a hundred times as many are no prediction any more."""
    if tokens is None:
        return "never, by this curve"
    if tokens > 100 * measured:
        return f"over 100 times the {measured:,.0f} of the run: the curve does not say"
    return f"{tokens:,.0f} ({tokens / measured:.2g} times those of the run)"


def _protocols(found: Record) -> Titled:
    """The first seed's models by this project's two protocols and, where the recipe has such a task, the harness's."""
    arms = {name: next(iter(by_seed.values())) for name, by_seed in found["arms"].items()}
    first = next(iter(arms.values()))
    measured = {"dense": (first, "dense")} | {name: (arm, "distilled") for name, arm in arms.items()}
    rows = []
    for name, (arm, stage) in measured.items():
        for text in found["texts"]:
            result = arm["models"][stage][text]
            rows.append([name, text, number(result["perplexity"]), number(result["paper_perplexity"])])
        for task, result in arm["tasks"].get(stage, {}).items():
            scores = {key: score for key, score in result["scores"].items() if "perplexity" in key}
            rows.extend([name, f"{task}, {key}", number(score["value"]), ""] for key, score in scores.items())
    return Titled("By protocol", ["model", "text or task", "strict, or the harness's", "paper's protocol"], rows)


def _ratio(comparison: Record) -> str:
    """The ratio with what a standard deviation over seeds, in nats, makes of it; without one, the ratio alone."""
    ratio, spread = comparison["ratio"], comparison["deviation"]
    return plus_minus(ratio, None if spread is None else ratio * spread, _precise)


def _interval(comparison: Record) -> str:
    interval = comparison["interval"]
    return "unknown" if interval is None else " to ".join(map(_precise, interval))


def _precise(ratio: float) -> str:
    """A third decimal where it says something: arms differ by hundredths."""
    return f"{ratio:.3f}" if ratio < 10 else number(ratio)
