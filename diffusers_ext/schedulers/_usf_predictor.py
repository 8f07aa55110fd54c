"""The predictor of S^3: ranks solver schedules that have not been run by those that have.

Steps are embedded one by one, read in order by a recurrent network, and the result is trained on pairs: the worse of
two evaluated schedules must get the higher value. Only the order of its values means anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ._usf_schedule import AFS, CORRECTORS, MAX_ORDER, PREDICTIONS, RELAXATIONS, SolverSchedule


WIDTH = 32
ITERATIONS = 120
LEARNING_RATE = 1e-2
MARGIN = 0.1
WEIGHT_DECAY = 1e-3


def _one_hot(value, known: Sequence) -> list[float]:
    return [float(value == k) for k in known]


def describe(schedule: SolverSchedule) -> torch.Tensor:
    """Features `[steps, d]` of every choice of a schedule; the first step is also told the analytic first step."""
    rows = []
    for i, (step, before, after) in enumerate(zip(schedule.steps, schedule.times, schedule.times[1:])):
        formula = step.formula
        first = formula.derivatives[0] if formula.derivatives else None
        rows.append(
            [
                before,
                after,
                math.log(before + 1e-3),
                math.log(after + 1e-3),
                *_one_hot(formula.order, range(1, MAX_ORDER + 1)),
                *_one_hot(formula.prediction, PREDICTIONS),
                float(formula.start),
                float(len(first.points)) if first else 0.0,
                *_one_hot(first.relaxation if first else None, RELAXATIONS),
                first.coefficient if first else 0.0,
                *_one_hot(step.corrector, CORRECTORS),
                *_one_hot(schedule.afs if i == 0 else None, AFS),
            ]
        )
    return torch.tensor(rows, dtype=torch.float32)


class SchedulePredictor(nn.Module):
    """Value of a solver schedule, lower for better ones.

    Args:
        seed: Seed of the weights; nothing else is random.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        features = 7 + MAX_ORDER + len(PREDICTIONS) + len(RELAXATIONS) + len(CORRECTORS) + len(AFS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Sequential(nn.Linear(features, WIDTH), nn.SiLU())
            self.read = nn.GRU(WIDTH, WIDTH, batch_first=True)
            self.value = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def forward(self, schedules: Sequence[SolverSchedule]) -> torch.Tensor:
        """Values `[n]`."""
        parts = [(describe(s) - self.mean) / self.scale for s in schedules]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        read, _ = self.read(self.embed(padded))
        last = torch.tensor([len(part) - 1 for part in parts])
        return self.value(read[torch.arange(len(parts)), last])[:, 0]

    @torch.enable_grad()
    def fit(self, schedules: Sequence[SolverSchedule], scores: Sequence[float]) -> SchedulePredictor:
        """Train on evaluated schedules with the pairwise ranking loss max(0, margin - (v_i - v_j)), i worse than j."""
        rows = torch.cat([describe(s) for s in schedules])
        self.mean.copy_(rows.mean(0))
        self.scale.copy_(rows.std(0).clamp(min=1e-3))
        y = torch.tensor(scores, dtype=torch.float64)
        worse = y[:, None] > y[None, :]
        optimiser = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(ITERATIONS if worse.any() else 0):
            v = self(schedules)
            loss = torch.relu(MARGIN - (v[:, None] - v[None, :]))[worse].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return self

    @torch.no_grad()
    def best(self, schedules: Sequence[SolverSchedule]) -> SolverSchedule:
        """The one that it expects to be best."""
        return schedules[int(self(schedules).argmin())]
