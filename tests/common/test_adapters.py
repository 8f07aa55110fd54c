"""What every adapter must do, run on each registered one with its shipped weights."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
from diffusers import SchedulerMixin
from safetensors import safe_open
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.adapters._common import Adapter
from diffusers_ext.registry import list_methods, public_names
from diffusers_ext.zoo.pipelines import ADAPTERS


CAPTIONS = zoo.held_out(2).captions
STEPS, JUDGED = 4, 100
OTHER = {"shapes-unet": "shapes-dit", "shapes-dit": "shapes-unet"}
RECORDS = [record for record in list_methods(kind="adapter") if issubclass(record.public, Adapter)]


NAMES = [name for name, module in public_names().items() if ".adapters" in module]
PUBLIC = {name: getattr(diffusers_ext, name) for name in NAMES}
CLASSES = {name: c for name, c in PUBLIC.items() if isinstance(c, type) and issubclass(c, Adapter)}


def shipped() -> list[tuple[type[Adapter], str]]:
    """Class and name of every weight file of an adapter that ships; a file says its class."""
    found = []
    for path in sorted(ADAPTERS.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("class")
        if name in CLASSES:
            found.append((CLASSES[name], path.stem))
    return found


CASES = shipped()


def model_of(name: str) -> str:
    return next(model for model in sorted(zoo.names(), key=len, reverse=True) if name.endswith(model))


def edges_for(adapter, pipe, count):
    adapter.set_condition(pipe, zoo.conditions.edges(zoo.held_out(count).images))


def hints_for(adapter, pipe, count):
    adapter.set_condition(zoo.conditions.edges(zoo.held_out(count).images))


def control_for(adapter, pipe, count):
    source = zoo.load("shapes-unet-eps")
    adapter.control = diffusers_ext.CtrlAdapterControl.from_prompts(
        zoo.load_controlnet("controlnet-edges-shapes-unet-eps"),
        zoo.conditions.edges(zoo.held_out(count).images).expand(-1, 3, -1, -1),
        zoo.held_out(count).captions,
        source.tokenizer,
        source.text_encoder,
    )


def pictures_for(kind):
    return lambda adapter, pipe, count: adapter.set_condition(pipe, kind(zoo.held_out(count)))


# What an adapter needs besides its weights, by the start of the file's name.
CONDITIONS = {
    "easycontrol-edge": edges_for,
    "easycontrol-colour": pictures_for(lambda scenes: zoo.conditions.subjects(scenes.specs)),
    "csc-edges": hints_for,
    "ctrl-adapter": control_for,
    "unicon-depth": pictures_for(zoo.conditions.depth),
    "unicon-edge": pictures_for(zoo.conditions.outlines),
}


def give_condition(name, adapter, pipe, count=2):
    """The pictures of the first `count` captions, to adapters that need any."""
    for start, give in CONDITIONS.items():
        if name.startswith(start):
            give(adapter, pipe, count)


def load(public, name, pipe):
    adapter = public.from_pretrained(zoo.adapter_file(name))
    give_condition(name, adapter, pipe)
    return adapter


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[1])
def case(request):
    public, name = request.param
    pipe = zoo.load(model_of(name))
    return public, name, pipe, load(public, name, pipe)


@pytest.fixture
def first_of_its_class(case):
    """For what depends on class and model, not on the weights: other files of both are skipped."""
    public, name, *_ = case
    if next(n for kind, n in CASES if kind is public and model_of(n) == model_of(name)) != name:
        pytest.skip("another file of this class is tested")


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "case" in request.fixturenames:
        _, _, pipe, adapter = request.getfixturevalue("case")
        adapter.detach()
        diffusers_ext.remove(pipe)


def draw(pipe, **options):
    return zoo.generate(pipe, CAPTIONS, **{"num_inference_steps": STEPS, **options})


def traces(pipe):
    model = diffusers_ext.denoiser_of(pipe)
    processors = {key: type(p) for key, p in getattr(model, "attn_processors", {}).items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()]
    return hooks, processors, set(vars(model)) - {"_diffusers_hook"}


def test_every_adapter_ships_weights():
    """Those of the catalogue, and with them all other adapters of the package."""
    assert {record.public for record in RECORDS} <= set(CLASSES.values()) == {public for public, _ in CASES}


def test_it_works_and_comes_off_without_a_trace(case):
    _, _, pipe, adapter = case
    plain, before = draw(pipe), traces(pipe)
    with adapter.attach(pipe):
        changed = draw(pipe)
        assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
        adapter.set_scale(0)
        assert torch.equal(draw(pipe), plain)
        adapter.set_scale(1)
        assert torch.equal(draw(pipe), changed)
    assert traces(pipe) == before and torch.equal(draw(pipe), plain)


# Change what captions say, on purpose: a style, new words, a subject's colour. Their own tests read them.
OTHER_WORDS = ("scedit", "orthogonal", "easycontrol-colour")


@functools.cache
def readable(model: str) -> float:
    """Share of captions that the judge reads in full from the pictures of a plain model."""
    return read(zoo.load(model))


def read(pipe) -> float:
    scenes = zoo.held_out(JUDGED)
    images = zoo.generate(pipe, scenes.captions, num_inference_steps=10, batch_size=JUDGED)
    return zoo.load_judge().accuracy(images, scenes.specs)["all"]


@pytest.mark.slow
def test_captions_are_drawn_as_before(case):
    """The judge loses less than three points."""
    _, name, pipe, adapter = case
    if name.startswith(OTHER_WORDS):
        pytest.skip("changes what captions say")
    try:
        give_condition(name, adapter, pipe, JUDGED)
        with adapter.attach(pipe):
            assert read(pipe) > readable(model_of(name)) - 0.03
    finally:
        give_condition(name, adapter, pipe)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_its_singles(case, guidance):
    _, name, pipe, adapter = case
    with adapter.attach(pipe):
        both = draw(pipe, guidance_scale=guidance)
        try:
            give_condition(name, adapter, pipe, 1)
            alone = zoo.generate(pipe, CAPTIONS[:1], STEPS, guidance)
        finally:
            give_condition(name, adapter, pipe)
        away = (both - alone).abs().amax((1, 2, 3))
    assert away[0] < 1e-3 < away[1]


def test_half_precision(case):
    public, name, *_ = case
    half = zoo.load(model_of(name), torch.bfloat16)
    plain = draw(half)
    with load(public, name, half).attach(half):
        drawn = draw(half)
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, plain)


def test_saved_and_loaded_weights_draw_the_same(case, tmp_path):
    public, name, pipe, adapter = case
    with adapter.attach(pipe):
        first = draw(pipe)
    copy = zoo.adapter_file(name).read_bytes()
    # Attaching moved the weights to the model's precision; the file keeps what it was saved in.
    fresh = public.from_pretrained(zoo.adapter_file(name))
    assert fresh.save_file(tmp_path / "again.safetensors").read_bytes() == copy
    folder = tmp_path / "folder"
    fresh.save_pretrained(folder)
    for path in (tmp_path / "again.safetensors", folder):
        again = public.from_pretrained(path)
        state = fresh.state_dict()
        assert all(torch.equal(value.to(state[key].dtype), state[key]) for key, value in again.state_dict().items())
    again = load(public, name, pipe)
    with again.attach(pipe):
        assert torch.equal(draw(pipe), first)


def test_an_interrupted_run_leaves_nothing_behind(case):
    _, _, pipe, adapter = case
    with adapter.attach(pipe):
        expected = draw(pipe)

        def stop(pipeline, step, timestep, kwargs):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), expected)


def test_a_run_that_was_stopped_and_then_another_number_of_pictures(case):
    _, name, pipe, adapter = case

    def stop(pipeline, step, timestep, kwargs):
        pipeline._interrupt = True
        return kwargs

    try:
        give_condition(name, adapter, pipe, 1)
        with adapter.attach(pipe):
            expected = zoo.generate(pipe, CAPTIONS[:1], STEPS)
        with adapter.attach(pipe):
            draw(pipe, callback_on_step_end=stop)
            assert torch.equal(zoo.generate(pipe, CAPTIONS[:1], STEPS), expected)
    finally:
        give_condition(name, adapter, pipe)


def test_whichever_pipeline_runs_the_model(case, first_of_its_class):
    """The rows of guidance are those of the pipeline that calls, also where it is not the one that was attached to."""
    _, _, pipe, adapter = case
    other = type(pipe)(**pipe.components)
    with adapter.attach(other):
        expected, single = draw(other), draw(other, guidance_scale=1.0)
    fresh = type(pipe)(**pipe.components)
    with adapter.attach(fresh):
        assert torch.equal(draw(other), expected)
        draw(fresh)
        assert torch.equal(draw(other, guidance_scale=1.0), single)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_has_run(case, first_of_its_class):
    _, _, pipe, adapter = case
    plain, part = draw(pipe, num_inference_steps=1), "unet" if hasattr(pipe, "unet") else "transformer"
    with adapter.attach(pipe):
        expected = draw(pipe, num_inference_steps=1)
    model = getattr(pipe, part)
    setattr(pipe, part, torch.compile(model, backend="eager"))
    try:
        assert torch.allclose(draw(pipe, num_inference_steps=1), plain, atol=1e-4)
        with adapter.attach(pipe):
            assert torch.allclose(draw(pipe, num_inference_steps=1), expected, atol=1e-4)
        assert torch.allclose(draw(pipe, num_inference_steps=1), plain, atol=1e-4)
    finally:
        setattr(pipe, part, model)
        torch.compiler.reset()


def test_on_an_offloaded_model(case, first_of_its_class):
    """Weights of the model are on the meta device between its calls; those of the adapter stay."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    _, _, pipe, adapter = case
    with adapter.attach(pipe):
        expected = draw(pipe)
    model = diffusers_ext.denoiser_of(pipe)
    cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        with adapter.attach(pipe):
            assert torch.equal(draw(pipe), expected)
        assert all(p.device.type == "cpu" for p in adapter.parameters())
    finally:
        remove_hook_from_module(model, recurse=True)


FRESH = """
import sys
from safetensors.torch import save_file
from tests.common.test_adapters import CASES, draw, load, model_of, zoo
name, path = sys.argv[1:]
pipe = zoo.load(model_of(name))
with load(dict((name, public) for public, name in CASES)[name], name, pipe).attach(pipe):
    save_file({"images": draw(pipe)}, path)
"""


@pytest.mark.slow
def test_a_fresh_process_draws_the_same_bits(case, first_of_its_class, tmp_path, pytestconfig):
    _, name, pipe, adapter = case
    path = tmp_path / "images.safetensors"
    subprocess.run([sys.executable, "-c", FRESH, name, path], check=True, cwd=pytestconfig.rootpath)
    with adapter.attach(pipe):
        assert torch.equal(draw(pipe), load_file(path)["images"])


@pytest.mark.parametrize("first", ["lora", "adapter"])
def test_a_lora_loaded_before_or_after(case, first):
    from peft import LoraConfig

    _, _, pipe, adapter = case
    model = diffusers_ext.denoiser_of(pipe)
    plain = draw(pipe)

    def add_lora():
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")

    try:
        add_lora()
        alone = draw(pipe)
        model.delete_adapters("style")
        if first == "lora":
            add_lora()
            adapter.attach(pipe)
        else:
            adapter.attach(pipe)
            add_lora()
        together = draw(pipe)
        assert not torch.equal(together, alone)
        adapter.set_scale(0)
        assert torch.equal(draw(pipe), alone)
        adapter.detach()
        assert torch.equal(draw(pipe), alone)
    finally:
        adapter.detach()
        model.delete_adapters("style")
    assert torch.equal(draw(pipe), plain)


def caches_for(name: str):
    target = "unet" if "unet" in name else "mmdit"
    return [r for r in list_methods(kind="cache") if {target, "any"} & set(r.targets)]


def test_beside_every_cache(case, first_of_its_class):
    _, name, pipe, adapter = case
    plain = draw(pipe, num_inference_steps=8)
    with adapter.attach(pipe):
        effect = (draw(pipe, num_inference_steps=8) - plain).norm()
    for record in caches_for(name):
        with diffusers_ext.apply(pipe, record.public()):
            cached = draw(pipe, num_inference_steps=8)
            with adapter.attach(pipe):
                together = draw(pipe, num_inference_steps=8)
                assert torch.isfinite(together).all() and torch.equal(draw(pipe, num_inference_steps=8), together)
        # As strong as without a cache, up to a factor.
        assert (together - cached).norm() > 0.3 * effect, record.slug
        assert torch.equal(draw(pipe, num_inference_steps=8), plain), record.slug


def schedulers_for(pipe) -> list[type[SchedulerMixin]]:
    """Schedulers of this package that take a model as it is, without a fit of their own."""
    found = [getattr(diffusers_ext, n) for n, module in public_names().items() if ".schedulers" in module]
    return [c for c in found if isinstance(c, type) and issubclass(c, SchedulerMixin)]


@pytest.mark.slow
def test_with_every_scheduler(case, first_of_its_class):
    """Draws with an effect, at scale 0 and afterwards the bits of the plain model; refusals are those of the plain
    model."""
    _, _, pipe, adapter = case
    usual, ran = pipe.scheduler, 0

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)  # schedulers that add noise draw it from torch's own generator
        return draw(pipe, num_inference_steps=3)

    try:
        for public in schedulers_for(pipe):
            try:
                pipe.scheduler = public.from_config(usual.config)
                plain = drawn()
            except (ValueError, TypeError, RuntimeError):  # made for other models, or wants a fit
                continue
            with adapter.attach(pipe):
                changed = drawn()
                assert torch.isfinite(changed).all() and not torch.equal(changed, plain), public.__name__
                adapter.set_scale(0)
                assert torch.equal(drawn(), plain), public.__name__
            assert torch.equal(drawn(), plain), public.__name__
            ran += 1
    finally:
        pipe.scheduler = usual
    assert ran > 5


def test_pairs_do_not_depend_on_the_order(case):
    _, name, pipe, adapter = case
    for public, other_name in CASES:
        if other_name <= name or model_of(other_name) != model_of(name):
            continue
        other = load(public, other_name, pipe)
        with adapter.attach(pipe), other.attach(pipe):
            one = draw(pipe)
        with other.attach(pipe), adapter.attach(pipe):
            assert torch.allclose(draw(pipe), one, atol=1e-4), other_name


def test_another_kind_of_model_is_refused(case):
    _, name, _, adapter = case
    pipe = zoo.load(OTHER.get(model_of(name), "shapes-dit"))
    before = traces(pipe)
    with pytest.raises((ValueError, TypeError), match="."):
        adapter.attach(pipe)
    assert traces(pipe) == before and not adapter.attached
