from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch

from diffusers_ext import OTStart, SemiDiscreteOT, USFScheduler
from diffusers_ext.schedulers._start import node_levels
from diffusers_ext.schedulers.dpm_ot import adam_step, best_cells, extension_weights, normal_angles
from diffusers_ext.zoo.analytic import AnalyticDenoiser, AnalyticUNet, GaussianMixture, latent_pipeline, schedule


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def plane() -> SemiDiscreteOT:
    """A fitted transport to 64 targets in 2-D."""
    return SemiDiscreteOT(normal(64, 2, seed=1)).fit(progress=False)


# --- the map ------------------------------------------------------------------------------------------------------


def test_best_cells_are_the_largest_values_whatever_the_batch():
    x, y, h = normal(50, 3), normal(17, 3, seed=1), normal(17, seed=2)
    values, order = (x @ y.T + h).sort(1, descending=True)
    for batch in (1, 5, 17, 100):
        found, places = best_cells(x, y, h, 4, batch)
        assert torch.equal(places, order[:, :4])
        torch.testing.assert_close(found, values[:, :4])


def test_adam_step_is_that_of_the_paper():
    h, m, v, g = (normal(5, seed=i) for i in range(4))
    v = v.abs()
    after, m2, v2 = adam_step(h, m, v, g, 0.1)
    torch.testing.assert_close(m2, 0.9 * m + 0.1 * g)
    torch.testing.assert_close(v2, 0.999 * v + 0.001 * g**2)
    expected = h - 0.1 * m2 / (v2.sqrt() + 1e-8)
    torch.testing.assert_close(after, expected - expected.mean())


def test_line_is_cut_at_the_quantiles():
    y = torch.tensor([[-2.0], [-0.7], [0.1], [0.8], [3.0]]).double()
    ot = SemiDiscreteOT(y).fit(progress=False)
    cuts = -(ot.h.diff()) / y[:, 0].diff()  # where neighbouring planes meet
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.2, 0.4, 0.6, 0.8]).double())
    assert (cuts - quantiles).abs().max() < 0.03
    # cells are intervals in the order of the targets
    assert (ot.cells(torch.linspace(-4, 4, 999).double()[:, None])[0][:, 0].diff() >= 0).all()


def test_line_with_weights_and_uniform_noise():
    y, weights = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0.5, 0.3, 0.2])
    ot = SemiDiscreteOT(y, weights, source="uniform").fit(progress=False)
    cuts = -(ot.h.diff()) / y[:, 0].diff()
    assert (cuts - torch.tensor([0.5, 0.8])).abs().max() < 0.01


def test_every_cell_of_the_plane_has_its_share(plane):
    masses = plane.masses(10**6)
    assert (masses - 1 / 64).abs().max() <= 0.2 / 64
    assert masses.min() > 0


def hungarian(cost: np.ndarray) -> float:
    """Least cost of a perfect matching (shortest augmenting paths)."""
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=int)
    for i in range(1, n + 1):
        row_of[0], j = i, 0
        least, back, used = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=int), np.zeros(n + 1, dtype=bool)
        while row_of[j]:
            used[j] = True
            reduced = cost[row_of[j] - 1] - u[row_of[j]] - v[1:]
            better = ~used[1:] & (reduced < least[1:])
            least[1:][better], back[1:][better] = reduced[better], j
            free = np.where(used, np.inf, least)
            free[0] = np.inf
            nearest = int(free.argmin())
            u[row_of[used]] += free[nearest]
            v[used] -= free[nearest]
            least[~used] -= free[nearest]
            j = nearest
        while j:
            row_of[j], j = row_of[back[j]], back[j]
    return cost[row_of[1:] - 1, np.arange(n)].sum()


def test_hungarian_finds_the_best_of_all_permutations():
    import itertools

    cost = normal(6, 6, seed=3).numpy()
    best = min(sum(cost[i, p[i]] for i in range(6)) for p in itertools.permutations(range(6)))
    assert hungarian(cost) == pytest.approx(best)


def test_cost_is_that_of_the_best_matching(plane):
    x = normal(512, 2, seed=5)
    slots = plane.targets.repeat_interleave(8, 0)  # 512 places of equal mass
    cost = torch.cdist(x, slots).square()
    ours = (x - plane.map(x)).square().sum()
    assert ours <= 1.02 * hungarian(cost.numpy())
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    assert ours <= cost[torch.arange(512), order].sum()


def test_a_constant_on_all_heights_changes_nothing(plane):
    x = normal(1000, 2, seed=6)
    raised = SemiDiscreteOT(plane.targets, h=plane.h + 7.5)
    for topk in (1, 3):
        for a, b in zip(plane.cells(x, topk), raised.cells(x, topk)):
            torch.testing.assert_close(a, b)


def test_more_dimensions_than_targets_are_reduced_without_a_change_of_law():
    targets = normal(6, 40, seed=7) * 0.3
    masses = SemiDiscreteOT(targets).fit(progress=False, max_iter=300).masses(10**5)
    assert (masses - 1 / 6).abs().max() < 0.03 / 6 + 4 * math.sqrt(1 / 6 / 10**5)


# --- mixing of cells ----------------------------------------------------------------------------------------------


def test_mixed_cells_are_continuous_and_top_1_is_the_map(plane):
    line = torch.linspace(-2, 2, 4001).double()
    x = torch.stack([line, 0.3 * line + 0.1], 1)
    jumps = plane.map(x).diff(dim=0).norm(dim=1)
    smooth = plane.map(x, topk=3, angle_threshold=1.0).diff(dim=0).norm(dim=1)
    assert jumps.max() > 0.2 and smooth.max() < 0.1 * jumps.max()
    places, weights = plane.cells(x, 3, 1.0)
    torch.testing.assert_close(weights.sum(1), torch.ones(4001).double())
    assert torch.equal(places[:, 0], plane.cells(x)[0][:, 0])


def test_mode_boundaries_are_not_mixed():
    """Two clusters far apart: nothing lies between them, though cells of a cluster are mixed."""
    cluster = normal(10, 2, seed=8) * 0.2
    ot = SemiDiscreteOT(torch.cat([cluster - 4, cluster + 4])).fit(progress=False, max_iter=300)
    x = normal(4000, 2, seed=9)
    points, open_ = ot.map(x, topk=2), ot.map(x, topk=2, angle_threshold=1.0)
    between = (open_.mean(1).abs() < 3).sum()
    assert (points.mean(1).abs() < 3).sum() == 0 and between > 0
    assert (ot.cells(x, 2)[1][:, 1] > 0.1).sum() > 1000


def test_angles_and_weights_by_hand():
    y = torch.tensor([[0.0, 0], [3.0, 4], [0.0, 0]])
    assert normal_angles(y, torch.tensor([[0, 1], [0, 2]]))[:, 0].tolist() == pytest.approx(
        [math.acos(1 / math.sqrt(26)), 0]
    )
    weights = extension_weights(torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]]).double(), torch.ones(2, 2))
    assert weights.tolist() == [pytest.approx([2 / 3, 1 / 3]), [1.0, 0.0]]


# --- files, interruption, bad input -------------------------------------------------------------------------------


def test_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(iteration: int) -> None:
        if iteration == 130:
            raise Stop

    targets, options = normal(12, 3, seed=2), {"max_iter": 220, "samples": 200, "progress": False, "patience": 20}
    whole = SemiDiscreteOT(targets).fit(**options)
    ot, file = SemiDiscreteOT(targets), tmp_path / "part.safetensors"
    with pytest.raises(Stop):
        ot.fit(**options, checkpoint=file, on_iteration=stop)
    assert ot.h is None  # nothing half done
    seen: list[int] = []
    ot.fit(**options, checkpoint=file, on_iteration=seen.append)
    assert seen[0] == 101 and torch.equal(ot.h, whole.h)
    with pytest.raises(ValueError, match="no unfinished fit with sum"):
        SemiDiscreteOT(targets + 1).fit(**options, checkpoint=file)


def test_file_round_trip_and_bad_files(plane, tmp_path):
    file = tmp_path / "ot.safetensors"
    SemiDiscreteOT(plane.targets, level=(0.6, 0.8), h=plane.h).save(file)
    again = SemiDiscreteOT.load(file)
    x = normal(100, 2, seed=4)
    assert torch.equal(again.map(x), plane.map(x)) and again.level == (0.6, 0.8) and again.source == "normal"
    from safetensors.torch import save_file

    save_file({"targets": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no transport"):
        SemiDiscreteOT.load(tmp_path / "other.safetensors")
    wrong = {"targets": torch.zeros(3, 2), "weights": torch.ones(4), "h": torch.zeros(3)}
    save_file(wrong, tmp_path / "bad.safetensors", {"format": "diffusers-ext semi-discrete OT"})
    with pytest.raises(ValueError, match="as many weights"):
        SemiDiscreteOT.load(tmp_path / "bad.safetensors")


def test_bad_input(plane):
    with pytest.raises(ValueError, match="as many weights"):
        SemiDiscreteOT(torch.zeros(5, 2), torch.ones(4))
    with pytest.raises(ValueError, match="above 0"):
        SemiDiscreteOT(torch.zeros(2, 2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="n >= 2"):
        SemiDiscreteOT(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="NaN"):
        SemiDiscreteOT(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="too large"):
        SemiDiscreteOT(torch.zeros(1, 1).expand(2**15, 2**15))
    with pytest.raises(ValueError, match="normal, uniform"):
        SemiDiscreteOT(torch.zeros(3, 2), source="cauchy")
    with pytest.raises(RuntimeError, match="call fit"):
        SemiDiscreteOT(torch.zeros(3, 2)).map(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="shape"):
        plane.map(torch.zeros(1, 3))
    for bad in (0, 64):
        with pytest.raises(ValueError, match="topk"):
            plane.map(torch.zeros(1, 2), topk=bad)
    with pytest.raises(ValueError, match="no noise level"):
        plane.start(torch.zeros(1, 2), (0.6, 0.8))
    uniform = SemiDiscreteOT(plane.targets, source="uniform", level=(0.6, 0.8), h=plane.h)
    with pytest.raises(ValueError, match="uniform"):
        uniform.start(torch.zeros(1, 2), (0.6, 0.8))


# --- sampling -----------------------------------------------------------------------------------------------------


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.05) -> GaussianMixture:
    angle = torch.arange(modes).double() * 2 * math.pi / modes
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std**2)


def ddim(data: GaussianMixture, x: torch.Tensor, steps: int, first: int = 0) -> torch.Tensor:
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    model = AnalyticDenoiser(data, schedule("sd"), "epsilon")
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def outside(data: GaussianMixture, x: torch.Tensor, std: float = 0.05) -> float:
    """Share of points further than four standard deviations from every mode."""
    return (torch.cdist(x, data.means).min(1).values > 4 * std).double().mean().item()


@pytest.mark.parametrize("extra", [0, 1])
def test_fewer_samples_lie_between_the_modes(extra):
    """Five steps from the transport beside ten from noise; `extra` starts one step before the targets' level."""
    data, n = ring(), 512
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    levels, first = node_levels(scheduler), 15 - extra
    clean = data.sample(n, torch.Generator().manual_seed(3))
    ot = SemiDiscreteOT.from_latents(clean, levels[15], seed=4).fit(progress=False, max_iter=100, samples=4000)
    noise = normal(4000, 2, seed=5)
    x = ot.start(noise, levels[first], torch.Generator().manual_seed(6))
    ours, plain = outside(data, ddim(data, x, 20, first)), outside(data, ddim(data, noise, 10))
    assert plain > 0.02 and ours <= 0.5 * plain, (ours, plain)
    distinct = len(torch.unique(x.round(decimals=9), dim=0))
    assert distinct <= n if extra == 0 else distinct > 3990


@pytest.mark.parametrize("topk", [1, 3])
def test_noise_level_of_the_start(topk):
    """Whatever is mixed or lifted, the noise of the latents has the size that their level says."""
    level, noisier = (0.8, 0.6), (0.5, math.sqrt(0.75))
    ot = SemiDiscreteOT.from_latents(torch.zeros(300, 16), level, seed=1)
    ot.fit(progress=False, max_iter=60)
    for target in (level, noisier, (1.0, 0.75), (0.5, 0.5)):  # also in sigma and flow scaling
        x = ot.start(normal(2000, 16, seed=2).float(), target, torch.Generator().manual_seed(3), topk)
        assert x.square().mean().sqrt().item() == pytest.approx(target[1], rel=0.1)
    with pytest.raises(ValueError, match="noisier"):
        ot.start(torch.zeros(1, 16), (0.9, math.sqrt(0.19)))


SHAPE = (4, 4, 4)
NAMES = ["DDIM", "DPMSolverMultistep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "UniPCMultistep"]


@pytest.mark.parametrize("name", [*NAMES, "USF"])
def test_pipeline_reaches_the_data_of_the_target(name):
    data = GaussianMixture(3 * normal(4, *SHAPE, seed=8), 0.01)
    cls = USFScheduler if name == "USF" else getattr(diffusers, f"{name}Scheduler")
    scheduler = cls(**SD, timestep_spacing="trailing")
    pipe = latent_pipeline(data, scheduler)
    scheduler.set_timesteps(12)
    t = scheduler.timesteps[4 * scheduler.order].item()
    clean = data.means.reshape(4, *SHAPE).repeat(4, 1, 1, 1).float()
    ot = SemiDiscreteOT.from_latents(clean, OTStart.level_of(scheduler, t), seed=2)
    ot.fit(progress=False, max_iter=60, samples=400)
    noise, embedding = normal(3, *SHAPE, seed=3).float(), AnalyticUNet.embedding(-1, 3)
    wanted = clean[ot.cells(noise)[0][:, 0]]
    latents = OTStart(pipe, ot, t)(
        prompt_embeds=embedding, negative_prompt_embeds=embedding, num_inference_steps=12, guidance_scale=1.0,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    assert pipe.scheduler is scheduler
    assert (latents - wanted).square().mean().sqrt() < 0.3
    with pytest.raises(ValueError, match="not in the schedule"):
        OTStart(pipe, ot, t + 7)(prompt_embeds=embedding, num_inference_steps=12, guidance_scale=1.0, latents=noise)
    later = scheduler.timesteps[8 * scheduler.order].item()
    with pytest.raises(ValueError, match="noisier"):
        OTStart(pipe, ot, later)(prompt_embeds=embedding, num_inference_steps=12, guidance_scale=1.0, latents=noise)
