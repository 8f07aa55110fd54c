"""The evolutionary search of AutoDiffusion: candidates, operators, state."""

from __future__ import annotations

import heapq
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm


FIRST_MUTATION = 0.1  # chance per timestep in the first population
TRIES = 10  # per wanted candidate
PRUNING_EPOCH = 5  # epochs that search timesteps only


@dataclass(frozen=True)
class Stop:
    """One step of a candidate: a timestep and the numbers of the blocks left out there."""

    timestep: int
    skips: tuple[int, ...] = ()


Candidate = tuple[Stop, ...]


@dataclass(frozen=True)
class SearchSettings:
    """The parameters of a search; see `TimestepSearch`."""

    num_steps: int
    population: int
    select_num: int
    mutation_num: int
    crossover_num: int
    mutation_prob: float
    max_epochs: int
    min_prun: float
    max_prun: float
    max_blocks: int | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_steps", "population", "select_num", "max_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.mutation_num < 0 or self.crossover_num < 0 or self.mutation_num + self.crossover_num > self.population:
            raise ValueError(
                f"mutation_num {self.mutation_num} and crossover_num {self.crossover_num} must be at least 0 and "
                f"together at most the population, {self.population}"
            )
        if not (0 < self.mutation_prob <= 1 and 0 <= self.min_prun <= self.max_prun < 1):
            raise ValueError(
                f"mutation_prob {self.mutation_prob} must lie in (0, 1] and 0 <= min_prun {self.min_prun} <= max_prun "
                f"{self.max_prun} < 1"
            )


def ordered(stops: Sequence[Stop]) -> Candidate:
    """Falling timesteps, as they are visited."""
    return tuple(sorted(stops, key=lambda s: -s.timestep))


class Operators:
    """Random, mutated and crossed candidates.

    Args:
        grid: Timesteps to choose from.
        blocks: Number of blocks that may be left out.
        settings: Of the search.
        rng: Source of all choices.
    """

    def __init__(self, grid: Sequence[int], blocks: int, settings: SearchSettings, rng: random.Random):
        self.grid, self.blocks, self.settings, self.rng = list(grid), blocks, settings, rng
        self.range = (0.0, 0.0)  # share of the blocks that may be left out at a step

    def random(self) -> Candidate:
        """K timesteps; blocks are left out once that is allowed."""
        times = self.rng.sample(self.grid, self.settings.num_steps)
        return self.within_budget([Stop(t, self._draw_skips()) for t in times])

    def mutated(self, parent: Candidate, probability: float) -> Candidate:
        """Timesteps replaced by unused ones, left-out blocks by others."""
        unused = [t for t in self.grid if t not in {s.timestep for s in parent}]
        self.rng.shuffle(unused)
        stops = []
        for stop in parent:
            replace = unused and self.rng.random() < probability
            stops.append(Stop(unused.pop() if replace else stop.timestep, self._mutated_skips(stop.skips)))
        return self.within_budget(stops)

    def crossed(self, a: Candidate, b: Candidate) -> Candidate | None:
        """Position by position one parent's step or the other's; None if a timestep occurs twice."""
        stops = [x if self.rng.random() < 0.5 else y for x, y in zip(a, b)]
        distinct = len({s.timestep for s in stops}) == len(stops)
        return self.within_budget(stops) if distinct else None

    def within_budget(self, stops: list[Stop]) -> Candidate:
        """Steps dropped, or added at random, until the number of executed blocks is what the budget allows."""
        budget = self.settings.max_blocks
        if budget is None:
            return ordered(stops)
        stops = list(stops)
        while len(stops) > 1 and self.executed(stops) > budget:
            stops.pop(self.rng.randrange(len(stops)))
        unused = [t for t in self.grid if t not in {s.timestep for s in stops}]
        self.rng.shuffle(unused)
        while unused:
            added = Stop(unused.pop(), self._draw_skips())
            if self.executed([*stops, added]) > budget:
                break
            stops.append(added)
        return ordered(stops)

    def executed(self, stops: Sequence[Stop]) -> int:
        """Blocks that run for one picture (each prompt branch)."""
        return sum(self.blocks - len(s.skips) for s in stops)

    def _draw_skips(self) -> tuple[int, ...]:
        low, high = self.range
        if high == 0:
            return ()
        count = round(self.rng.uniform(low, high) * self.blocks)
        return tuple(sorted(self.rng.sample(range(self.blocks), count)))

    def _mutated_skips(self, skips: tuple[int, ...]) -> tuple[int, ...]:
        if not skips:
            return self._draw_skips()
        kept = [i for i in skips if self.rng.random() >= self.settings.mutation_prob]
        free = [i for i in range(self.blocks) if i not in skips]
        new = self.rng.sample(free, min(len(skips) - len(kept), len(free)))
        return tuple(sorted([*kept, *new]))


class Evolution:
    """The search itself: `score` is asked for every new candidate exactly once.

    Args:
        score: Candidate -> lower is better.
        grid: Timesteps to choose from.
        blocks: Number of blocks that may be left out; 0 searches timesteps only.
        settings: Parameters.
        uniform: Timesteps the first population is built around, or None for a random one.
    """

    def __init__(
        self,
        score: Callable[[Candidate], float],
        grid: Sequence[int],
        blocks: int,
        settings: SearchSettings,
        uniform: Sequence[int] | None,
    ):
        self.score, self.settings = score, settings
        self.rng = random.Random(settings.seed)
        self.operators = Operators(grid, blocks, settings, self.rng)
        self.identity = {**asdict(settings), "grid": [min(grid), max(grid), len(grid)], "blocks": blocks}
        self.scores: dict[Candidate, float] = {}
        self.history: list[float] = []
        self.epoch = 0
        self.pruning_since: int | None = None
        self.waiting = self._first(uniform)

    @property
    def top(self) -> list[Candidate]:
        """The best candidates so far, best first."""
        return heapq.nsmallest(self.settings.select_num, self.scores, key=self.scores.__getitem__)

    def run(self, progress: bool, on_evaluation: Callable[[int], None] | None) -> None:
        """Evaluate until the last epoch is done. May be stopped between two evaluations and called again."""
        total = self.settings.population * self.settings.max_epochs
        with tqdm(total=total, initial=len(self.scores), desc="schedule search", disable=not progress) as bar:
            while self.epoch < self.settings.max_epochs:
                while self.waiting:
                    value = float(self.score(self.waiting[0]))
                    self.scores[self.waiting.pop(0)] = value if math.isfinite(value) else math.inf
                    bar.update(1)
                    if on_evaluation is not None:
                        on_evaluation(len(self.scores) - 1)
                self._next_epoch()
                bar.set_postfix(best=f"{self.history[-1]:.4g}")

    def _first(self, uniform: Sequence[int] | None) -> list[Candidate]:
        p, chosen = self.settings.population, []
        if uniform is not None:
            start = self.operators.within_budget([Stop(t) for t in uniform])
            chosen = [start]
            self._fill(chosen, 1 + p // 2, self.operators.random)
            self._fill(chosen, p, lambda: self.operators.mutated(start, FIRST_MUTATION))
        self._fill(chosen, p, self.operators.random)
        return chosen

    def _fill(self, chosen: list[Candidate], size: int, make: Callable[[], Candidate | None]) -> None:
        """Add new candidates up to `size`; gives up after `TRIES` attempts per missing one."""
        for _ in range(TRIES * max(0, size - len(chosen))):
            if len(chosen) >= min(size, self.settings.population):
                return
            candidate = make()
            if candidate is not None and candidate not in self.scores and candidate not in chosen:
                chosen.append(candidate)

    def _next_epoch(self) -> None:
        s, best, operators = self.settings, self.top, self.operators
        self.history.append(self.scores[best[0]])
        self.epoch += 1
        if self.epoch == s.max_epochs:
            return
        operators.range = self._pruning_range()
        chosen: list[Candidate] = []
        self._fill(chosen, s.mutation_num, lambda: operators.mutated(self.rng.choice(best), s.mutation_prob))
        self._fill(chosen, len(chosen) + s.crossover_num, lambda: operators.crossed(*self._pair(best)))
        self._fill(chosen, s.population, operators.random)
        self.waiting = chosen

    def _pair(self, best: list[Candidate]) -> list[Candidate]:
        return self.rng.sample(best, 2) if len(best) > 1 else best * 2

    def _pruning_range(self) -> tuple[float, float]:
        """Share of the blocks that the next epoch may leave out: none at first, then up to max_prun in five epochs."""
        s = self.settings
        if not self.operators.blocks or s.max_prun == 0:
            return (0.0, 0.0)
        stalled = len(self.history) > 1 and self.history[-1] == self.history[-2]
        if self.pruning_since is None and (stalled or self.epoch > PRUNING_EPOCH - 1):
            self.pruning_since = self.epoch
        if self.pruning_since is None:
            return (0.0, 0.0)
        high = min(s.max_prun, s.max_prun / 5 * (self.epoch - self.pruning_since + 1))
        return (min(s.min_prun, high) if self.epoch > PRUNING_EPOCH else 0.0, high)

    def save(self, path: str | Path) -> None:
        """Write everything that `load` needs as JSON."""
        version, numbers, rest = self.rng.getstate()
        state = {
            "search": self.identity,
            "random": [version, list(numbers), rest],
            "scores": [[_plain(c), v] for c, v in self.scores.items()],
            "waiting": [_plain(c) for c in self.waiting],
            "history": self.history,
            "epoch": self.epoch,
            "pruning_since": self.pruning_since,
            "range": self.operators.range,
        }
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(path)

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`.

        Raises:
            ValueError: It is no such file, or of a search with other parameters.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            search = state["search"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the state of a schedule search: {error}") from error
        differing = {k: (search.get(k), v) for k, v in self.identity.items() if search.get(k) != v}
        if differing:
            text = ", ".join(f"{k} {there} (here {here})" for k, (there, here) in differing.items())
            raise ValueError(f"{path} is of another search: {text}")
        version, numbers, rest = state["random"]
        self.rng.setstate((version, tuple(numbers), rest))
        self.scores = {_read(c): float(v) for c, v in state["scores"]}
        self.waiting = [_read(c) for c in state["waiting"]]
        self.history, self.epoch = list(state["history"]), state["epoch"]
        self.pruning_since, self.operators.range = state["pruning_since"], tuple(state["range"])


def _plain(candidate: Candidate) -> list:
    return [[s.timestep, list(s.skips)] for s in candidate]


def _read(values: list) -> Candidate:
    return tuple(Stop(int(t), tuple(skips)) for t, skips in values)
