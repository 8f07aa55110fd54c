"""The contract of every scheduler in the catalogue; new ones are covered by their record alone."""

from __future__ import annotations

import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_ext
from diffusers_ext.registry import list_methods
from diffusers_ext.zoo import analytic


RECORDS = {
    record.slug: record
    for record in list_methods(kind="scheduler")
    # those for one model or a few numbers of steps have tests of their own
    if not getattr(record.public, "needs_fit", False) and not getattr(record.public, "fixed_steps", None)
}
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
DATA = analytic.GaussianMixture(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)), 0.2)
SHARED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(params=RECORDS, ids=str)
def record(request):
    return RECORDS[request.param]


@pytest.fixture(params=PREDICTIONS)
def prediction(request, record):
    if request.param not in record.predictions:
        pytest.skip(f"{record.slug} does not support {request.param}")
    return request.param


@pytest.fixture
def first(record):
    return record.predictions[0]


def make(record, prediction, **options):
    accepted = inspect.signature(record.public.__init__).parameters
    shared = {name: value for name, value in SHARED.items() if name in accepted}
    return record.public(**shared, prediction_type=prediction, **options)


def fewest_steps(record):
    return getattr(record.public, "min_inference_steps", 1)


def perfect(prediction):
    schedule = analytic.schedule("flow" if prediction == "flow_prediction" else "sd")
    return analytic.AnalyticDenoiser(DATA, schedule, prediction)


def start(n=1, dtype=torch.float32, seed=0):
    rows = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(n)]
    return torch.stack(rows).to(dtype)


def denoise(scheduler, model, x, generator=None, first_step=0):
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if takes_generator else {}
    for t in scheduler.timesteps[first_step * scheduler.order :]:
        inputs = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(inputs, t), t, x, return_dict=False, **extra)[0]
    return x


def sample(scheduler, prediction, steps=6, n=1, seed=0, dtype=torch.float32):
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    x = start(n, dtype, seed) * scheduler.init_noise_sigma
    return denoise(scheduler, perfect(prediction), x, generators)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_any_number_of_steps_is_finite(record, prediction, steps):
    scheduler = make(record, prediction)
    if steps < fewest_steps(record):
        with pytest.raises(ValueError, match="at least"):
            scheduler.set_timesteps(steps)
        return
    x = sample(scheduler, prediction, steps)
    assert x.isfinite().all() and len(scheduler.timesteps) == steps * scheduler.order
    assert scheduler.num_inference_steps == steps


def test_a_thousand_steps(record, first):
    scheduler = make(record, first)
    scheduler.set_timesteps(1000)
    zero, x = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(zero, t, x, return_dict=False)[0]
    assert x.isfinite().all()


def test_many_steps_reach_the_data(record, prediction):
    """Samples of a perfect model lie where the data lie: no further from the nearest mean than data themselves."""
    x = sample(make(record, prediction), prediction, steps=60, n=4).double()
    means = DATA.means.reshape(2, 1, 4, 8, 8)
    distance = (x - means).pow(2).mean((2, 3, 4)).min(0).values.sqrt()
    assert (distance < 1.3 * 0.2**0.5).all()


def test_ends_of_the_run(record, first):
    for final in ("zero", "sigma_min"):
        accepted = inspect.signature(record.public.__init__).parameters
        if "final_sigmas_type" not in accepted:
            pytest.skip("has no choice of the end")
        scheduler = make(record, first, final_sigmas_type=final)
        assert sample(scheduler, first).isfinite().all()
        assert (scheduler.sigmas[-1] == 0) == (final == "zero")


def test_timesteps_and_sigmas_fall(record, prediction):
    scheduler = make(record, prediction)
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps.diff() <= 0).all() and (scheduler.sigmas.diff() <= 0).all()


def test_own_sigmas_and_timesteps(record, prediction):
    scheduler = make(record, prediction)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    model = perfect(prediction)
    sigmas = [0.95, 0.7, 0.4, 0.1] if prediction == "flow_prediction" else [14.0, 5.0, 1.0, 0.2, 0.0]
    for options in ({"sigmas": sigmas}, {"timesteps": [950, 700, 400, 100]}):
        if not set(options) <= set(accepted):
            continue
        scheduler.set_timesteps(**options)
        assert len(scheduler.timesteps) == 4 * scheduler.order
        assert denoise(scheduler, model, start()).isfinite().all()


def test_repeated_timesteps_advance_by_index(record, prediction):
    scheduler = make(record, prediction)
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters or scheduler.order > 1:
        pytest.skip("chooses its own timesteps")
    scheduler.set_timesteps(timesteps=[900, 600, 600, 300, 300, 10])
    model, x = perfect(prediction), start()
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 1
    assert x.isfinite().all()


def test_mu_shifts_flow_levels(record):
    if "flow_prediction" not in record.predictions:
        pytest.skip("no flow models")
    accepted = inspect.signature(record.public.__init__).parameters
    plain = make(record, "flow_prediction")
    plain.set_timesteps(8, mu=0.9)
    if "use_dynamic_shifting" not in accepted:
        pytest.skip("no dynamic shift")
    shifted = make(record, "flow_prediction", use_dynamic_shifting=True)
    shifted.set_timesteps(8, mu=0.9)
    assert shifted.sigmas[3] > plain.sigmas[3]
    with pytest.raises(ValueError, match="mu"):
        shifted.set_timesteps(8)


def test_image_to_image_starts_in_the_middle(record, prediction):
    scheduler, begin = make(record, prediction), 4
    clean = DATA.sample(1, torch.Generator().manual_seed(3)).float()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(begin * scheduler.order)
    t = scheduler.timesteps[begin * scheduler.order :][:1]
    mix = scheduler.scale_noise if prediction == "flow_prediction" else scheduler.add_noise
    arguments = (clean, t, start()) if prediction == "flow_prediction" else (clean, start(), t)
    x = denoise(scheduler, perfect(prediction), mix(*arguments), [torch.Generator().manual_seed(0)], begin)
    assert (x - clean).pow(2).mean().sqrt() < (start() - clean).pow(2).mean().sqrt()
    assert scheduler.step_index == len(scheduler.timesteps)


def test_add_noise_is_the_noise_level_of_the_model(record, prediction):
    scheduler = make(record, prediction)
    scheduler.set_timesteps(10)
    schedule = perfect(prediction).schedule
    x0, noise, t = start(3), start(3, seed=7), scheduler.timesteps[[1, 4, 7]]
    alpha, sigma = (v.float().reshape(3, 1, 1, 1) for v in schedule.levels(schedule.log_snr(t)))
    expected = alpha * x0 + sigma * noise
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(scheduler.scale_noise(x0, t, noise), expected, atol=2e-4, rtol=1e-3)


def test_batch_equals_single_runs(record, prediction):
    scheduler = make(record, prediction)
    together = sample(scheduler, prediction, n=3)
    for i in range(3):
        torch.testing.assert_close(sample(scheduler, prediction, seed=i)[0], together[i], atol=1e-5, rtol=1e-4)


def test_two_runs_are_equal(record, prediction):
    scheduler = make(record, prediction)
    before = sample(scheduler, prediction)
    sample(scheduler, prediction, steps=3, seed=5)
    assert torch.equal(sample(scheduler, prediction), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_keep_dtype_and_lose_little(record, prediction, dtype):
    scheduler = make(record, prediction)
    half, full = sample(scheduler, prediction, dtype=dtype), sample(scheduler, prediction)
    assert half.dtype == dtype
    # rounding of the latents themselves at every step, nothing worse
    assert (half.float() - full).abs().max() < (0.02 if dtype == torch.float16 else 0.2)


@pytest.mark.parametrize(
    "name", diffusers.DPMSolverMultistepScheduler._compatibles + ["FlowMatchEulerDiscreteScheduler"]
)
def test_from_config_of_upstream(record, name):
    try:
        upstream = getattr(diffusers, name)()
    except ImportError as error:
        pytest.skip(str(error))
    if name == "EDMEulerScheduler":
        with pytest.raises(ValueError, match="EDM"):
            record.public.from_config(upstream.config)
        return
    prediction = "flow_prediction" if "Flow" in name else "epsilon"
    if prediction not in record.predictions:
        with pytest.raises(ValueError):
            record.public.from_config(upstream.config)
        return
    scheduler = record.public.from_config(upstream.config)
    assert scheduler.config.prediction_type == prediction
    scheduler.set_timesteps(4)
    assert denoise(scheduler, perfect(prediction), start()).isfinite().all()


def test_from_config_keeps_the_model(record):
    for prediction in ("v_prediction", "epsilon"):
        if prediction in record.predictions:
            upstream = diffusers.UniPCMultistepScheduler(**SHARED, prediction_type=prediction)
            ours = record.public.from_config(upstream.config)
            assert ours.config.prediction_type == prediction and ours.config.beta_end == 0.012
            again = diffusers.UniPCMultistepScheduler.from_config(ours.config)
            torch.testing.assert_close(again.alphas_cumprod, upstream.alphas_cumprod)
    if "flow_prediction" in record.predictions:
        upstream = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        )
        ours = record.public.from_config(upstream.config)
        assert ours.config.shift == 3.0 and ours.config.prediction_type == "flow_prediction"


def test_save_and_load(record, prediction, tmp_path):
    scheduler = make(record, prediction)
    expected = sample(scheduler, prediction)
    scheduler.save_pretrained(tmp_path)
    again = record.public.from_pretrained(tmp_path)
    kept, wanted = ({k: v for k, v in c.items() if not k.startswith("_")} for c in (again.config, scheduler.config))
    assert type(again) is record.public and kept == wanted
    assert torch.equal(sample(again, prediction), expected)


def test_every_option_survives_the_file(record, first, tmp_path):
    """Each boolean option flipped and saved; a scheduler may refuse a combination, not change it."""
    parameters = inspect.signature(record.public.__init__).parameters
    for name, parameter in parameters.items():
        if not isinstance(parameter.default, bool):
            continue
        scheduler = make(record, first, **{name: not parameter.default})
        scheduler.save_pretrained(tmp_path / name)
        again = record.public.from_pretrained(tmp_path / name)
        assert again.config[name] is (not parameter.default)
        needs_mu = name == "use_dynamic_shifting" and first == "flow_prediction"
        again.set_timesteps(3, **({"mu": 0.5} if needs_mu else {}))
        assert denoise(again, perfect(first), start()).isfinite().all()


RELOAD = """
import sys, torch, diffusers_ext
from diffusers import DiffusionPipeline
absent = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], **dict.fromkeys(absent))
pipe.set_progress_bar_config(disable=True)
torch.save(run(pipe), sys.argv[2])
"""
RUN = """
def run(pipe):
    import torch
    prompt = torch.ones(1, 4, 8)
    return pipe(prompt_embeds=prompt, negative_prompt_embeds=0 * prompt, num_inference_steps=3, output_type="latent",
                latents=torch.ones(1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).images
"""


@pytest.fixture(scope="module")
def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=2,
    )


@pytest.mark.slow
def test_pipeline_reloads_in_a_fresh_process(record, first, tiny_unet, tmp_path):
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=tiny_unet, scheduler=make(record, first),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "pipe")
    scope: dict = {}
    exec(RUN, scope)
    expected = scope["run"](pipe)
    script = RUN + RELOAD
    subprocess.run([sys.executable, "-c", script, tmp_path / "pipe", tmp_path / "out.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_bad_input(record, first):
    scheduler = make(record, first)
    with pytest.raises(RuntimeError, match="set_timesteps"):
        scheduler.step(start(), 10, start())
    for bad in ({}, {"num_inference_steps": 0}, {"num_inference_steps": 2.5}):
        with pytest.raises((ValueError, TypeError)):
            scheduler.set_timesteps(**bad)
    scheduler.set_timesteps(max(2, fewest_steps(record)))
    with pytest.raises(ValueError, match="shape"):
        scheduler.step(start(2), scheduler.timesteps[0], start())
    with pytest.raises(ValueError, match="prediction_type"):
        make(record, "score")
    with pytest.raises(TypeError):
        make(record, first, no_such_option=1)


def test_a_finished_run_refuses_another_step(record, first):
    scheduler = make(record, first)
    sample(scheduler, first, steps=max(2, fewest_steps(record)))
    with pytest.raises((RuntimeError, IndexError)):
        scheduler.step(start(), 0, start())


def test_nan_of_the_model_is_named(record, first):
    scheduler, x = make(record, first), start()
    scheduler.set_timesteps(max(4, fewest_steps(record)))
    with pytest.raises(RuntimeError, match="NaN or infinity at step 2"):
        for i, t in enumerate(scheduler.timesteps):
            output = torch.full_like(x, torch.nan) if i == 1 else torch.zeros_like(x)
            x = scheduler.step(output, t, x, return_dict=False)[0]


class OneDevice(TorchDispatchMode):
    """Refuses operations between tensors of two devices."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
        if len({t.device for t in tensors}) > 1:
            raise RuntimeError(f"{operation} takes tensors of two devices")
        return operation(*args, **(kwargs or {}))


def require_no_waiting(scheduler) -> None:
    """On the meta device nothing can be read back; only the last step, which looks for NaN, may."""
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(0)
    scheduler.timesteps = scheduler.timesteps.to("meta")
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": [torch.Generator().manual_seed(0)]} if takes_generator else {}
    x = torch.empty(1, 4, 8, 8, device="meta")
    for t in scheduler.timesteps[:-1]:
        with OneDevice():
            output = torch.empty_like(scheduler.scale_model_input(x, t))
            x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
    with pytest.raises(NotImplementedError, match="meta"):
        scheduler.step(torch.empty_like(x), scheduler.timesteps[-1], x, **extra)


def test_a_step_never_waits_for_the_device(record, prediction):
    require_no_waiting(make(record, prediction))


def test_statistics_and_fits_do_not_make_it_wait():
    fitted = diffusers_ext.OLSSScheduler(
        timesteps=range(950, -1, -125)[:8], wx=[1.0] * 8, we=[[0.1] * i for i in range(1, 9)]
    )
    measured = diffusers_ext.DPMSolverV3MultistepScheduler(**SHARED)
    log_snr = measured.noise_schedule.table[[-1, 0]].tolist()
    measured.load_ems(diffusers_ext.EMS.constant(*log_snr, 120, l=0.3, s=0.1, b=0.01))
    for scheduler in (fitted, measured, diffusers_ext.FreeParameterScheduler(**SHARED)):
        require_no_waiting(scheduler)


def test_record_and_class_agree(record):
    assert issubclass(record.public, diffusers.SchedulerMixin) and record.public.method == record
    unsupported = set(PREDICTIONS) - set(record.predictions)
    for prediction in unsupported:
        with pytest.raises(ValueError):
            make(record, prediction)
