"""OLSS: a few steps fitted to the trajectories of many by ordinary least squares.

A step writes the next sample as a linear combination of the starting noise and all model outputs so far:
x^(k+1) = w_k x_0 + sum_{j <= k} W_kj e_j. https://arxiv.org/abs/2305.14677
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ..registry import Claim, MethodRecord, register
from ._checkpoint import require_size, write_tensors
from ._common import NoiseLevelScheduler, require_choice, schedule_config
from ._native import NativeRun


__all__ = ["OLSSCoefficients", "OLSSRecorder", "OLSSScheduler", "fit_olss"]

logger = logging.getLogger(__name__)
PATHS = ("search", "uniform")
_ILL_CONDITIONED = 1e8
_DEPENDENT = 1e-13  # columns that only rounding tells apart count as one, on every CPU
_FORMAT = "diffusers_ext.olss_runs"
_RANDOM = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "ERSDE", "SASolver")


@dataclass(frozen=True)
class OLSSCoefficients:
    """The fitted steps.

    Args:
        indices: Teacher steps that are visited, from 0.
        timesteps: Timesteps (or noise levels) there.
        wx: Weight of the starting noise in each of the K steps.
        we: `K` rows of weights of the model outputs so far, row k has k + 1 of them.
        error: Mean squared error of each step on the recorded trajectories.
        condition: Largest condition number of the K regressions.
    """

    indices: tuple[int, ...]
    timesteps: tuple[float, ...]
    wx: tuple[float, ...]
    we: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    condition: float

    def __post_init__(self) -> None:
        k = len(self.wx)
        if k == 0 or len(self.timesteps) < k or [len(row) for row in self.we] != list(range(1, k + 1)):
            rows = [len(row) for row in self.we]
            raise ValueError(f"OLSS coefficients of {k} steps need rows of 1 to {k} weights and {k} times, got {rows}")

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        part = Path(path).with_suffix(".part")
        part.write_text(json.dumps({"format": "diffusers_ext.olss", **self.__dict__}) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> OLSSCoefficients:
        """Read a file of `save`.

        Raises:
            ValueError: It is not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no OLSS coefficients: {error}") from error
        if not isinstance(values, dict) or values.pop("format", None) != "diffusers_ext.olss":
            raise ValueError(f"{path} holds no OLSS coefficients: make them with OLSSCoefficients.save")
        rows = tuple(tuple(row) for row in values.pop("we"))
        return cls(we=rows, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def step_olss(x_0: torch.Tensor, outputs: Sequence[torch.Tensor], wx: float, we: Sequence[float]) -> torch.Tensor:
    """w x_0 + sum_j W_j e_j, in x_0's dtype.

    The terms are much larger than their sum, so it is taken in float64 wherever the device has it.
    """
    work = x_0.dtype if x_0.device.type == "mps" else torch.float64
    x = wx * x_0.to(work)
    for weight, output in zip(we, outputs):
        x = x.add_(output.to(work), alpha=weight)
    return x.to(x_0.dtype)


class _Regressions:
    """Least squares among recorded vectors, on their triangular factor: every residual keeps its length.

    Args:
        x: States, `[M + 1, ...]`.
        e: Model outputs, `[M, ...]`.
        ridge: Tikhonov term per equation.
    """

    def __init__(self, x: torch.Tensor, e: torch.Tensor, ridge: float):
        columns = torch.cat([x.flatten(1), e.flatten(1)]).double().T.numpy()
        self.equations, self.ridge, self.m = len(columns), ridge, len(e)
        small = columns if len(columns) <= columns.shape[1] else np.linalg.qr(columns, mode="r")
        self.x, self.e = small[:, : self.m + 1], small[:, self.m + 1 :]

    def solve(self, start: int, outputs: Sequence[int], target: int) -> tuple[np.ndarray, float, float]:
        """Coefficients of state `start` and of `outputs` for state `target`, mean squared error, condition number."""
        a, y = np.column_stack([self.x[:, start], self.e[:, list(outputs)]]), self.x[:, target]
        damping = (self.ridge * self.equations) ** 0.5 * np.eye(a.shape[1])
        damped, goal = np.concatenate([a, damping]), np.concatenate([y, np.zeros(a.shape[1])])
        lengths = np.linalg.norm(damped, axis=0).clip(min=1e-300)
        w, _, _, values = np.linalg.lstsq(damped / lengths, goal, rcond=_DEPENDENT)
        w = w / lengths
        return w, float(np.square(a @ w - y).sum() / self.equations), float(values[0] / values[-1].clip(min=1e-300))


def uniform_path(m: int, k: int) -> list[int]:
    """K teacher steps at equal distances."""
    return list(range(0, m, m // k))[:k]


def _furthest(regressions: _Regressions, path: list[int], max_error: float) -> int:
    low, high = path[-1] + 1, regressions.m
    while low < high:
        middle = (low + high + 1) // 2
        if regressions.solve(path[-1], path, middle)[1] > max_error:
            high = middle - 1
        else:
            low = middle
    return low


def _greedy_path(regressions: _Regressions, k: int, max_error: float) -> list[int] | None:
    """The path whose steps go as far as the error allows; None if K steps do not reach the end."""
    path = [0]
    for _ in range(k):
        following = _furthest(regressions, path, max_error)
        if following == regressions.m:
            return path
        path.append(following)
    return None


def search_path(
    regressions: _Regressions, k: int, max_error: float = 10.0, iterations: int = 30, progress: bool = False
) -> list[int]:
    """K teacher steps with the smallest error bound that a greedy path keeps, by bisection of the bound."""
    low, high = 0.0, max_error
    for _ in tqdm(range(iterations), desc="OLSS path", disable=not progress):
        middle = (low + high) / 2
        if _greedy_path(regressions, k, middle) is None:
            low = middle
        else:
            high = middle
    path = _greedy_path(regressions, k, high)
    if path is None:
        raise ValueError(
            f"no path of {k} steps has an error below {max_error}: raise max_error or the number of steps"
        )
    while len(path) < k:  # a path may be shorter than K: split its longest steps
        gaps = [b - a for a, b in zip(path, [*path[1:], regressions.m])]
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        path.insert(widest + 1, path[widest] + gaps[widest] // 2)
    return path


def fit_olss(
    timesteps: Sequence[float],
    x: torch.Tensor,
    e: torch.Tensor,
    num_inference_steps: int,
    path: str = "search",
    ridge: float = 1e-6,
    max_error: float = 10.0,
    iterations: int = 30,
    progress: bool = False,
) -> OLSSCoefficients:
    """Fit K steps to recorded trajectories of M steps.

    Args:
        timesteps: `M` falling timesteps of the teacher.
        x: `[M + 1, ...]` states: the starting noise, ..., the result.
        e: `[M, ...]` model outputs, after guidance.
        num_inference_steps: K, at most M.
        path: Which teacher steps to visit: `"search"` (smallest largest error) or `"uniform"`.
        ridge: Tikhonov term per equation, >= 0. 0 is the published fit, which can blow up with many steps.
        max_error: Largest error bound of the search.
        iterations: Bisections of the search.
        progress: Show a progress bar.

    Raises:
        ValueError: Shapes do not fit, K is out of range, or there are fewer equations than unknowns.
    """
    m, k = len(e), int(num_inference_steps)
    require_choice("path", path, PATHS)
    if len(x) != m + 1 or x.shape[1:] != e.shape[1:] or len(timesteps) != m:
        raise ValueError(
            f"{len(timesteps)} timesteps, states {tuple(x.shape)} and outputs {tuple(e.shape)} do not fit: M steps "
            "need M + 1 states and M outputs"
        )
    if not 1 <= k <= m or ridge < 0:
        raise ValueError(f"num_inference_steps is {k} (1 to {m}), ridge {ridge} (0 or more)")
    if e[0].numel() < k + 1:
        raise ValueError(f"{e[0].numel()} recorded numbers cannot fit {k + 1} coefficients: record more images")
    regressions = _Regressions(x.detach().cpu(), e.detach().cpu(), ridge)
    visited = uniform_path(m, k) if path == "uniform" else search_path(regressions, k, max_error, iterations, progress)
    wx, we, errors, condition = [], [], [], 1.0
    for i, target in enumerate([*visited[1:], m]):
        w, error, spread = regressions.solve(0, visited[: i + 1], target)
        condition = max(condition, spread)
        wx.append(float(w[0]))
        we.append(tuple(w[1:].tolist()))
        errors.append(error)
    if condition > _ILL_CONDITIONED:
        logger.warning(
            "OLSS: the regressions have condition number %.1e; sampling may drift away from the teacher. Use "
            "ridge=1e-6 or fewer steps",
            condition,
        )
    times = tuple(float(timesteps[i]) for i in visited)
    return OLSSCoefficients(tuple(visited), times, tuple(wx), tuple(we), tuple(errors), condition)


class OLSSRecorder:
    """Stands in for a pipeline's scheduler and remembers what it did, for `OLSSScheduler.fit`.

    Args:
        scheduler: A deterministic scheduler with one model call per step (DDIM, DPM-Solver++, Euler, UniPC, ...).

    Raises:
        ValueError: It is stochastic, or makes several calls per step.

    Example:
        >>> pipe.scheduler = recorder = OLSSRecorder(DDIMScheduler.from_config(pipe.scheduler.config))
        >>> pipe(["a red circle", "a blue star"], num_inference_steps=50)
        >>> pipe.scheduler = OLSSScheduler.fit(recorder, num_inference_steps=8)

    Runs add up, and one that is stopped half-way does not count: call the pipeline again for what is missing. `save`
    and `load` carry what has been recorded to another process.

    Limits: keeps a copy of every latent in main memory: 2 M + 1 of them per image.
    """

    def __init__(self, scheduler):
        name, config = type(scheduler).__name__, scheduler.config
        random = any(part in name for part in _RANDOM) or config.get("stochastic_sampling")
        if random or str(config.get("algorithm_type", "")).startswith("sde"):
            raise ValueError(f"{name} adds noise, which no linear formula can reproduce: record DDIM or DPM-Solver++")
        if scheduler.order != 1:
            raise ValueError(f"{name} calls the model several times per step: record a scheduler of order 1")
        self.scheduler = scheduler
        self.runs: list[dict[str, Any]] = []
        # pipelines look at the signatures of these two
        self.set_timesteps = functools.wraps(scheduler.set_timesteps)(lambda *a, **k: self._set_timesteps(*a, **k))
        self.step = functools.wraps(scheduler.step)(lambda *a, **k: self._step(*a, **k))

    def __getattr__(self, name: str):
        return getattr(self.__dict__["scheduler"], name)

    def _set_timesteps(self, *args, **kwargs) -> None:
        self.scheduler.set_timesteps(*args, **kwargs)
        self.runs.append({"timesteps": [float(t) for t in self.scheduler.timesteps], "x": [], "e": []})

    def _step(self, model_output, timestep, sample, *args, **kwargs):
        bound = inspect.signature(self.scheduler.step).bind_partial(model_output, timestep, sample, *args, **kwargs)
        if bound.arguments.get("eta"):
            raise ValueError(f"eta is {bound.arguments['eta']}: a teacher for OLSS must not add noise")
        result = self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
        run = self.runs[-1]
        run["x"].append(sample.detach().cpu().clone())
        run["e"].append(model_output.detach().cpu().clone())
        run["end"] = (result[0] if isinstance(result, tuple) else result.prev_sample).detach().cpu().clone()
        return result

    def trajectories(self) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        """`(timesteps, x [M + 1, n, ...], e [M, n, ...])` of all complete runs, images side by side.

        Raises:
            RuntimeError: Nothing has been recorded.
            ValueError: The runs have different timesteps.
        """
        complete = [run for run in self.runs if len(run["e"]) == len(run["timesteps"])]
        if not complete:
            raise RuntimeError("no complete run has been recorded: call the pipeline with this recorder as scheduler")
        if any(run["timesteps"] != complete[0]["timesteps"] for run in complete):
            raise ValueError("the recorded runs have different timesteps: record with one number of steps")
        x = torch.stack([torch.cat(states) for states in zip(*([*run["x"], run["end"]] for run in complete))])
        return complete[0]["timesteps"], x, torch.stack([torch.cat(es) for es in zip(*(r["e"] for r in complete))])

    def save(self, path: str | Path) -> None:
        """Write all complete runs to a safetensors file."""
        times, x, e = self.trajectories()
        tensors = {"timesteps": torch.tensor(times, dtype=torch.float64), "x": x, "e": e}
        write_tensors(path, tensors, {"format": _FORMAT})

    def load(self, path: str | Path) -> OLSSRecorder:
        """Add the runs of a file of `save`; sizes are checked before anything is allocated.

        Raises:
            ValueError: Not such a file, or its tensors do not fit together.
        """
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT or set(file.keys()) != {"timesteps", "x", "e"}:
                raise ValueError(f"{path} holds no recorded runs: make one with OLSSRecorder(...).save(path)")
            times, x, e = (list(file.get_slice(name).get_shape()) for name in ("timesteps", "x", "e"))
            if len(times) != 1 or x[:1] != [times[0] + 1] or e != [*times, *x[1:]]:
                raise ValueError(f"{path}: timesteps {times}, states {x} and outputs {e} do not fit together")
            require_size("states", *x)
            times, states, outputs = (file.get_tensor(name) for name in ("timesteps", "x", "e"))
        run = {"timesteps": times.tolist(), "x": list(states[:-1]), "e": list(outputs), "end": states[-1]}
        self.runs.append(run)
        return self


def sample_olss(model, x, sigmas, extra_args=None, callback=None, disable=None, coefficients=None):
    """OLSS as a ComfyUI sampler; e = (x - denoised) / sigma.

    Args:
        model, x, sigmas, extra_args, callback, disable: As ComfyUI passes them; `sigmas` are those of the fit.
        coefficients: `OLSSCoefficients` of `fit_native`, whose `timesteps` are noise levels.
    """
    run = NativeRun(model, x, sigmas, extra_args, callback)
    fitted = torch.tensor(coefficients.timesteps, dtype=torch.float64)
    given = torch.tensor(run.sigmas, dtype=torch.float64)
    if given.shape != fitted.shape or not torch.allclose(given, fitted, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"the sigmas are not those OLSS was fitted for ({len(fitted) - 1} steps): connect the OLSS Sigmas node"
        )
    start, outputs = x, []
    for i, (wx, we) in enumerate(zip(coefficients.wx, coefficients.we)):
        x0 = run.denoised(x, run.sigmas[i])
        run.report(i, x, x0)
        outputs.append((x - x0) / run.sigmas[i])
        x = step_olss(start, outputs, wx, we)
    return run.finish(x)


def fit_native(model, x, sigmas, extra_args, num_inference_steps: int, on_step: Callable[[int], None], **options):
    """Record Euler steps of a ComfyUI model from inside a sampler call and fit OLSS to them.

    Args:
        model, x, sigmas, extra_args: As ComfyUI passes them to a sampler; `sigmas` are the teacher's.
        num_inference_steps: Steps of the student.
        on_step: Called after every teacher step.
        options: Of `fit_olss`.
    """
    run = NativeRun(model, x, sigmas, extra_args)
    states, outputs = [x.cpu()], []
    for i in range(run.steps):
        output = (x - run.denoised(x, run.sigmas[i])) / run.sigmas[i]
        x = x + (run.sigmas[i + 1] - run.sigmas[i]) * output
        outputs.append(output.cpu())
        states.append(x.cpu())
        on_step(i)
    run.finish(x)
    levels, kept = run.sigmas[:-1], torch.stack(states)
    fitted = fit_olss(levels, kept, torch.stack(outputs), num_inference_steps, **options)
    return OLSSCoefficients(**{**fitted.__dict__, "timesteps": (*fitted.timesteps, run.sigmas[-1])})


@register(
    MethodRecord(
        slug="olss",
        family="schedulers",
        kind="scheduler",
        title="Optimal Linear Subspace Search: Learning to Construct Fast and High-Quality Schedulers for Diffusion "
        "Models",
        arxiv="2305.14677",
        summary="Few steps fitted by least squares to a few of your own many-step pictures, in seconds.",
        targets=("any",),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXOLSSFit", "DXOLSSSampler", "DXOLSSSigmas"),
        claim=Claim(
            text="Time for one Stable Diffusion picture without other optimisation",
            setting="NVIDIA A100",
            value=1.0,
            unit="second at most",
        ),
    )
)
class OLSSScheduler(NoiseLevelScheduler):
    """Sampler whose steps are fitted by least squares to recorded many-step runs.

    Paper: https://arxiv.org/abs/2305.14677. Make one with `fit`; the coefficients are in its config and travel with
    `save_pretrained`.

    Args:
        timesteps: The K timesteps it visits.
        wx: K weights of the starting noise.
        we: K rows of weights of the model outputs, row k has k + 1.
        noise_scale: `init_noise_sigma` of the teacher.
        input_sigmas: K noise levels by which an Euler-like teacher scales the model's input.

    The other options are those of `NoiseLevelScheduler`, of which only the model's noise levels have an effect.

    Example:
        >>> pipe.scheduler = recorder = OLSSRecorder(DDIMScheduler.from_config(pipe.scheduler.config))
        >>> pipe(["a red circle", "a blue star"], num_inference_steps=50)
        >>> pipe.scheduler = OLSSScheduler.fit(recorder, num_inference_steps=8)
        >>> image = pipe("a red circle", num_inference_steps=8).images[0]

    Limits: only the fitted number of steps, the guidance scale it was recorded with, and whole runs from pure noise.
    """

    needs_fit = True

    @schedule_config
    def __init__(
        self,
        timesteps: list | None = None,
        wx: list | None = None,
        we: list | None = None,
        noise_scale: float = 1.0,
        input_sigmas: list | None = None,
    ):
        self.coefficients = None
        if wx is not None:
            rows, places = tuple(map(tuple, we)), tuple(range(len(wx)))
            self.coefficients = OLSSCoefficients(places, tuple(timesteps), tuple(wx), rows, (), 1.0)
        self.init_noise_sigma = noise_scale
        self._x_0: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []

    @classmethod
    def fit(cls, recorder: OLSSRecorder, num_inference_steps: int, path: str = "search", **options) -> OLSSScheduler:
        """Fit a scheduler to what a recorder has seen.

        Args:
            recorder: After one or more runs of a pipeline.
            num_inference_steps: Steps of the new scheduler.
            path: `"search"` or `"uniform"`, see `fit_olss`.
            options: Others of `fit_olss`.
        """
        fitted = fit_olss(*recorder.trajectories(), num_inference_steps, path, **options)
        teacher = recorder.scheduler
        scaled = float(teacher.init_noise_sigma) != 1.0 if hasattr(teacher, "init_noise_sigma") else False
        sigmas = [float(teacher.sigmas[i]) for i in fitted.indices] if scaled else None
        scale = float(teacher.init_noise_sigma) if scaled else 1.0
        return cls.from_coefficients(fitted, teacher.config, noise_scale=scale, input_sigmas=sigmas)

    @classmethod
    def from_coefficients(cls, fitted: OLSSCoefficients, config=None, **options) -> OLSSScheduler:
        """A scheduler with given coefficients, for the model that `config` (of a scheduler) describes."""
        values = {"timesteps": list(fitted.timesteps), "wx": list(fitted.wx), "we": [list(row) for row in fitted.we]}
        scheduler = cls.from_config(config or {}, **values, **options)
        scheduler.coefficients = fitted
        return scheduler

    def _choose(self, steps, sigmas, timesteps, mu) -> tuple[torch.Tensor, torch.Tensor]:
        if self.coefficients is None:
            raise ValueError("OLSSScheduler has no coefficients yet: make one with OLSSScheduler.fit(recorder, steps)")
        if timesteps is not None or (sigmas is None and steps is None):
            raise ValueError("OLSSScheduler visits the timesteps it was fitted for: pass num_inference_steps only")
        # pipelines of flow models pass default sigmas; their number is the number of steps
        asked, k = len(sigmas) if sigmas is not None else steps, len(self.coefficients.wx)
        if asked != k:
            raise ValueError(f"num_inference_steps is {asked}, but this OLSSScheduler was fitted for {k}")
        times = torch.tensor(self.coefficients.timesteps, dtype=torch.float64)
        log_snr = torch.cat([self.noise_schedule.log_snr(times), torch.tensor([torch.inf]).double()])
        whole = torch.equal(times, times.round())
        return log_snr.clamp(min=-13.8), times.long() if whole else times

    def _reset(self) -> None:
        self._x_0, self._outputs = None, []

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The sample, divided by sqrt(sigma^2 + 1) if the teacher did so."""
        if self.config.input_sigmas is None:
            return sample
        return sample / (self.config.input_sigmas[self._step_index or 0] ** 2 + 1) ** 0.5

    def _advance(self, i: int, output: torch.Tensor, x: torch.Tensor, generator) -> torch.Tensor:
        if i != len(self._outputs):
            raise ValueError(
                f"step {i} came where step {len(self._outputs)} was due: OLSS needs every step of a whole run"
            )
        self._x_0 = x if i == 0 else self._x_0
        self._outputs.append(output)
        after = step_olss(self._x_0, self._outputs, self.coefficients.wx[i], self.coefficients.we[i])
        if i + 1 == len(self.coefficients.wx):
            self._reset()
        return after
