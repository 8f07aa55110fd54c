from __future__ import annotations

import copy
import functools
import json
import random

import diffusers
import pytest
import torch

import diffusers_ext
from diffusers_ext import (
    ScheduleSearchResult,
    TimestepSearch,
    apply_schedule,
    gaussian_frechet,
    remove_schedule,
    skippable_blocks,
    trajectory_mse,
    zoo,
)
from diffusers_ext.eval.macs import count_macs
from diffusers_ext.prediction import NoiseSchedule
from diffusers_ext.schedulers._autodiffusion_search import Operators, SearchSettings, Stop
from diffusers_ext.schedulers.autodiffusion import sigmas_of
from diffusers_ext.zoo.analytic import AnalyticDenoiser, GaussianMixture, schedule


LINEAR = schedule("linear")
FLOW = schedule("flow")
# three clusters, as the paper's two-dimensional data
MIXTURE = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]]), variances=0.05)


def noise(n: int, seed: int) -> torch.Tensor:
    return start_and_end(n, seed)[0]


@functools.cache
def start_and_end(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starting noise and where the exact probability flow takes it."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, last = (tuple(v.item() for v in LINEAR.levels(LINEAR.table[i])) for i in (-1, 0))
    return x, MIXTURE.ode(x, first, last, 200)


def ddim(timesteps, x: torch.Tensor) -> torch.Tensor:
    """DDIM on a list of timesteps, written out."""
    levels = [tuple(v.item() for v in LINEAR.levels(LINEAR.log_snr(torch.tensor(t)))) for t in timesteps]
    for (a, s), (at, st) in zip(levels, [*levels[1:], (1.0, 0.0)]):
        x0 = MIXTURE.denoise(x, a, s)
        x = at * x0 + st / s * (x - a * x0)
    return x


def result_of(*timesteps: int, where: NoiseSchedule = LINEAR, **options) -> ScheduleSearchResult:
    return ScheduleSearchResult(timesteps, sigmas_of(timesteps, where), **options)


def search(seed: int = 0, n: int = 32, calls: list | None = None, **options) -> TimestepSearch:
    x, end = start_and_end(n, 1)

    def sampler(candidate):
        if calls is not None:
            calls.append(candidate.timesteps)
        return ddim(candidate.timesteps, x)

    return TimestepSearch(sampler, 4, trajectory_mse(end), LINEAR, seed=seed, **options)


def test_found_schedule_is_better_on_new_noise():
    found = search(n=128).run(progress=False)
    x, end = start_and_end(256, 77)
    ours, even = ((ddim(t, x) - end).square().mean() for t in (found.timesteps, (999, 749, 499, 249)))
    assert ours <= 0.6 * even
    assert len(found.history) == 10 and all(b <= a for a, b in zip(found.history, found.history[1:]))


@pytest.mark.parametrize("blocks", [(), ("a", "b", "c", "d")])
def test_no_candidate_is_evaluated_twice(blocks):
    seen = []
    found = TimestepSearch(
        lambda c: seen.append((c.timesteps, c.skip_blocks)) or torch.tensor([float(sum(c.timesteps))]),
        3, lambda s: s.item(), LINEAR, population=12, max_epochs=8, blocks=blocks, max_prun=0.5,
    )  # fmt: skip
    found.run(progress=False)
    assert len(seen) == len(set(seen)) == found.evaluations <= 12 + 8 * 12
    assert found.result.score == min(sum(t) for t, _ in seen)
    if blocks:
        assert any(any(row) for _, row in seen) and not any(any(row) for _, row in seen[:24])


def test_exhausted_timesteps_end_the_search():
    tiny = NoiseSchedule.from_betas(torch.linspace(1e-4, 0.02, 5))
    found = TimestepSearch(lambda c: torch.tensor(c.timesteps[0]), 2, lambda s: float(s), tiny, max_epochs=3)
    found.run(progress=False)
    assert found.evaluations <= 10 and found.result.timesteps == (1, 0)
    with pytest.raises(ValueError, match="num_steps is 6, but the model has only 5"):
        TimestepSearch(lambda c: c, 6, lambda s: 0.0, tiny)


def test_search_is_deterministic_and_resumes_anywhere(tmp_path):
    options = {"population": 12, "max_epochs": 4}
    whole, calls = search(3, **options), []
    whole.run(progress=False)
    first, second = search(3, calls=calls, **options), search(3, calls=calls, **options)

    def stop(n):
        if n == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.run(progress=False, on_evaluation=stop)
    assert first.evaluations == 21
    first.save(tmp_path / "state.json")
    second.load(tmp_path / "state.json")
    assert second.run(progress=False) == whole.result
    assert len(calls) == len(set(calls)) == whole.evaluations
    other = search(4, **options)
    other.run(progress=False)
    assert other.result.timesteps != whole.result.timesteps
    with pytest.raises(ValueError, match="seed 3 .here 5."):
        search(5, **options).load(tmp_path / "state.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="not the state"):
        second.load(tmp_path / "other.json")
    with pytest.raises(RuntimeError, match="call run"):
        search().result  # noqa: B018


def test_mutation_replaces_blocks_and_keeps_their_number():
    """The authors' script compares where it means to assign, so that left-out blocks never change."""
    settings = SearchSettings(3, 10, 5, 5, 2, 1.0, 10, 0.0, 0.5, None, 0)
    operators = Operators(range(1000), 8, settings, random.Random(0))
    parent = (Stop(900, (0, 1, 2)), Stop(500, (5,)), Stop(100, ()))
    child = operators.mutated(parent, 0.0)
    assert [s.timestep for s in child] == [900, 500, 100]
    assert len(child[0].skips) == 3 and not {0, 1, 2} & set(child[0].skips) and len(child[1].skips) == 1
    assert {s.timestep for s in operators.mutated(parent, 1.0)}.isdisjoint({900, 500, 100})


def test_budget_trades_blocks_for_steps():
    settings = SearchSettings(4, 10, 5, 5, 2, 0.25, 10, 0.0, 0.5, 40, 0)
    operators = Operators(range(1000), 10, settings, random.Random(0))
    assert {len(operators.random()) for _ in range(5)} == {4}
    operators.range = (0.3, 0.5)
    for _ in range(15):
        stops = operators.random()
        assert 40 - 10 < operators.executed(stops) <= 40 and len(stops) > 4
        assert operators.executed(operators.mutated(stops, 0.25)) <= 40
    with pytest.raises(ValueError, match="max_blocks"):
        search(max_blocks=10)


LIST = (937, 611, 402, 101)
VISITORS = {
    "DDIM": {},
    "DPMSolverMultistep": {},
    "EulerDiscrete": {},
    "UniPCMultistep": {},
    "DEISMultistep": {},
    "DDPM": {},
    "EulerAncestralDiscrete": {},
}


def visited(scheduler, prediction="epsilon", where=LINEAR, n=4, x=None):
    times, model = [], AnalyticDenoiser(MIXTURE, where, prediction)
    scheduler.set_timesteps(n)
    x = (noise(8, 2) if x is None else x) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        times.append(float(t))
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return times, x


@pytest.mark.parametrize("name", VISITORS)
def test_the_list_is_visited_exactly(name):
    scheduler = getattr(diffusers, name + "Scheduler")(beta_schedule="linear")
    untouched = copy.deepcopy(scheduler)
    assert apply_schedule(scheduler, result_of(*LIST)) is scheduler
    times, x = visited(scheduler)
    assert times == list(LIST) and x.isfinite().all()
    with pytest.raises(ValueError, match="searched schedule of 4"):
        scheduler.set_timesteps(5)
    again = copy.deepcopy(scheduler)
    assert visited(again)[0] == times and type(scheduler).from_config(scheduler.config).set_timesteps(7) is None
    remove_schedule(scheduler)
    assert type(scheduler) is type(untouched) and "_searched_schedule" not in vars(scheduler)
    torch.manual_seed(0)
    ours = visited(scheduler, n=6)[1]
    torch.manual_seed(0)
    assert torch.equal(ours, visited(untouched, n=6)[1])


def test_ddim_takes_the_gaps_of_the_list():
    for times in (LIST, (999, 998, 3, 0), (740, 333, 332, 1)):
        scheduler = apply_schedule(diffusers.DDIMScheduler(clip_sample=False), result_of(*times))
        assert (visited(scheduler)[1] - ddim(times, noise(8, 2))).abs().max() < 1e-4  # diffusers' table is float32
        assert scheduler.num_inference_steps == 4


def test_solvers_with_history_use_the_irregular_noise_levels():
    """DPM-Solver++ on uneven steps is nearer to the exact solution than DDIM on the same."""
    times = [round(999 * (1 - i / 30) ** 1.7) + i % 2 for i in range(30)]
    x, end = start_and_end(32, 5)
    plus = apply_schedule(diffusers.DPMSolverMultistepScheduler(), result_of(*times))
    alpha, sigma = LINEAR.levels(LINEAR.log_snr(torch.tensor(times).double()))
    torch.testing.assert_close(plus.sigmas[:-1].double(), sigma / alpha, rtol=1e-3, atol=1e-4)
    errors = [(y - end).square().mean() for y in (visited(plus, n=30, x=x)[1], ddim(times, x))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "UniPCMultistep", "DPMSolverMultistep"])
def test_flow_schedulers(name):
    options = {"shift": 3.0} if "Flow" in name else {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, name + "Scheduler")(**options)
    apply_schedule(scheduler, result_of(1000, 700, 350, 90, where=FLOW))
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor([1, 0.7, 0.35, 0.09, 0]).double())
    assert [float(t) for t in scheduler.timesteps] == [1000, 700, 350, 90]
    assert "mu" in __import__("inspect").signature(scheduler.set_timesteps).parameters
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], device="cpu") if "DPM" not in name else None
    assert [float(t) for t in scheduler.timesteps] == [1000, 700, 350, 90]


def test_schedulers_that_cannot():
    for bad, message in (
        (diffusers.HeunDiscreteScheduler(), "one model call"),
        (diffusers.PNDMScheduler(), "cannot visit"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "noise level"),
        (diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "noise level"),
    ):
        kind = type(bad)
        with pytest.raises(ValueError, match=message):
            apply_schedule(bad, result_of(*LIST))
        assert type(bad) is kind and "_searched_schedule" not in vars(bad)
    with pytest.raises(ValueError, match="no timesteps"):
        apply_schedule(diffusers.DDIMScheduler(), ScheduleSearchResult())


def test_files(tmp_path):
    found = result_of(*LIST, skip_blocks=((), ("mid_block.resnets.0",), (), ()), score=0.5, history=(0.7, 0.5))
    found.save(tmp_path / "four.json")
    assert ScheduleSearchResult.load(tmp_path / "four.json") == found
    assert diffusers_ext.MethodConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert list(tmp_path.iterdir()) == [tmp_path / "four.json"]
    for text in ("no json", "[]", '{"format": "x"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="no searched schedule"):
            ScheduleSearchResult.load(tmp_path / "bad.json")
    for options in (
        {"timesteps": (5, 5), "sigmas": (1, 1, 0)},
        {"timesteps": (5, 7), "sigmas": (1, 1, 0)},
        {"timesteps": (7, 5), "sigmas": (1, 0)},
        {"timesteps": (7, 5), "sigmas": (2, 1, 0), "skip_blocks": ((),)},
    ):
        with pytest.raises(ValueError):
            ScheduleSearchResult(**options)


def test_frechet_is_zero_for_the_data_and_grows():
    data, measure = MIXTURE.sample(4000, torch.Generator().manual_seed(0)), None
    measure = gaussian_frechet(MIXTURE.sample(4000, torch.Generator().manual_seed(1)))
    assert measure(data) < 0.02 < 0.9 < measure(data + torch.tensor([1.0, 0.0]))


# leaving out blocks


@pytest.fixture(params=["shapes_unet", "shapes_dit"])
def pipe(request):
    return request.getfixturevalue(request.param)


def draw(pipe, steps=4, scale=1.0):
    return zoo.generate(pipe, ["a red circle", "a blue star"], steps, scale)


def named_result(pipe, names) -> ScheduleSearchResult:
    where = NoiseSchedule.from_scheduler(pipe.scheduler)
    return result_of(*LIST, where=where, skip_blocks=((), names, (), names))


def test_nothing_left_out_is_bit_identical_and_removal_is_exact(pipe):
    denoiser = diffusers_ext.denoiser_of(pipe)
    before, state = draw(pipe), {n: set(vars(m)) for n, m in denoiser.named_modules()}
    where = NoiseSchedule.from_scheduler(pipe.scheduler)
    apply_schedule(pipe.scheduler, result_of(*LIST, where=where))
    plain = draw(pipe)
    remove_schedule(pipe.scheduler)
    names = tuple(skippable_blocks(denoiser))[:3]
    with diffusers_ext.apply(pipe, named_result(pipe, ())):
        assert torch.equal(draw(pipe), plain) and not torch.equal(plain, before)
    with diffusers_ext.apply(pipe, named_result(pipe, names)):
        assert not torch.equal(draw(pipe), plain)
        with pytest.raises(ValueError, match="searched schedule of 4"):
            draw(pipe, 6)
    assert torch.equal(draw(pipe), before)
    assert state == {n: set(vars(m)) for n, m in denoiser.named_modules()}


def test_exactly_the_named_blocks_are_left_out_at_their_timesteps(pipe):
    denoiser = diffusers_ext.denoiser_of(pipe)
    blocks = skippable_blocks(denoiser)
    names = tuple(blocks)[1:4]
    found, runs = named_result(pipe, names), dict.fromkeys(blocks, 0)

    def counter(name):
        inner = {"ResnetBlock2D": "conv1", "Transformer2DModel": "proj_in"}.get(type(blocks[name]).__name__)
        part = getattr(blocks[name], inner) if inner else blocks[name].attn
        return part.register_forward_hook(lambda *_: runs.__setitem__(name, runs[name] + 1))

    handles = [counter(name) for name in blocks]
    with diffusers_ext.apply(pipe, found) as handle:
        draw(pipe)
        summary = handle.summary()["autodiffusion"]
    for hook in handles:
        hook.remove()
    assert runs == {name: 2 if name in names else 4 for name in blocks}
    assert summary["executed_blocks"] == sum(runs.values()) and summary["calls"] == 4


def test_operations_fall_by_those_of_the_blocks(shapes_unet):
    unet, name = shapes_unet.unet, "mid_block.attentions.0"
    x, states = torch.zeros(1, 4, 16, 16), torch.zeros(1, 20, 128)
    times = [torch.tensor(t) for t in LIST]

    def run():
        for t in times:
            unet(x, t, states)

    block = skippable_blocks(unet)[name]
    with torch.no_grad():
        one = count_macs(lambda: block(torch.zeros(1, 128, 4, 4), encoder_hidden_states=states))
        whole = count_macs(run)
        with diffusers_ext.apply(shapes_unet, named_result(shapes_unet, (name,))):
            assert count_macs(run) == whole - 2 * one and one > 0
            assert count_macs(lambda: unet(x, torch.tensor(500), states)) == whole // 4  # another timestep: all of it


def test_half_precision_timesteps_are_recognised(shapes_dit):
    """Pipelines of Flux layout hand over timestep / 1000 in the latents' dtype."""
    from diffusers_ext.schedulers._autodiffusion_blocks import _RootHook

    table = {int(t): ("a",) for t in LIST}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for t in LIST:
            hook = _RootHook(table, active := set(), 4)
            hook._decide((torch.tensor(float(t)) / 1000).to(dtype).expand(2))
            assert active == {"a"}
            hook._decide(torch.tensor(250.0, dtype=dtype))
    active.clear()
    _RootHook(table, active, 4)._decide(torch.tensor(612))
    assert not active


@pytest.mark.parametrize(
    "name, message",
    [
        ("down_blocks.1.resnets.0", "'down_blocks.1.resnets.0'.*32 channels to 64"),
        ("conv_in", "'conv_in'.*no residual"),
        ("mid_block.resnets.7", "'mid_block.resnets.7'.*does not exist"),
        ("mid_block.attentions.0.transformer_blocks.0", "inside another"),
    ],
)
def test_blocks_that_cannot_be_left_out(shapes_unet, name, message):
    before = set(vars(shapes_unet.unet))
    with pytest.raises(ValueError, match=message):
        diffusers_ext.apply(shapes_unet, named_result(shapes_unet, (name,)))
    assert set(vars(shapes_unet.unet)) == before and not hasattr(shapes_unet.scheduler, "_searched_schedule")


def test_a_refused_schedule_leaves_no_hooks(shapes_unet):
    shapes_unet.scheduler = diffusers.HeunDiscreteScheduler.from_config(shapes_unet.scheduler.config)
    before = set(vars(shapes_unet.unet))
    with pytest.raises(ValueError, match="one model call"):
        diffusers_ext.apply(shapes_unet, named_result(shapes_unet, ("mid_block.resnets.0",)))
    assert set(vars(shapes_unet.unet)) == before


def test_search_on_a_pipeline_with_a_budget_of_blocks(shapes_unet):
    total = len(skippable_blocks(shapes_unet.unet))
    options = {"population": 5, "max_epochs": 7, "max_prun": 0.6, "min_prun": 0.3, "max_blocks": 2 * total}
    found = TimestepSearch.for_pipeline(
        shapes_unet, ["a red circle"], 2, reference_steps=4, leave_out_blocks=True, **options
    )
    best = found.run(progress=False)
    candidates = [found._candidate(c) for c in found._evolution.scores]
    assert any(len(c.timesteps) > 2 for c in candidates)
    for c in candidates:
        assert sum(total - len(row) for row in c.skip_blocks or [()] * len(c.timesteps)) <= 2 * total
    own = found._evolution.scores[tuple(Stop(t) for t in (999, 499))]
    assert best.score <= own
    with diffusers_ext.apply(shapes_unet, best):
        assert draw(shapes_unet, len(best.timesteps)).isfinite().all()


def test_search_on_a_flow_pipeline(shapes_dit):
    found = TimestepSearch.for_pipeline(
        shapes_dit, ["a red circle", "a blue star"], 3, size=64, fitness="gaussian_frechet", reference_steps=5,
        population=4, max_epochs=2,
    )  # fmt: skip
    best = found.run(progress=False)
    assert best.score <= next(iter(found._evolution.scores.values()))
    assert best.sigmas[:-1] == pytest.approx([t / 1000 for t in best.timesteps])
    with diffusers_ext.apply(shapes_dit, best):
        assert draw(shapes_dit, 3).isfinite().all()
    with pytest.raises(ValueError, match="fitness is 'fid'"):
        TimestepSearch.for_pipeline(shapes_dit, ["a"], 3, fitness="fid", size=64)
