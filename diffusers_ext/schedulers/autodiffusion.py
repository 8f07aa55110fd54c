"""AutoDiffusion: which few timesteps to visit, and which blocks to leave out there, found by evolutionary search.

Nothing is trained: a candidate is a list of timesteps, its fitness how good the samples are that it leads to, always
from the same noise. https://arxiv.org/abs/2309.10438
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..apply import Attachment, MethodConfig, denoiser_of
from ..eval.metrics import frechet_distance
from ..prediction import NoiseSchedule
from ..registry import Claim, MethodRecord, register
from ._autodiffusion_blocks import BlockSkipHook, install_skips, require_blocks, skippable_blocks, skipping
from ._autodiffusion_schedule import apply_schedule, remove_schedule
from ._autodiffusion_search import Candidate, Evolution, SearchSettings
from ._common import guided_model, require_choice
from ._pictures import latent_shape


__all__ = [
    "BlockSkipHook",
    "ScheduleSearchResult",
    "TimestepSearch",
    "apply_schedule",
    "gaussian_frechet",
    "remove_schedule",
    "skippable_blocks",
    "trajectory_mse",
]

FITNESSES = ("trajectory_mse", "gaussian_frechet")
_FORMAT = "diffusers_ext.autodiffusion"


def trajectory_mse(reference: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Fitness: mean squared error of samples to what many steps make of the same noise."""
    return lambda samples: (samples - reference).square().mean().item()


def gaussian_frechet(
    reference: torch.Tensor, features: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Callable[[torch.Tensor], float]:
    """Fitness: Frechet distance |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) of samples to real data.

    Args:
        reference: Features of real data, `[n, d]`.
        features: Samples -> `[m, d]`, e.g. pooled latents or a classifier's features. Default: flattened samples.
    """
    return lambda samples: frechet_distance(samples.flatten(1) if features is None else features(samples), reference)


def pooled(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[n, c, h, w]` averaged to 4 x 4 places, or packed tokens `[n, t, c]` averaged: features `[n, d]`."""
    return (latents.mean(1) if latents.ndim == 3 else adaptive_avg_pool2d(latents, 4)).flatten(1)


def sigmas_of(timesteps: Sequence[float], schedule: NoiseSchedule) -> tuple[float, ...]:
    """Noise levels as diffusers' and ComfyUI's samplers take them: sigma / alpha, sigma for flow models, last 0."""
    alpha, sigma = schedule.levels(schedule.log_snr(torch.tensor(timesteps, dtype=torch.float64)))
    return (*(sigma if schedule.family == "flow" else sigma / alpha).tolist(), 0.0)


@register(
    MethodRecord(
        slug="autodiffusion",
        family="schedulers",
        kind="tool",
        title="AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion "
        "Model Acceleration",
        arxiv="2309.10438",
        summary="Search the 4 to 10 timesteps, and the blocks to leave out, that suit your model and sampler best.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXLoadSearchedSigmas", "DXSearchSigmas", "DXApplyBlockSkipSchedule"),
        claim=Claim(
            text="FID at four steps (DDIM with uniform steps: 138.66)",
            setting="guided diffusion model, ImageNet 64 x 64, four steps",
            value=17.86,
            unit="FID",
        ),
    )
)
@dataclass(frozen=True)
class ScheduleSearchResult(MethodConfig):
    """What a search has found: a short list of timesteps and what to leave out at each of them, for any sampler.

    `apply(pipe, result)` lets the pipeline's scheduler visit the timesteps and leaves the blocks out, until it is
    removed; `apply_schedule(scheduler, result)` does the first alone. Paper: https://arxiv.org/abs/2309.10438

    Args:
        timesteps: Falling and distinct.
        sigmas: Noise levels there, sigma / alpha or a flow model's sigma, and a last 0.
        skip_blocks: Per timestep, names of the blocks that the identity stands in for; empty for none.
        score: Fitness, lower is better.
        history: Best score after each epoch.

    Raises:
        ValueError: Lists of different length, timesteps that do not fall; on `apply`, an unknown block, one that
            changes shapes, or a scheduler that cannot visit the timesteps.

    Example:
        >>> import diffusers_ext
        >>> result = diffusers_ext.ScheduleSearchResult.load("four-steps.json")
        >>> with diffusers_ext.apply(pipe, result):
        ...     image = pipe("a red circle", num_inference_steps=4).images[0]

    Limits: one number of steps, and the model and guidance scale it was searched with.
    """

    timesteps: tuple[int, ...] = ()
    sigmas: tuple[float, ...] = ()
    skip_blocks: tuple[tuple[str, ...], ...] = ()
    score: float = float("inf")
    history: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("timesteps", "sigmas", "history"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "skip_blocks", tuple(tuple(row) for row in self.skip_blocks))
        n = len(self.timesteps)
        if any(b >= a for a, b in zip(self.timesteps, self.timesteps[1:])) or any(t < 0 for t in self.timesteps):
            raise ValueError(f"timesteps must fall, be distinct and not below 0, got {list(self.timesteps)}")
        if len(self.sigmas) != (n + 1 if n else 0) or len(self.skip_blocks) not in (0, n):
            raise ValueError(
                f"{n} timesteps need {n + 1} sigmas and no or {n} lists of blocks, got {len(self.sigmas)} and "
                f"{len(self.skip_blocks)}"
            )

    @property
    def skips(self) -> dict[int, tuple[str, ...]]:
        """Timestep -> blocks left out there."""
        return dict(zip(self.timesteps, self.skip_blocks))

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        values = {"format": _FORMAT, **asdict(self)}
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> ScheduleSearchResult:
        """Read a file of `save`.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no searched schedule: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} holds no searched schedule: make one with ScheduleSearchResult.save")
        return cls.from_dict(values)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        require_blocks(denoiser_of(target), sorted({name for row in self.skip_blocks for name in row}))
        n = len(self.timesteps)
        if self.timesteps and num_inference_steps not in (None, n):
            return (f"autodiffusion: this schedule has {n} steps, not {num_inference_steps}",)
        return ()

    def attach(self, target: Any) -> Attachment:
        undo, summary = install_skips(denoiser_of(target), self.skips)
        scheduler = getattr(target, "scheduler", None) if self.timesteps else None
        try:
            if scheduler is not None:
                apply_schedule(scheduler, self)
        except BaseException:
            undo()
            raise

        def remove() -> None:
            undo()
            if scheduler is not None:
                remove_schedule(scheduler)

        return Attachment(remove, summary)


class PipelineSampler:
    """Samples of a pipeline for a candidate: always the same prompts and noise, through the pipeline's own scheduler.

    Args:
        pipe: Stable Diffusion or Flux layout.
        prompts: One sample each.
        guidance_scale: The one you will sample with.
        scheduler: Sampler to search for; default the pipeline's.
        seed: Seed of the noise.
        size: Height and width in pixels; default the pipeline's.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        guidance_scale: float = 1.0,
        scheduler: Any = None,
        seed: int = 0,
        size: int | None = None,
    ):
        self.model, self.denoiser = guided_model(pipe, prompts, guidance_scale), denoiser_of(pipe)
        self.scheduler, self.seed = copy.deepcopy(scheduler or pipe.scheduler), seed
        shape = (len(prompts), *latent_shape(pipe, size))
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.noise = self.noise.to(self.denoiser.device, self.denoiser.dtype)

    def __call__(self, candidate: ScheduleSearchResult) -> torch.Tensor:
        """Final latents of a candidate."""
        scheduler = apply_schedule(copy.deepcopy(self.scheduler), candidate)
        with skipping(self.denoiser, candidate.skips):
            return self.run(scheduler, len(candidate.timesteps))

    @torch.no_grad()
    def run(self, scheduler: Any, steps: int) -> torch.Tensor:
        """Final latents of any scheduler."""
        scheduler.set_timesteps(steps, device=self.noise.device)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        random = {"generator": torch.Generator().manual_seed(self.seed)} if takes_generator else {}
        x = self.noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(self.model(inputs, t), t, x, return_dict=False, **random)[0]
        return x

    def own_timesteps(self, steps: int, grid: range) -> list[int] | None:
        """Where the scheduler itself would go, on the grid; None where it takes other numbers of steps."""
        if steps > len(grid):
            return None
        scheduler = copy.deepcopy(self.scheduler)
        shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **shifted)
        times = sorted({min(max(round(float(t)), grid[0]), grid[-1]) for t in scheduler.timesteps}, reverse=True)
        return times if len(times) == steps else None

    def reference(self, steps: int) -> torch.Tensor:
        """What `steps` third-order steps of DPM-Solver++ make of the noise."""
        from .usf_s3 import USFScheduler

        return self.run(USFScheduler.from_config(self.scheduler.config, preset="dpmpp_3m"), steps)


class TimestepSearch:
    """Searches the K timesteps, and the blocks to leave out, that give the best samples of one model and sampler.

    An evolution: a population of candidates is scored, the best are mutated and crossed, random ones are added. Every
    candidate is drawn from the same noise, and none is ever evaluated twice. Blocks are left out only after five
    epochs, or when the best candidate stops changing. `save` and `load` stop and resume a search at any evaluation.
    Paper: https://arxiv.org/abs/2309.10438

    Args:
        sampler: `ScheduleSearchResult -> samples`; draw with `result.timesteps` (or `.sigmas`) and leave out
            `result.skip_blocks`, always from the same noise.
        num_steps: K.
        fitness: `samples -> float`, lower is better: `trajectory_mse(reference)`, `gaussian_frechet(reference)` or
            your own; not finite counts as worst.
        noise_schedule: Noise levels of the model; timesteps are chosen from its own (1 to 1000 for flow models).
        population: Candidates per epoch, P. Default 50.
        select_num: Size of the pool of parents. Default 10.
        mutation_num: Mutated candidates per epoch. Default half of the population.
        crossover_num: Crossed candidates per epoch. Default a fifth of the population; the rest is random.
        mutation_prob: Chance that a mutation replaces a timestep or a left-out block. Default 0.25.
        max_epochs: Populations evaluated: 10 for timesteps, 15 with blocks.
        uniform: Timesteps that half of the first population is built around. Default: even spacing; `()` for a
            random first population.
        blocks: Names of the blocks that may be left out, e.g. `skippable_blocks(unet)`. Default none.
        max_prun: Largest share of the blocks left out at a step. Default 0.1.
        min_prun: Smallest one, from the sixth epoch on.
        max_blocks: Budget of executed blocks per picture: cheaper steps make room for more of them. Default: always K
            steps.
        seed: Same seed, same search.

    Raises:
        ValueError: K is larger than the number of timesteps, or a parameter is out of range.

    Example:
        >>> search = TimestepSearch.for_pipeline(pipe, ["a red circle", "a blue star"], num_steps=4)
        >>> result = search.run()
        >>> with diffusers_ext.apply(pipe, result):
        ...     image = pipe("a red circle", num_inference_steps=4).images[0]
    """

    def __init__(
        self,
        sampler: Callable[[ScheduleSearchResult], torch.Tensor],
        num_steps: int,
        fitness: Callable[[torch.Tensor], float],
        noise_schedule: NoiseSchedule,
        population: int = 50,
        select_num: int = 10,
        mutation_num: int | None = None,
        crossover_num: int | None = None,
        mutation_prob: float = 0.25,
        max_epochs: int = 10,
        uniform: Sequence[int] | None = None,
        blocks: Sequence[str] = (),
        max_prun: float = 0.1,
        min_prun: float = 0.0,
        max_blocks: int | None = None,
        seed: int = 0,
    ):
        self.sampler, self.fitness, self.noise_schedule, self.blocks = sampler, fitness, noise_schedule, tuple(blocks)
        mutation_num = population // 2 if mutation_num is None else mutation_num
        crossover_num = population // 5 if crossover_num is None else crossover_num
        counts = (num_steps, population, select_num, mutation_num, crossover_num, mutation_prob, max_epochs)
        settings = SearchSettings(*counts, min_prun, max_prun, max_blocks, seed)
        grid = grid_of(noise_schedule)
        if num_steps > len(grid):
            raise ValueError(f"num_steps is {num_steps}, but the model has only {len(grid)} timesteps")
        if max_blocks is not None and not 0 < len(self.blocks) <= max_blocks:
            raise ValueError(
                f"max_blocks is {max_blocks}: it must allow one whole step, and needs `blocks` ({len(self.blocks)})"
            )
        start = even(grid, num_steps) if uniform is None else sorted({int(t) for t in uniform}, reverse=True) or None
        if start is not None and (len(start) != num_steps or not set(start) <= set(grid)):
            raise ValueError(f"uniform holds {start}; it must be {num_steps} distinct timesteps of the model")
        self._evolution = Evolution(self._score, grid, len(self.blocks), settings, start)

    @classmethod
    def for_pipeline(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        num_steps: int,
        guidance_scale: float = 1.0,
        fitness: str | Callable[[torch.Tensor], float] = "trajectory_mse",
        scheduler: Any = None,
        reference_steps: int = 40,
        leave_out_blocks: bool = False,
        size: int | None = None,
        **options,
    ) -> TimestepSearch:
        """A search on a text-to-image pipeline.

        Args:
            pipe: Stable Diffusion or Flux layout.
            prompts: What to draw, one sample each; 4 to 16 are enough for `"trajectory_mse"`.
            num_steps: K.
            guidance_scale: The one you will sample with.
            fitness: `"trajectory_mse"` (distance to `reference_steps` steps), `"gaussian_frechet"` (of pooled latents
                to those; many prompts) or `latents -> float`.
            scheduler: Sampler to search for; default the pipeline's.
            reference_steps: Steps of the reference.
            leave_out_blocks: Search blocks to leave out as well.
            size: Height and width in pixels; default the pipeline's.
            options: Others of `TimestepSearch`.
        """
        sampler = PipelineSampler(pipe, prompts, guidance_scale, scheduler, options.get("seed", 0), size)
        if not callable(fitness):
            require_choice("fitness", fitness, FITNESSES)
            end = sampler.reference(reference_steps)
            by_name = {"trajectory_mse": lambda: trajectory_mse(end)}
            by_name["gaussian_frechet"] = lambda: gaussian_frechet(pooled(end), pooled)
            fitness = by_name[fitness]()
        blocks = tuple(skippable_blocks(denoiser_of(pipe))) if leave_out_blocks else ()
        schedule = NoiseSchedule.from_scheduler(sampler.scheduler)
        own = {"blocks": blocks, "uniform": sampler.own_timesteps(num_steps, grid_of(schedule))}
        return cls(sampler, num_steps, fitness, schedule, **{**own, **options})

    @property
    def result(self) -> ScheduleSearchResult:
        """The best schedule so far.

        Raises:
            RuntimeError: Nothing has been evaluated.
        """
        top = self._evolution.top
        if not top:
            raise RuntimeError("nothing has been evaluated yet: call run()")
        found = self._candidate(top[0])
        values = {"score": self._evolution.scores[top[0]], "history": tuple(self._evolution.history)}
        return ScheduleSearchResult(found.timesteps, found.sigmas, found.skip_blocks, **values)

    @property
    def start_score(self) -> float:
        """Score of the first candidate: that of the `uniform` timesteps, unless the first population is random."""
        return next(iter(self._evolution.scores.values()))

    @property
    def max_evaluations(self) -> int:
        """Candidates that the whole search evaluates at most."""
        settings = self._evolution.settings
        return settings.population * settings.max_epochs

    @property
    def evaluations(self) -> int:
        """Candidates evaluated so far."""
        return len(self._evolution.scores)

    def report(self) -> str:
        """A sentence or two: what has been found, and how it compares with where the search began."""
        found = self.result
        left_out = sum(len(row) for row in found.skip_blocks)
        blocks = f", {left_out} of {len(self.blocks) * len(found.timesteps)} blocks left out" if self.blocks else ""
        return (
            f"{len(found.timesteps)} steps at {', '.join(map(str, found.timesteps))}{blocks}. Fitness "
            f"{found.score:.4g} after {self.evaluations} schedules; the first one had {self.start_score:.4g}."
        )

    def run(self, progress: bool = True, on_evaluation: Callable[[int], None] | None = None) -> ScheduleSearchResult:
        """Search to the end and return the best schedule.

        Ctrl-C, or an exception from `on_evaluation` (called with the number of the evaluation), stops it between two
        evaluations; `run` goes on from there.
        """
        self._evolution.run(progress, on_evaluation)
        return self.result

    def save(self, path: str | Path) -> None:
        """Write the state of the search as JSON: what has been evaluated, what waits, the random numbers."""
        self._evolution.save(path)

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`.

        Raises:
            ValueError: It is no such file, or of a search with other parameters.
        """
        self._evolution.load(path)

    def _candidate(self, stops: Candidate) -> ScheduleSearchResult:
        times = tuple(s.timestep for s in stops)
        skips = tuple(tuple(self.blocks[i] for i in s.skips) for s in stops)
        return ScheduleSearchResult(times, sigmas_of(times, self.noise_schedule), skips if any(skips) else ())

    def _score(self, stops: Candidate) -> float:
        return self.fitness(self.sampler(self._candidate(stops)))


def grid_of(schedule: NoiseSchedule) -> range:
    """Timesteps to choose from: 0 to T - 1 of a discrete model, 1 to T of a flow model."""
    if schedule.family == "ve":
        raise ValueError("models with continuous noise levels (EDM) have no timesteps to choose from")
    return range(len(schedule.table)) if schedule.table is not None else range(1, schedule.num_train_timesteps + 1)


def even(grid: Sequence[int], steps: int) -> list[int]:
    """Timesteps at even distances, the noisiest one first."""
    return [grid[round(len(grid) * (steps - i) / steps) - 1] for i in range(steps)]
