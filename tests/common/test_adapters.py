"""What every adapter must do, run on each registered one with its shipped weights."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

import diffusers_ext
from diffusers_ext import zoo
from diffusers_ext.adapters._common import Adapter
from diffusers_ext.registry import list_methods, public_names
from diffusers_ext.zoo.pipelines import ADAPTERS


CAPTIONS = zoo.held_out(2).captions
STEPS = 4
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
        CAPTIONS[:count],
        source.tokenizer,
        source.text_encoder,
    )


def pictures_for(kind):
    return lambda adapter, pipe, count: adapter.set_condition(pipe, kind(zoo.held_out(count)))


# What an adapter needs besides its weights, by the start of the file's name.
CONDITIONS = {
    "easycontrol-edge": edges_for,
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


def test_beside_every_cache(case):
    _, name, pipe, adapter = case
    plain = draw(pipe, num_inference_steps=8)
    for record in caches_for(name):
        with diffusers_ext.apply(pipe, record.public()), adapter.attach(pipe):
            together = draw(pipe, num_inference_steps=8)
            assert torch.isfinite(together).all() and torch.equal(draw(pipe, num_inference_steps=8), together)
        assert torch.equal(draw(pipe, num_inference_steps=8), plain), record.slug


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
