"""EasyControl on ComfyUI's own Flux: outputs of the diffusers side, cache, ranges, files and messages."""

from __future__ import annotations

import importlib

import pytest
import torch
from diffusers import FluxTransformer2DModel

from diffusers_ext import EasyControlAdapter, zoo
from diffusers_ext.eval import count_macs
from diffusers_ext.training.denoising import FluxTask


pytestmark = pytest.mark.comfy
CAPTION = "a small red circle left of a large green square, striped blue background"
FILE = "as the file says"


def made(target=None, seed=0, **config):
    """An adapter that does something, without training."""
    sizes = {"num_layers": 4, "num_single_layers": 8, "dim": 128} if target is None else {}
    torch.manual_seed(seed)
    adapter = EasyControlAdapter(**sizes, rank=4, cond_size=32, **config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapter.eval()


@pytest.fixture(scope="module")
def picture():
    """As LoadImage gives one: `[1, h, w, 3]` in [0, 1]."""
    return (zoo.held_out(1).images / 2 + 0.5).movedim(1, -1)


@pytest.fixture
def control(dx_nodes, native_pipe, picture):
    def node(model, adapter, strength=1.0, kind=FILE, size=0, start=0.0, end=1.0, image=picture, **more):
        vae = native_pipe("shapes-dit")[2]
        run = dx_nodes["DXEasyControlApply"].execute
        return run(model, vae, adapter, image, strength, kind, size, start, end, **more).args[0]

    return node


@pytest.fixture
def sample(comfy, native_pipe, encode):
    """`sample(patch)` -> latents from the core KSampler, and every call of the model: arguments and output."""

    def run(patch=lambda model: model, steps=3, shape=(16, 16), cfg=3.0):
        model, clip, _ = native_pipe("shapes-dit")
        calls, model = [], patch(model).clone()

        def note(executor, x, timesteps, context, y, *rest, **kwargs):
            found = []
            macs = count_macs(lambda: found.append(executor(x, timesteps, context, y, *rest, **kwargs)))
            calls.append((x.clone(), timesteps.clone(), context.clone(), y.clone(), found[0].clone(), macs))
            return found[0]

        kinds = comfy.patcher_extension.WrappersMP
        model.wrappers.setdefault(kinds.DIFFUSION_MODEL, {})  # the note goes around everything else
        others = model.wrappers[kinds.DIFFUSION_MODEL]
        model.wrappers[kinds.DIFFUSION_MODEL] = {"note": [note], **others}
        latent = {"samples": torch.zeros(1, 4, *shape)}
        conds = encode(clip, CAPTION), encode(clip, "")
        out = comfy.nodes.common_ksampler(model, 0, steps, cfg, "euler", "simple", *conds, latent)[0]
        return out["samples"], calls

    return run


def replayed(calls, *adapters):
    """The same calls through diffusers, with the conditions of (adapter, scale)."""
    transformer = zoo.load("shapes-dit").transformer
    for adapter, scale in adapters:
        adapter.attach(transformer, scale)
    with torch.no_grad():
        outs = [FluxTask.predict(transformer, x, t, {"t5": c, "pooled": y}) for x, t, c, y, *_ in calls]
    for adapter, _ in adapters:
        adapter.detach()
    return outs


def gap(calls, outs):
    return max((call[4] - out).abs().max().item() for call, out in zip(calls, outs))


def test_parity_with_diffusers(sample, control, picture):
    """Spatial over a wide picture and a subject beside it, both at once, with guidance in one batch."""
    edge, subject = made(), made(seed=1, condition_type="subject")
    _, calls = sample(lambda m: control(control(m, edge), subject, 0.7, size=16), shape=(16, 24))
    assert {len(call[0]) for call in calls} == {2}
    plain = zoo.load("shapes-dit")
    image = picture.movedim(-1, 1) * 2 - 1
    edge.set_condition(plain, image)
    subject.set_condition(plain, image, cond_size=16)
    assert gap(calls, replayed(calls, (edge, 1.0), (subject, 0.7))) < 1e-4
    assert gap(calls, replayed(calls)) > 1e-2, "the control does something"


def test_a_condition_of_the_picture_s_own_shape(sample, control, picture, dx_nodes):
    """Width and height: as `cond_size=(height, width)` in diffusers; left out, as in old workflows, a square."""
    height = next(i for i in dx_nodes["DXEasyControlApply"].define_schema().inputs if i.id == "cond_height")
    assert height.optional and height.default == 0
    edge, plain = made(), zoo.load("shapes-dit")
    _, calls = sample(lambda m: control(m, edge, size=48, cond_height=32), shape=(16, 24))
    edge.set_condition(plain, picture.movedim(-1, 1) * 2 - 1, cond_size=(32, 48))
    assert gap(calls, replayed(calls, (edge, 1.0))) < 1e-4
    edge.set_condition(plain, picture.movedim(-1, 1) * 2 - 1, cond_size=48)
    assert gap(calls, replayed(calls, (edge, 1.0))) > 1e-3


def test_guidance_reaches_the_condition(comfy):
    """A random FLUX.1-dev layout with guidance embedding, in both libraries: the same keys and values."""
    from comfy.ldm.flux.model import Flux
    from comfy.ops import manual_cast

    from comfy_nodes._easycontrol import native_stream
    from diffusers_ext.adapters._easycontrol_stream import flux_stream
    from diffusers_ext.zoo import comfy_layout

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    text = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4)}
    theirs = FluxTransformer2DModel(**sizes, **text, in_channels=16, guidance_embeds=True).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = dict(theirs.config)
    arguments = comfy_layout.flux_arguments(config, 4)
    native = Flux(**arguments, dtype=torch.float32, device="cpu", operations=manual_cast).eval()
    native.load_state_dict(comfy_layout.flux_state(theirs.state_dict(), config))
    adapter = EasyControlAdapter.for_model(theirs, rank=4)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pooled, latents = torch.randn(2, 8), torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        for guidance in (torch.tensor([3.5, 3.5]), torch.tensor([1.0, 7.0])):
            one = adapter.encode(flux_stream(theirs, pooled, guidance, torch.float32), latents, "spatial", (8, 5))
            other = adapter.encode(native_stream(native, pooled, guidance, latents), latents, "spatial", (8, 5))
            assert all((a - b).abs().max() < 1e-4 for x, y in zip(one, other, strict=True) for a, b in zip(x, y))


def test_the_condition_is_computed_once(sample, control):
    _, plain = sample()
    _, calls = sample(lambda m: control(m, made()))
    first, *rest = [call[5] - bare[5] for call, bare in zip(calls, plain)]
    tokens, condition, width, blocks, batch = 20 + 64, 16, 128, 12, 2
    assert rest == [blocks * batch * 2 * tokens * condition * width] * 2, "attention to 16 more keys, nothing else"
    assert first > 10 * rest[0]


def test_order_does_not_matter(sample, control):
    a, b = made(), made(seed=1, condition_type="subject")
    one, _ = sample(lambda m: control(control(m, a), b))
    other, _ = sample(lambda m: control(control(m, b), a))
    alone, _ = sample(lambda m: control(m, a))
    assert (one - other).abs().max() < 1e-4 < (one - alone).abs().max()


def test_runs_do_not_share_keys(sample, control, picture):
    """The same patched model, sampled twice, gives the same; another picture gives another result."""
    patched = []

    def keep(model):
        patched.append(control(model, made()))
        return patched[-1]

    once, _ = sample(keep)
    again, _ = sample(lambda m: patched[-1])
    other, _ = sample(lambda m: control(m, made(), image=picture.flip(2)))
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_strength_zero_and_ranges(sample, control):
    bare, _ = sample(steps=4)
    off, _ = sample(lambda m: control(m, made(), strength=0.0), steps=4)
    assert torch.equal(bare, off)
    _, plain = sample(steps=4)
    _, calls = sample(lambda m: control(m, made(), start=0.3, end=0.6), steps=4)
    active = [call[5] > bare_call[5] for call, bare_call in zip(calls, plain)]
    sigmas = [float(call[1][0]) for call in calls]
    assert active == [0.4 <= sigma <= 0.7 for sigma in sigmas] and any(active) and not all(active)


def test_the_loader_lists_and_loads(dx_nodes, tmp_path, monkeypatch):
    adapters = importlib.import_module("comfy_nodes._adapters").ADAPTERS
    monkeypatch.setattr(type(adapters), "folders", lambda self: [tmp_path, tmp_path / "none"])
    adapter = made()
    adapter.save_file(tmp_path / "edges.safetensors")
    assert adapters.options() == ["edges.safetensors"]
    loaded = dx_nodes["DXEasyControlLoader"].execute("edges.safetensors").args[0]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters()))
    with pytest.raises(ValueError, match="no adapter 'gone"):
        dx_nodes["DXEasyControlLoader"].execute("gone.safetensors")


def test_bad_input(control, native_pipe):
    model = native_pipe("shapes-dit")[0]
    with pytest.raises(ValueError, match="works on Flux.1 models, not on UNetModel"):
        control(native_pipe("shapes-unet")[0], made())
    with pytest.raises(ValueError, match="made for num_layers=1, the model has 4"):
        control(model, EasyControlAdapter(1, 8, 128, rank=2))
    with pytest.raises(ValueError, match="cond_size is 36: give a multiple of 8"):
        control(model, made(), size=36)
    with pytest.raises(ValueError, match="cond_height is 20: give a multiple of 8"):
        control(model, made(), cond_height=20)
    with pytest.raises(ValueError, match="cond_height is 32: subjects are padded to a square"):
        control(model, made(), kind="subject", cond_height=32)
