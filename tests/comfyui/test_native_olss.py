from __future__ import annotations

import functools

import pytest
import torch

from diffusers_ext import OLSSCoefficients, OLSSScheduler
from diffusers_ext.prediction import from_x0
from diffusers_ext.schedulers._native import native_schedule


pytestmark = pytest.mark.comfy


@pytest.fixture
def fit_analytic(comfy, native_pipe, mixture, sample_analytic):
    """`fit_analytic(name, steps, teacher_steps, ridge)` -> coefficients fitted through the node's own recording."""
    module = __import__("comfy_nodes.schedulers_olss", fromlist=["_fit"])

    def fit(name, steps, teacher_steps, ridge=1e-6):
        sampling = native_pipe(name)[0].get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", teacher_steps)

        class Guider:
            def sample(self, noise, latent, sampler, sigmas, seed):
                return sample_analytic(sampler, sigmas, noise, mixture, name)

        latent = {"samples": torch.zeros(16, 4, 16, 16)}
        return module._fit(Guider(), latent, sigmas, steps, "search", ridge, 3), sigmas

    return functools.cache(fit)


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("name, prediction", [("shapes-unet", "epsilon"), ("shapes-dit", "flow_prediction")])
def test_same_latents_as_the_scheduler(
    dx_nodes, native_pipe, mixture, sample_analytic, fit_analytic, name, prediction, steps
):
    # fitted coefficients of an epsilon model magnify the rounding of ComfyUI's float32 samples (up to 15 in size)
    flow = prediction == "flow_prediction"
    fitted = fit_analytic(name, steps, 40)[0] if flow else euler_steps(native_pipe(name)[0], steps)
    schedule = native_schedule(native_pipe(name)[0].get_model_object("model_sampling"))
    sigmas = dx_nodes["DXOLSSSigmas"].execute("", fitted).result[0]
    sampler = dx_nodes["DXOLSSSampler"].execute("", fitted).result[0]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    native = sample_analytic(sampler, sigmas, noise, mixture, name)
    scheduler = in_model_space(fitted, schedule, prediction)
    scheduler.set_timesteps(steps)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        s = fitted.timesteps[i]
        alpha = 1 - s if prediction == "flow_prediction" else (1 + s * s) ** -0.5
        sigma = s if prediction == "flow_prediction" else s * alpha
        output = from_x0(mixture.denoise(x, alpha, sigma), x.double(), alpha, sigma, prediction).float()
        x = scheduler.step(output, t, x).prev_sample
    assert (native - x).abs().max() < 1e-5


def euler_steps(model, steps) -> OLSSCoefficients:
    """Euler's method as OLSS: every sample is the first noise plus all slopes times their steps."""
    sigmas = model.get_model_object("model_sampling").sigmas.double()
    chosen = [*sigmas[torch.linspace(999, 20, steps).long()].tolist(), 0.0]
    gaps = tuple(b - a for a, b in zip(chosen, chosen[1:]))
    rows = tuple(gaps[: i + 1] for i in range(steps))
    return OLSSCoefficients(tuple(range(steps)), tuple(chosen), (1.0,) * steps, rows, (), 1.0)


def test_euler_written_as_olss_is_core_euler(comfy, dx_nodes, native_pipe, mixture, sample_analytic):
    steps = euler_steps(native_pipe("shapes-unet")[0], 8)
    sigmas = dx_nodes["DXOLSSSigmas"].execute("", steps).result[0]
    sampler = dx_nodes["DXOLSSSampler"].execute("", steps).result[0]
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    core = sample_analytic(comfy.samplers.sampler_object("euler"), sigmas, noise, mixture)
    assert (sample_analytic(sampler, sigmas, noise, mixture) - core).abs().max() < 1e-5


def in_model_space(fitted, schedule, prediction) -> OLSSScheduler:
    """The same steps for samples of variance one: ComfyUI's are those divided by alpha."""
    if prediction == "flow_prediction":
        times = tuple(1000 * s for s in fitted.timesteps[:-1])
        chosen = OLSSCoefficients(**{**fitted.__dict__, "timesteps": times})
        return OLSSScheduler.from_coefficients(chosen, prediction_type=prediction)
    alpha = [(1 + s * s) ** -0.5 for s in fitted.timesteps]
    wx = tuple(w * alpha[i + 1] / alpha[0] for i, w in enumerate(fitted.wx))
    we = tuple(tuple(w * alpha[i + 1] for w in row) for i, row in enumerate(fitted.we))
    times = tuple(schedule.timestep(-torch.log(torch.tensor(fitted.timesteps[:-1]).double())).tolist())
    return OLSSScheduler.from_coefficients(OLSSCoefficients(fitted.indices, times, wx, we, (), 1.0))


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-dit"])
def test_fitted_steps_are_nearer_to_the_teacher_than_euler(
    comfy, dx_nodes, mixture, sample_analytic, fit_analytic, name
):
    fitted, teacher = fit_analytic(name, 6, 40)
    sigmas = dx_nodes["DXOLSSSigmas"].execute("", fitted).result[0]
    sampler = dx_nodes["DXOLSSSampler"].execute("", fitted).result[0]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    euler = comfy.samplers.sampler_object("euler")
    goal = sample_analytic(euler, teacher, noise, mixture, name)
    ours = sample_analytic(sampler, sigmas, noise, mixture, name)
    plain = sample_analytic(euler, teacher[[0, 7, 14, 21, 28, 35, 40]], noise, mixture, name)
    assert (ours - goal).norm() < 0.5 * (plain - goal).norm()
    with pytest.raises(ValueError, match="OLSS Sigmas"):
        sample_analytic(sampler, teacher, noise, mixture, name)


def test_node_saves_inside_the_output_folder(comfy, dx_nodes, native_pipe, encode, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    model, clip, _ = native_pipe("shapes-unet")
    condition, latent = encode(clip, "a red circle"), {"samples": torch.zeros(1, 4, 16, 16)}
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)
    node = dx_nodes["DXOLSSFit"]
    fitted = node.execute(model, condition, condition, 1.0, latent, sigmas, 3, "search", 1e-6, 0, "mine").result[0]
    assert OLSSCoefficients.load(tmp_path / "output/olss/mine.json") == fitted
    assert dx_nodes["DXOLSSSigmas"].execute("mine.json").result[0].tolist() == pytest.approx(fitted.timesteps)
    for bad in ("../x", "a/b", "", ".hidden", "a\\b"):
        assert node.validate_inputs(bad) is not True
    with pytest.raises(ValueError, match="no OLSS coefficients"):
        dx_nodes["DXOLSSSampler"].execute("../output/olss/mine.json")
