"""The paper's experiments on a model of your own, with the controls that it lacks.

`reproduce` runs the arms of one experiment for each seed in one run directory, compares them as the paper does, and
says of each of its claims whether it holds here. Experiments share arms, so one directory serves all of them. The
tables of speed take the pruned models only. In: a recipe, seeds, learning rates; out: `reproduce-<experiment>.json` and
a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from sparsekd import files, pipeline
from sparsekd.console import Console
from sparsekd.distillation import history_of
from sparsekd.errors import UsageError
from sparsekd.recipe import Recipe, Teacher, as_dict, check, method_names
from sparsekd.records import Record
from sparsekd.report import html
from sparsekd.reproduce import methods, speed
from sparsekd.reproduce.arms import DENSE_KD, EXPERIMENTS, Seed
from sparsekd.reproduce.patterns import (
    DISTILLED,
    PATTERNS,
    PRUNED,
    Model,
    Pattern,
    attribution,
    dense,
    distilled,
    paper,
    pruned,
    verdict,
)
from sparsekd.reproduce.rates import Rate, search_rate
from sparsekd.reproduce.results import Arms, Curve, Found, Result
from sparsekd.reproduce.spread import fit_recovery
from sparsekd.run import Estimate, Round, Run, Work, estimate, settings_of, stages

SEEDS, RATES = (42, 123, 456), (3e-5, 1e-4, 3e-4)  # where none are given
RECOVERED = (1.05, 1.20, 1.60)  # perplexity over Dense+KD's that the recovery curve is asked for


def reproduce(
    experiment: str,
    recipe: Recipe,
    folder: Path,
    *,
    seeds: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    only: Sequence[str] | None = None,
    resume: bool = False,
    fresh: bool = False,
    console: Console | None = None,
) -> Record:
    """Runs an experiment, one of `EXPERIMENTS`, and returns what `reproduce-<experiment>.json`, and as a page
    `.html`, then hold.

    The recipe gives model, corpus, training budget and the method under test; its `rounds` are the reductions, by
    default those that the paper reports. Each arm's learning rate is searched among `rates` with the first seed, and
    used for all. The tables of speed train nothing: they have the recipe's seed and no rates. `only` are the methods
    that experiment `methods` is to compare, by default all. Killed and called again, it goes on. Raises `UsageError`
    for an unknown experiment or method, no seed, and options that an arm cannot have, all before anything starts; then
    what the stages raise.
    """
    seeds, rates = _chosen(experiment, recipe, seeds, rates)
    planned = plan_arms(experiment, recipe, seeds, rates, only)
    with Run.open(folder, recipe, console or Console(), resume=resume, fresh=fresh) as opened:
        work = Work(opened)
        opened.keep_recipe(_settings(recipe, planned))
        opened.processes.main_first(lambda: stages.corpus.make(work))
        if experiment in speed.TABLES:
            found = speed.measure(experiment, work, planned[seeds[0]])
        else:
            found = gather(experiment, recipe, _train(experiment, work, planned, rates, only)) | {"rates": list(rates)}
        if opened.processes.is_main:
            files.write_json(folder / f"reproduce-{experiment}.json", found)
            files.write_text(folder / f"reproduce-{experiment}.html", html.render_experiment(found))
        return found


def _chosen(
    experiment: str, recipe: Recipe, seeds: Sequence[int] | None, rates: Sequence[float] | None
) -> tuple[Sequence[int], Sequence[float]]:
    """Seeds and rates where none are given; raises `UsageError` where there can be none."""
    if experiment not in speed.TABLES:
        return SEEDS if seeds is None else seeds, RATES if rates is None else rates
    if seeds is not None or rates is not None:
        raise UsageError(f"experiment {experiment} measures speed and trains nothing: leave --seeds and --rates out")
    return [recipe.seed], [recipe.distill.learning_rate]


def _train(
    experiment: str,
    work: Work,
    planned: dict[int, dict[str, Round]],
    rates: Sequence[float],
    only: Sequence[str] | None,
) -> dict[str, dict[int, Result]]:
    arms: dict[str, dict[int, Result]] = {}
    first = next(iter(planned))
    for seed, rounds in planned.items():
        names = list(rounds)
        if experiment == methods.NAME and seed != first:
            results = {name: by_seed[first] for name, by_seed in arms.items()}
            names = methods.leading(Seed(work.recipe, seed, only), results)
        for name in names:
            work.run.console.say(f"{name}, seed {seed}:")
            searched = None if seed == first else arms[name][first].rate
            arms.setdefault(name, {})[seed] = _run(experiment, work, rounds[name], rates, searched)
    return arms


def plan_arms(
    experiment: str,
    recipe: Recipe,
    seeds: Sequence[int],
    rates: Sequence[float],
    only: Sequence[str] | None = None,
) -> dict[int, dict[str, Round]]:
    """The arms of an experiment by seed and name; raises the `UsageError`s of `reproduce`."""
    if experiment not in EXPERIMENTS:
        raise UsageError(f"experiment {experiment}: expected one of {', '.join(EXPERIMENTS)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds are {list(seeds)}: expected one or several different numbers")
    if not recipe.evaluate.texts and experiment not in speed.TABLES:
        raise UsageError("evaluate.texts is empty: the experiments compare perplexities, so name a text in the recipe")
    if recipe.teacher != Teacher():
        raise UsageError("teacher: the experiments choose their teachers: leave the section out")
    if only is not None and experiment != methods.NAME:
        raise UsageError(f"experiment {experiment} has no methods to choose from: leave --only out")
    for method in only or ():
        if method not in method_names():
            raise UsageError(f"--only has {method}: expected methods among {', '.join(method_names())}")
    pipeline.check_before_starting(recipe)
    planned = {seed: EXPERIMENTS[experiment](Seed(recipe, seed, only)) for seed in seeds}
    rounds_of_model = [] if experiment == methods.NAME else recipe.rounds  # there each reduction is a cut of its own
    for round_ in (round_ for rounds in planned.values() for round_ in rounds.values()):
        for rate in rates:
            options = {"compress": round_.compress or recipe.compress, "seed": round_.seed, "rounds": rounds_of_model}
            check(replace(recipe, distill=replace(round_.distill, learning_rate=rate), **options))
    return planned


@dataclass(frozen=True)
class Preview:
    """What `reproduce` would do, and nothing done: the arms, and what they cost with all their seeds."""

    experiment: str
    arms: list[str]
    seeds: list[int]
    costs: Estimate

    def as_dict(self) -> Record:
        """Plain values for JSON."""
        return {"experiment": self.experiment, "arms": self.arms, "seeds": self.seeds} | self.costs.as_dict()


def preview(
    experiment: str,
    recipe: Recipe,
    seeds: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    only: Sequence[str] | None = None,
) -> Preview:
    """Plans the arms; raises the `UsageError`s of `reproduce`."""
    seeds, rates = _chosen(experiment, recipe, seeds, rates)
    planned = plan_arms(experiment, recipe, seeds, rates, only)
    arms = planned[seeds[0]]
    num_trials = len(arms) * len(rates) if len(rates) > 1 else 0
    if experiment == methods.NAME:
        few = methods.leading(Seed(recipe, seeds[0], only))
        planned = {s: arms if s == seeds[0] else {name: planned[s][name] for name in few} for s in seeds}
    rounds = [round_ for rounds in planned.values() for round_ in rounds.values()]
    silent = replace(recipe, evaluate=replace(recipe.evaluate, prompts=[]))  # arms are asked nothing
    costs = estimate(silent, rounds, num_trials)
    if experiment in speed.TABLES:
        costs = replace(costs, seconds=speed.seconds(experiment, costs, arms))
    return Preview(experiment, list(arms), list(seeds), costs)


def _settings(recipe: Recipe, planned: dict[int, dict[str, Round]]) -> dict[str, Record]:
    """The settings of the arms' stages; the learning rates are those that are searched for."""
    found = settings_of(recipe, [round_ for rounds in planned.values() for round_ in rounds.values()])
    for values in found.values():
        values.get("distill", {}).pop("learning_rate", None)
    return found


def _run(experiment: str, work: Work, round_: Round, rates: Sequence[float], searched: Rate | None) -> Result:
    """One arm with one seed: what it did and what was measured. `searched` is the rate that was searched for with
    another seed."""
    made = pipeline.run_round(work, round_, until="compress")
    rate = search_rate(work, round_, rates) if searched is None else searched
    trained = replace(round_, distill=replace(round_.distill, learning_rate=rate.learning_rate))
    places = list(trained.models(work.dense).values())
    history = history_of(stages.distill.make(work, trained))
    texts = work.main_first(lambda: stages.evaluate.measure_texts(work, trained), places)
    # the other experiments compare perplexities only
    tasks = work.main_first(lambda: stages.evaluate.score_tasks(work, trained), places) if experiment == "II" else {}
    facts = methods.facts_of(work, trained) if experiment == methods.NAME else {}
    return Result(made.get("compress", {}), rate, history, texts, tasks, facts)


def gather(experiment: str, recipe: Recipe, arms: Arms) -> Record:
    """The comparisons of an experiment from its finished arms, as plain values."""
    found = Found({name: {seed: arm.models for seed, arm in by_seed.items()} for name, by_seed in arms.items()})
    first_arm = next(iter(arms.values()))
    seeds = list(first_arm)
    first = Seed(recipe, seeds[0])
    gathered: Record = {
        "experiment": experiment,
        "recipe": as_dict(recipe),
        "texts": found.texts,
        "seeds": seeds,
        "tokens": arms[list(arms)[-1]][seeds[0]].history.num_tokens,  # of a training; the control may have had more
        "arms": {name: {str(seed): one.as_dict() for seed, one in by_seed.items()} for name, by_seed in arms.items()},
        "ratios": {name: ratios(found, experiment, name) for name in arms},
        "patterns": [
            _judged(experiment, pattern, text, found)
            for pattern in PATTERNS[experiment](first)
            if {pattern.model.arm, pattern.reference.arm} <= {None, *arms}  # methods may have been left out
            for text in found.texts
        ],
    }
    if experiment == "controls":
        gathered["attribution"] = [
            {"cause": cause, "text": text, **found.compare(model, reference, text).as_dict()}
            for cause, (model, reference) in attribution(first).items()
            for text in found.texts
        ]
    if experiment == "recovery":
        long_run = next(name for name in arms if name != DENSE_KD)
        gathered["recovery"] = recovery_curve(
            [one.curve for one in arms[long_run].values()], [one.curve for one in arms[DENSE_KD].values()]
        )
    return gathered


def _judged(experiment: str, pattern: Pattern, text: str, found: Found) -> Record:
    comparison = found.compare(pattern.model, pattern.reference, text)
    known = paper(experiment, pattern.model), paper(experiment, pattern.reference)
    return {
        "claim": pattern.claim,
        "model": str(pattern.model),
        "reference": str(pattern.reference),
        "side": pattern.side,
        "bound": pattern.bound,
        "paper": known[0] / known[1] if known[0] and known[1] else None,
        "text": text,
        **comparison.as_dict(),
        "verdict": verdict(comparison, pattern),
    }


def ratios(found: Found, experiment: str, arm: str) -> dict[str, Record]:
    """Perplexity over the dense model's before and after training, and after it over Dense+KD's, by text."""
    by_text: dict[str, Record] = {"paper": {name: paper(experiment, Model(name, arm)) for name in (PRUNED, DISTILLED)}}
    for text in found.texts:
        after = distilled(arm)
        compared = {"after": found.compare(after, dense(), text).as_dict()}
        if found.has(pruned(arm)):
            compared["before"] = found.compare(pruned(arm), dense(), text).as_dict()
        if found.has(distilled(DENSE_KD)):
            compared["after, to Dense+KD"] = found.compare(after, distilled(DENSE_KD), text).as_dict()
        by_text[text] = compared
    return by_text


def recovery_curve(long_run: Sequence[Curve], control: Sequence[Curve]) -> Record:
    """The gap of the pruned model's cross-entropy on the validation blocks to the distilled dense model's best, by
    tokens trained on, mean over seeds; the curve through it; and the tokens it asks for three ratios of perplexity."""
    goal = float(np.mean([min(ce for _, ce in curve) for curve in control]))
    tokens = [float(count) for count, _ in long_run[0][1:]]
    ce = np.mean([[ce for _, ce in curve[1:]] for curve in long_run], axis=0)
    gaps = (ce - goal).tolist()
    curve: Record = {"tokens": tokens, "gaps": gaps, "dense_kd_ce": goal}
    if len(tokens) < 3:
        return curve
    fit = fit_recovery(tokens, gaps)
    return curve | {"fit": asdict(fit), "tokens_for": {f"{r:g}": fit.tokens_for(math.log(r)) for r in RECOVERED}}
