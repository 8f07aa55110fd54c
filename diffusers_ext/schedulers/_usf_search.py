"""S^3: evolutionary search for solver schedules."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm

from ._usf_predictor import SchedulePredictor
from ._usf_schedule import PREDICTIONS, Derivative, Formula, SolverSchedule, Step, check_step


@dataclass(frozen=True)
class MutationRates:
    """Probabilities of the search, those of the authors' configuration.

    Args:
        crossover: Mix two parents instead of taking one.
        mix_steps: In a crossover, mix step by step too.
        insert: Insert a step.
        delete: Delete a step.
        change: Change one choice (each time, order, relaxation, prediction, corrector, first step by itself).
        time_scale: Relative size of a change of time.
        relaxation_scale: Size of a change of a linear relaxation's coefficient.
        orders: Odds of orders 1 to 4.
        predictions: Odds of noise, data and v3 prediction.
    """

    crossover: float = 0.3
    mix_steps: float = 0.5
    insert: float = 0.2
    delete: float = 0.2
    change: float = 0.3
    time_scale: float = 0.08
    relaxation_scale: float = 0.03
    orders: tuple[float, ...] = (0.2, 0.4, 0.3, 0.1)
    predictions: tuple[float, ...] = (0.3, 0.3, 0.4)


class SolverScheduleSearch:
    """Searches the solver schedule with the lowest fitness at a given number of model calls.

    Paper: https://arxiv.org/abs/2312.07243. Every evaluation of `fitness` is one candidate. A predictor, trained again
    after every stage on all that has been evaluated, may screen candidates before (`screen`). The state can be saved
    at any time and the search goes on from it.

    Args:
        fitness: `SolverSchedule -> float`, lower is better; not finite counts as worst.
        population: Schedules to start from, e.g. those of `USFScheduler.preset_schedule`; evaluated first.
        calls: Largest number of model calls of a schedule.
        seed: Same seed, same search.
        top: Size of the pool of parents.
        analytic_first_step: Let the search replace the first call by x0 = 0.
        with_statistics: Let it use the prediction type of DPM-Solver-v3; the fitness must know the statistics.
        screen: Candidates drawn for each that is evaluated, the predictor's favourite; 1 does without a predictor.
        stage: Evaluations between two trainings of the predictor, and before the first.
        rates: See `MutationRates`.

    Raises:
        ValueError: No schedule of the population keeps to `calls`.

    Example:
        >>> search = SolverScheduleSearch(fitness, [scheduler.preset_schedule(5, "unipc")], calls=5)
        >>> scheduler.load_schedule(search.run(200))
    """

    def __init__(
        self,
        fitness: Callable[[SolverSchedule], float],
        population: Sequence[SolverSchedule],
        calls: int,
        seed: int = 0,
        top: int = 15,
        analytic_first_step: bool = False,
        with_statistics: bool = False,
        screen: int = 1,
        stage: int = 20,
        rates: MutationRates | None = None,
    ):
        if screen < 1 or stage < 2:
            raise ValueError(f"screen is {screen} and stage {stage}; they must be at least 1 and 2")
        self.fitness, self.calls, self.top, self.screen, self.stage = fitness, calls, top, screen, stage
        self.rates, self.analytic_first_step = rates or MutationRates(), analytic_first_step
        self.predictions = PREDICTIONS if with_statistics else PREDICTIONS[:2]
        self._predictor: SchedulePredictor | None = None
        self._trained_on = 0
        self._random = random.Random(seed)
        self._waiting = [s for s in population if s.calls <= calls]
        if not self._waiting:
            raise ValueError(f"none of the {len(population)} schedules of the population makes do with {calls} calls")
        self.evaluated: list[tuple[float, SolverSchedule]] = []

    @property
    def scored(self) -> list[tuple[float, SolverSchedule]]:
        """Scores and schedules evaluated so far, best first; `evaluated` has them in the order of evaluation."""
        return sorted(self.evaluated, key=lambda entry: entry[0])

    @property
    def best(self) -> SolverSchedule:
        """The best schedule so far."""
        if not self.evaluated:
            raise RuntimeError("nothing has been evaluated yet: call run()")
        return self.scored[0][1]

    def run(
        self, evaluations: int, progress: bool = True, on_evaluation: Callable[[int], None] | None = None
    ) -> SolverSchedule:
        """Evaluate that many more schedules and return the best of all.

        Ctrl-C, or an exception from `on_evaluation`, stops it between two evaluations; `run` goes on from there.
        """
        for n in tqdm(range(evaluations), desc="solver search", disable=not progress):
            if not self._waiting:
                self._waiting = [self._screened()]
            score = float(self.fitness(self._waiting[0]))
            self.evaluated.append((score if score == score else float("inf"), self._waiting.pop(0)))
            if on_evaluation is not None:
                on_evaluation(n)
        return self.best

    def save(self, path: str | Path) -> None:
        """Write what has been evaluated, what waits and the state of the random numbers as JSON."""
        version, numbers, rest = self._random.getstate()
        scored = [[score, s.to_dict()] for score, s in self.evaluated]
        waiting = [s.to_dict() for s in self._waiting]
        state = {"calls": self.calls, "screen": self.screen, "stage": self.stage}
        state |= {"random": [version, list(numbers), rest], "scored": scored, "waiting": waiting}
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(path)

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`.

        Raises:
            ValueError: It is of a search for another number of calls, or with another predictor.
        """
        state = json.loads(Path(path).read_text(encoding="utf-8"))
        if state.get("calls") != self.calls:
            raise ValueError(f"{path} is of a search for {state.get('calls')} calls, this one is for {self.calls}")
        screening = state.get("screen", 1), state.get("stage", self.stage)
        if screening != (self.screen, self.stage):
            raise ValueError(
                f"{path} is of a search with screen {screening[0]} and stage {screening[1]}, this one has "
                f"{self.screen} and {self.stage}"
            )
        scored = [(float(score), SolverSchedule.from_dict(s)) for score, s in state["scored"]]
        waiting = [SolverSchedule.from_dict(s) for s in state["waiting"]]
        version, numbers, rest = state["random"]
        self._random.setstate((version, tuple(numbers), rest))
        self.evaluated, self._waiting, self._trained_on = scored, waiting, 0

    def _screened(self) -> SolverSchedule:
        """A child, or the one that the predictor prefers among several."""
        trained_on = len(self.evaluated) // self.stage * self.stage
        if self.screen == 1 or trained_on == 0:
            return self._child()
        if self._trained_on != trained_on:
            scores, schedules = zip(*self.evaluated[:trained_on])
            self._predictor, self._trained_on = SchedulePredictor().fit(schedules, scores), trained_on
        return self._predictor.best([self._child() for _ in range(self.screen)])

    def _child(self) -> SolverSchedule:
        """A new schedule that can be run within the calls."""
        parents = [s for _, s in self.scored[: self.top]]
        while True:
            parent = self._random.choice(parents)
            equals = [s for s in parents if len(s.steps) == len(parent.steps) and s is not parent]
            if equals and self._random.random() < self.rates.crossover:
                parent = self._crossed(parent, self._random.choice(equals))
            try:
                child = self._mutated(parent)
            except ValueError:
                continue
            if child.calls <= self.calls and child not in parents:
                return child

    def _crossed(self, a: SolverSchedule, b: SolverSchedule) -> SolverSchedule:
        def coin() -> bool:
            return self._random.random() < 0.5

        times = a.times if coin() else b.times
        afs = a.afs if coin() else b.afs
        if self._random.random() < self.rates.mix_steps:
            steps = tuple(x if coin() else y for x, y in zip(a.steps, b.steps))
        else:
            steps = a.steps if coin() else b.steps
        try:
            return SolverSchedule(times, steps, afs, a.average_x0)
        except ValueError:  # a last step of one parent may not fit the end of the other
            return a

    def _mutated(self, s: SolverSchedule) -> SolverSchedule:
        times, steps = self._resized(list(s.times), list(s.steps))
        times = self._moved(times)
        steps = [self._changed(step, i, len(steps)) for i, step in enumerate(steps)]
        if times[-1] == 0:
            steps[-1] = Step(Formula("data", -1, ()))
        afs = s.afs
        if self.analytic_first_step and self._random.random() < self.rates.change:
            afs = self._random.choice(["none", "zero_x0"])
        return SolverSchedule(tuple(times), tuple(steps), afs, s.average_x0)

    def _resized(self, times: list[float], steps: list[Step]) -> tuple[list[float], list[Step]]:
        if self._random.random() < self.rates.insert:
            i = self._random.randrange(len(steps))
            times.insert(i + 1, (times[i] + times[i + 1]) / 2)
            steps.insert(i, steps[i])
        if len(steps) > 2 and self._random.random() < self.rates.delete:
            i = self._random.randrange(1, len(steps))
            del times[i], steps[i]
        return times, [self._shortened(step, i) for i, step in enumerate(steps)]

    def _moved(self, times: list[float]) -> list[float]:
        """Times with some of the inner ones scaled; order is kept by the check of the schedule."""
        scale, last = self.rates.time_scale, len(times) - 1
        moved = [
            t * (1 + self._random.gauss(0, scale)) if 0 < i < last and self._random.random() < self.rates.change else t
            for i, t in enumerate(times)
        ]
        return moved

    def _shortened(self, step: Step, i: int) -> Step:
        """The step, or the multistep one of an order that its place allows."""
        try:
            check_step(step, i)
        except ValueError:
            return replace(step, formula=self._formula(step.formula, min(step.formula.order, i + 1)))
        return step

    def _formula(self, old: Formula, order: int) -> Formula:
        points = tuple(range(-2, -order - 1, -1))
        if order == 1:
            return Formula(old.prediction, -1, ())
        first = old.derivatives[0] if old.derivatives else Derivative(())
        estimate = points
        if order > 2 and self._random.random() < self.rates.change and self._random.random() < 0.5:
            estimate = points[:1]  # a first-order estimate of the first derivative
        relaxed = Derivative(estimate, first.relaxation, first.coefficient)
        return Formula(old.prediction, -1, (relaxed, *(Derivative(points) for _ in range(order - 2))))

    def _changed(self, step: Step, i: int, n: int) -> Step:
        def roll() -> bool:
            return self._random.random() < self.rates.change

        formula, corrector = step.formula, step.corrector
        if roll():
            odds = self.rates.orders[: i + 1]
            formula = self._formula(formula, self._random.choices(range(1, len(odds) + 1), odds)[0])
        if roll() and formula.derivatives:
            first = formula.derivatives[0]
            base = first.coefficient if first.relaxation == "linear" else 0.0
            relaxed = Derivative(first.points, "linear", base + self._random.gauss(0, self.rates.relaxation_scale))
            if self._random.random() < 0.3:
                relaxed = Derivative(first.points, self._random.choice([None, "dpmsolver-2", "unipc-bh1"]))
            formula = replace(formula, derivatives=(relaxed, *formula.derivatives[1:]))
        if roll():
            odds = self.rates.predictions[: len(self.predictions)]
            formula = replace(formula, prediction=self._random.choices(self.predictions, odds)[0])
        if roll():
            corrector = self._random.choice(["none", "pseudo"])
        corrector = "none" if i == n - 1 else corrector
        return Step(formula, corrector, None if corrector == "none" else step.relaxation)
