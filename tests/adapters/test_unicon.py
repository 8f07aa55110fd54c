"""UniCon: identity, the joint attention against the paper's batched form, schedules, pipeline, what was learnt."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

import diffusers_ext
from diffusers_ext import UniConAdapter, UniConPipeline, zoo
from diffusers_ext.adapters._unicon_joint import PROJECTIONS
from diffusers_ext.adapters.unicon_pipeline import guided, sample_schedule
from diffusers_ext.zoo.conditions import depth, edge_f1, edge_iou, edges, outlines


PAIR = (slice(0, 2), slice(2, 4), 1.0, 1.0)
PICTURES, STEPS = 8, 12


def awake(adapter, seed=0, std=0.1):
    """An adapter that does something, without training."""
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)
    return adapter.eval()


def fresh(pipe, name="depth", **config):
    return UniConAdapter.for_model(pipe, **{"rank": 4, "model_name": name, **config})


def noise(n=1, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def pictures(n=2, seed=0, channels=3):
    return torch.rand(n, channels, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def call():
    """x and y of two pictures, at four different noise levels."""
    torch.manual_seed(0)
    return torch.randn(4, 4, 16, 16), torch.tensor([900, 500, 300, 20]), torch.randn(4, 20, 128)


@pytest.fixture
def unicon(shapes_unet):
    """The pipeline of this method over the shared model."""
    pipe = UniConPipeline.from_pipe(shapes_unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def output(unet, call):
    return unet(*call).sample


class TestIdentity:
    @pytest.mark.parametrize("config", [{}, {"post_joint": "conv"}, {"use_y_lora": False}])
    def test_fresh_adapter_equals_two_runs_of_the_base(self, shapes_unet, call, config):
        unet = shapes_unet.unet
        alone = torch.cat([output(unet, [part[rows] for part in call]) for rows in PAIR[:2]])
        adapter = fresh(shapes_unet, **config)
        with adapter.attach(unet), adapter.paired(PAIR):
            assert (output(unet, call) - alone).abs().max() < 1e-5

    def test_without_pairs_and_at_scale_zero_it_is_the_base(self, shapes_unet, call):
        unet, adapter = shapes_unet.unet, awake(fresh(shapes_unet))
        plain = output(unet, call)
        with adapter.attach(unet):
            with adapter.paired():
                assert torch.equal(output(unet, call), plain)
            with adapter.paired(PAIR):
                assert not torch.allclose(output(unet, call), plain, atol=1e-2)
                adapter.set_scale(0)
                assert torch.equal(output(unet, call), plain)
        assert torch.equal(output(unet, call), plain)

    def test_pipeline_with_joint_scale_zero(self, shapes_unet, unicon):
        """The bits of a run without pairs; and x is what Stable Diffusion draws from the same noise."""
        options = {"prompts": ["a red circle", "a star"], "num_inference_steps": 3, "output_type": "latent"}
        with awake(fresh(unicon)).attach(unicon):
            off = unicon(joint_scale=0.0, generator=noise(), **options).images
            none = unicon(pairs=[], generator=noise(), **options).images
            on = unicon(generator=noise(), **options).images
        plain = shapes_unet("a red circle", num_inference_steps=3, output_type="latent", generator=noise()).images
        assert all(torch.equal(a, b) for a, b in zip(off, none))
        torch.testing.assert_close(off[0], plain, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(on[0], plain, atol=1e-2) and not torch.allclose(on[1], off[1], atol=1e-2)

    def test_separability(self, shapes_unet, call):
        """Another y changes x only through the joint attention."""
        unet, adapter = shapes_unet.unet, awake(fresh(shapes_unet))
        other = [call[0].clone(), *call[1:]]
        other[0][2:] = torch.randn(2, 4, 16, 16)
        with adapter.attach(unet):
            for joint in (True, False):
                with adapter.paired(PAIR, joint=joint):
                    away = (output(unet, call) - output(unet, other)).abs().amax((1, 2, 3))
                assert away[2:].min() > 0.1
                assert (away[:2].max() < 1e-5) is not joint


class TestFormula:
    """One block against the batched form: queries [x; y], contexts [y; x], a mask of rows for every update."""

    NAME = "up_blocks.1.attentions.0.transformer_blocks.0"

    def lora(self, weights, branch, attention, projection, x, mask):
        path = f"{branch}.{self.NAME}.{attention}.{projection}"
        if f"{path}.up.weight" not in weights:
            return 0
        return mask.view(-1, 1, 1) * (x @ weights[f"{path}.down.weight"].T @ weights[f"{path}.up.weight"].T)

    def attention(self, attn, weights, h, context, updates):
        """Softmax attention with heads written out; `updates`: (branch, attention, mask of q and out, of k and v)."""

        def project(name, x):
            total = attn.get_submodule(name)(x)
            for branch, where, own, others in updates:
                mask = own if name in ("to_q", "to_out.0") else others
                total = total + self.lora(weights, branch, where, name, x, mask)
            return total

        q, k, v = (
            project(name, x).unflatten(-1, (attn.heads, -1)).movedim(2, 1)
            for name, x in (("to_q", h), ("to_k", context), ("to_v", context))
        )
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return project("to_out.0", (scores @ v).movedim(1, 2).flatten(2))

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["conv", "conv_fuse"])
    def test_self_attention(self, shapes_unet, kind):
        attn = shapes_unet.unet.get_submodule(self.NAME).attn1
        adapter = awake(fresh(shapes_unet, post_joint=kind))
        weights, h = adapter.state_dict(), torch.randn(6, 16, 64)
        x, y = slice(0, 3), slice(3, 6)
        on_x = torch.tensor([1.0, 1, 1, 0, 0, 0])
        on_y = 1 - on_x
        a = self.attention(attn, weights, h, h, [("y_lora", "attn1", on_y, on_y)])
        swapped = torch.cat([h[y], h[x]])
        joint = self.attention(
            attn, weights, h, swapped, [("xy_lora", "attn1n", on_x, on_y), ("yx_lora", "attn1n", on_y, on_x)]
        )
        post = weights[f"post.{self.NAME}.weight"]
        if kind == "conv":
            jx, jy = (joint @ post.T).chunk(2)
        else:
            jx, jy = (torch.cat(joint.chunk(2), -1) @ post.T).chunk(2, -1)
        a[x] += 0.7 * 0.5 * jx
        a[y] += 0.7 * 2.0 * jy
        with adapter.attach(shapes_unet.unet, 0.7), adapter.paired((x, y, 0.5, 2.0)):
            adapter._live = adapter._arranged(6, h.device)
            torch.testing.assert_close(attn(h), a, atol=1e-5, rtol=1e-4)
            # Two stacked copies of the batch, as caches make them.
            torch.testing.assert_close(attn(torch.cat([h, h])), torch.cat([a, a]), atol=1e-5, rtol=1e-4)
            adapter._live = None

    @torch.no_grad()
    def test_y_update_of_cross_attention_touches_y_only(self, shapes_unet):
        attn = shapes_unet.unet.get_submodule(self.NAME).attn2
        adapter = awake(fresh(shapes_unet))
        h, text, on_y = torch.randn(4, 16, 64), torch.randn(4, 20, 128), torch.tensor([0.0, 0, 1, 1])
        updates = [("y_lora", "attn2", on_y, on_y)]
        expected, plain = self.attention(attn, adapter.state_dict(), h, text, updates), attn(h, text)
        with adapter.attach(shapes_unet.unet), adapter.paired(PAIR):
            adapter._live = adapter._arranged(4, h.device)
            found = attn(h, text)
            adapter._live = None
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(found[:2], plain[:2]) and not torch.allclose(found[2:], plain[2:], atol=1e-3)

    def test_guidance(self):
        u, c, s = (torch.tensor([value]) for value in (1.0, 3.0, 2.5))
        assert guided(u, c, s, 2.0, 4.0).item() == 1 + 2 * (3 - 1) + 4 * (3 - 2.5)
        assert guided(u, c, None, 2.0, 0.0).item() == 5 and guided(None, c, s, 2.0, 4.0).item() == 5

    def test_two_pairs_add_up_in_any_order(self, shapes_unet, call):
        """One x with two y of two adapters: x gets both joint terms, computed from the same hidden states."""
        unet = shapes_unet.unet
        depth, edge = awake(fresh(shapes_unet), 1), awake(fresh(shapes_unet, "edge"), 2)
        pairs = ([0, 1], [2, 2], 1.0, 1.0), ([0, 1], [3, 3], 0.5, 1.0)
        found = []
        for first, second in ((depth, edge), (edge, depth)):
            with first.attach(unet), second.attach(unet), depth.paired(pairs[0]), edge.paired(pairs[1]):
                found.append(output(unet, call))
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
        with depth.attach(unet), depth.paired(pairs[0]):
            assert not torch.allclose(output(unet, call), found[0], atol=1e-2)


class TestParameters:
    def test_trained_are_the_updates_and_the_layers_after(self, call):
        pipe = zoo.load("shapes-unet")
        pipe.unet.requires_grad_(False)
        adapter = awake(UniConAdapter.for_model(pipe, rank=16))
        with adapter.attach(pipe.unet), adapter.paired(PAIR):
            pipe.unet(*call).sample.square().mean().backward()
        assert all(p.grad is None for p in pipe.unet.parameters())
        assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
        assert {name.split(".")[0] for name, _ in adapter.named_parameters()} == {
            "xy_lora",
            "yx_lora",
            "y_lora",
            "post",
        }
        assert all(name.startswith("post.") or ".up." in name or ".down." in name for name in adapter.state_dict())
        base = sum(p.numel() for p in pipe.unet.parameters())
        assert sum(p.numel() for p in adapter.parameters()) < 0.2 * base

    def test_share_of_stable_diffusion(self):
        """The paper's 15 % are these weights and its frozen copies of the self-attention, not needed here."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            adapter = UniConAdapter.for_model(unet)
            small = UniConAdapter.for_model(unet, skip_encoder=True)
        base, ours, less = (sum(p.numel() for p in m.parameters()) for m in (unet, adapter, small))
        copies = sum(4 * width**2 + width for width in adapter.config.blocks.values())
        assert len(adapter.config.blocks) == 16 and len(small.config.blocks) == 10
        assert less < ours < 0.1 * base
        assert (ours + copies) / base == pytest.approx(0.15, abs=0.01)


class TestControl:
    """`set_condition` on an ordinary pipeline."""

    def draw(self, pipe, **options):
        options = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt", **options}
        return pipe(["a red circle", "a blue star"], generator=noise(2), **options).images

    @pytest.mark.parametrize("guidance", [1.0, 3.0])
    def test_it_is_what_the_pipeline_of_two_inputs_draws(self, shapes_unet, unicon, guidance):
        adapter, y = awake(fresh(shapes_unet, trigger_word="a ")), pictures()
        adapter.set_condition(shapes_unet, y, prompt=["red star", "white ring"])
        with adapter.attach(shapes_unet):
            ordinary = self.draw(shapes_unet, guidance_scale=guidance)
            prompts = [["a red circle", "a blue star"], ["red star", "white ring"]]
            x, again = unicon(
                images=[None, y], prompts=prompts, guidance_scale=guidance, num_inference_steps=3,
                generator=noise(2), output_type="pt",
            ).images  # fmt: skip
        torch.testing.assert_close(ordinary, x, atol=1e-4, rtol=1e-3)
        vae = shapes_unet.vae
        with torch.no_grad():
            kept = vae.decode(vae.encode(y * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        torch.testing.assert_close(again, kept.clamp(0, 1), atol=1e-4, rtol=1e-3)

    def test_two_conditions_in_any_order(self, shapes_unet):
        depth, edge = awake(fresh(shapes_unet), 1), awake(fresh(shapes_unet, "edge"), 2)
        depth.set_condition(shapes_unet, pictures(1))
        edge.set_condition(shapes_unet, pictures(2, 1))
        with depth.attach(shapes_unet), edge.attach(shapes_unet):
            one = self.draw(shapes_unet)
        with edge.attach(shapes_unet), depth.attach(shapes_unet):
            torch.testing.assert_close(self.draw(shapes_unet), one, atol=1e-3, rtol=1e-3)
            edge.set_scale(0)
            assert not torch.allclose(self.draw(shapes_unet), one, atol=1e-2)

    def test_residuals_of_controlnet_reach_x_only(self, shapes_unet):
        """And text, and pictures of an IP-Adapter, are there for every row."""
        unet, adapter, seen = shapes_unet.unet, awake(fresh(shapes_unet)), {}
        adapter.set_condition(shapes_unet, pictures())
        handle = unet.mid_block.register_forward_hook(lambda m, a, out: seen.update(mid=out))
        inner = unet.down_blocks[0].register_forward_pre_hook(
            lambda m, a, kw: seen.update(rows=len(kw["hidden_states"])), with_kwargs=True
        )
        sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 20, 128)
        with torch.no_grad():
            down = unet_skips(unet, sample, text)
            with adapter.attach(unet):
                plain = unet(sample, 500, text).sample
                residuals = {
                    "down_block_additional_residuals": tuple(torch.zeros_like(skip) for skip in down),
                    "mid_block_additional_residual": torch.ones(2, 128, 4, 4),
                }
                controlled = unet(sample, 500, text, **residuals).sample
                (named,) = unet(sample, 500, text, return_dict=False)
        handle.remove()
        inner.remove()
        assert seen["rows"] == 4 and torch.equal(named, plain) and len(controlled) == 2
        assert not torch.allclose(controlled, plain, atol=1e-2)

    def test_with_an_ip_adapter_layout(self, shapes_unet):
        """`added_cond_kwargs` with one row per image are given to y as well."""
        unet, adapter = shapes_unet.unet, awake(fresh(shapes_unet))
        adapter.set_condition(shapes_unet, pictures())
        arguments = {
            "sample": torch.zeros(2, 4, 16, 16),
            "timestep": 5,
            "encoder_hidden_states": torch.zeros(2, 20, 128),
        }
        images = torch.arange(2.0).view(2, 1, 1)
        arguments["added_cond_kwargs"] = {"image_embeds": [images], "time_ids": torch.zeros(1)}
        with adapter.attach(unet):
            from diffusers_ext.adapters.unicon import _Companions

            _Companions._active[unet]._extend(arguments, [adapter])
            adapter._live = None
        assert arguments["added_cond_kwargs"]["image_embeds"][0].flatten().tolist() == [0, 1, 0, 1]
        assert len(arguments["added_cond_kwargs"]["time_ids"]) == 1
        assert arguments["timestep"].tolist()[:2] == [5, 5] and len(arguments["timestep"]) == 4

    def test_perturbed_attention_guidance_is_refused(self, shapes_unet, monkeypatch):
        adapter = awake(fresh(shapes_unet))
        adapter.set_condition(shapes_unet, pictures(1))
        monkeypatch.setattr(shapes_unet, "do_perturbed_attention_guidance", True, raising=False)
        with adapter.attach(shapes_unet), pytest.raises(ValueError, match="set pag_scale=0"):
            self.draw(shapes_unet)

    def test_bad_input(self, shapes_unet):
        adapter = awake(fresh(shapes_unet))
        for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 2, 64, 64), "depth.png"):
            with pytest.raises((ValueError, TypeError), match="accepted: a tensor"):
                adapter.set_condition(shapes_unet, wrong)
        with adapter.attach(shapes_unet):
            with pytest.raises(RuntimeError, match="nothing to draw by"):
                self.draw(shapes_unet)
            adapter.set_condition(shapes_unet, torch.zeros(1, 3, 32, 32))
            with pytest.raises(ValueError, match="give pictures of the size of the image"):
                self.draw(shapes_unet)
            adapter.set_condition(shapes_unet, pictures(3))
            with pytest.raises(ValueError, match="3 pictures y for 2 images"):
                self.draw(shapes_unet)
            adapter.set_condition(shapes_unet, pictures(1), prompt=["a", "b", "c"])
            with pytest.raises(ValueError, match="3 prompts of y for 2 images"):
                self.draw(shapes_unet)


def unet_skips(unet, sample, text):
    """What ControlNet residuals are added to."""
    skips = []
    last = unet.up_blocks[0].register_forward_pre_hook(
        lambda m, a, kw: skips.extend(kw["res_hidden_states_tuple"]), with_kwargs=True
    )
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, kw: skips.__setitem__(slice(0, 0), kw["res_hidden_states_tuple"]), with_kwargs=True
        )
        for block in unet.up_blocks[1:]
    ]
    unet(sample, 500, text)
    for hook in [last, *hooks]:
        hook.remove()
    return skips


class TestSchedule:
    def test_control_estimation_and_joint(self):
        assert sample_schedule([1, 0], 4) == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert sample_schedule([0, 1], 3) == [(2, 0), (2, 1), (2, 2)]
        assert sample_schedule([1, 1], 3) == [(0, 0), (1, 1), (2, 2)]

    def test_coarse_y_is_denoised_along(self):
        assert sample_schedule([1, 0.5], 6) == [(0, 3), (1, 3), (2, 4), (3, 4), (4, 5), (5, 5)]
        assert sample_schedule([0.5, 0], 6) == [(3, 5), (4, 5), (5, 5)]

    @pytest.mark.parametrize("strengths", [(1, 0.3), (0.9, 0.6, 0.2), (0.7, 1, 0)])
    @pytest.mark.parametrize("steps", [1, 2, 7, 50])
    def test_every_index_is_visited_once(self, strengths, steps):
        for strength, places in zip(strengths, zip(*sample_schedule(strengths, steps))):
            start = min(int((1 - strength) * steps + 1e-6), steps)
            visited = sorted(set(places))
            assert visited == (list(range(start, steps)) or [steps - 1])
            assert all(b - a in (0, 1) for a, b in zip(places, places[1:]))

    def test_order_two_starts_at_a_whole_step(self):
        assert {places[1] for places in sample_schedule([1, 0.5], 7, order=2)} == {2, 3, 4, 5, 6}

    def test_nothing_to_draw(self):
        with pytest.raises(ValueError, match="leave nothing to draw"):
            sample_schedule([0, 0], 10)


class TestPipeline:
    OPTIONS = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 3.0}

    @pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
    def test_each_input_has_its_own_scheduler(self, unicon, scheduler):
        """Without joint attention a multistep run of three inputs is three runs, whatever their noise levels."""
        unicon.scheduler = scheduler.from_config(unicon.scheduler.config)
        alone = StableDiffusionPipeline.from_pipe(unicon)
        alone.set_progress_bar_config(disable=True)
        start = [torch.randn(1, 4, 16, 16, generator=g) for g in noise(3)]
        prompts = ["a red circle", "a blue star", "a white ring"]
        options = {**self.OPTIONS, "pairs": [], "latents": start}
        found = unicon(images=[None, None, pictures(1)], strengths=[1, 1, 0.5], prompts=prompts, **options).images
        for x, prompt, latents in zip(found[:2], prompts, start):
            expected = alone(prompt, latents=latents, **self.OPTIONS).images
            torch.testing.assert_close(x, expected, atol=1e-3, rtol=1e-3)
        assert torch.isfinite(found[2]).all()

    def test_batches_and_several_pictures_per_prompt(self, unicon):
        options = {**self.OPTIONS, "images": [None, pictures()], "strengths": [1, 0.4]}
        with awake(fresh(unicon)).attach(unicon):
            both = unicon(prompts=[["a red circle", "a star"], "a ring"], generator=noise(2), **options).images
            assert [len(one) for one in both] == [2, 2]
            options["images"] = [None, pictures()[1:]]
            alone = unicon(prompts=["a star", "a ring"], generator=noise(1, 1), **options).images
            torch.testing.assert_close(both[0][1:], alone[0], atol=1e-3, rtol=1e-3)
            twice = unicon(prompts="a star", num_images_per_prompt=2, **options).images
            assert [len(one) for one in twice] == [2, 2]

    def test_masks_keep_what_is_known(self, unicon):
        known, mask = pictures(1), torch.zeros(1, 1, 64, 64)
        mask[..., 32:] = 1
        with awake(fresh(unicon)).attach(unicon):
            x, y = unicon(
                images=[known, None], strengths=[1.0, 1.0], masks=[mask, None], generator=noise(), **self.OPTIONS
            ).images
        vae = unicon.vae
        with torch.no_grad():
            z = vae.encode(known * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        torch.testing.assert_close(x[..., :8], z[..., :8], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(x[..., 8:], z[..., 8:], atol=0.1) and y.shape == x.shape

    def test_cond_guidance(self, unicon):
        """g_c (c_joint - c_separate): 0 without the joint attention's effect, linear in the first step's output."""
        found = {}
        with awake(fresh(unicon)).attach(unicon):
            for g_c in (0.0, 1.0, 2.0):
                options = {**self.OPTIONS, "num_inference_steps": 1, "cond_guidance_scale": g_c}
                found[g_c] = unicon(prompts="a star", generator=noise(), **options).images[0]
        assert not torch.allclose(found[0.0], found[1.0], atol=1e-2)
        torch.testing.assert_close(found[2.0] - found[1.0], found[1.0] - found[0.0], atol=1e-3, rtol=1e-3)
        with fresh(unicon).attach(unicon):
            one, two = (
                unicon(prompts="a star", generator=noise(), cond_guidance_scale=g, **self.OPTIONS).images[0]
                for g in (0.0, 5.0)
            )
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)

    def test_pil_pictures_callback_and_saving(self, unicon, tmp_path):
        from PIL import Image

        seen = []

        def note(pipe, step, times, tensors):
            seen.append((step, [int(t) for t in times], len(tensors["latents"])))
            return {}

        options = {"num_inference_steps": 2, "callback_on_step_end": note}
        with awake(fresh(unicon)).attach(unicon):
            x, y = unicon(images=[None, Image.new("RGB", (64, 64), "red")], **options).images
        assert x[0].size == y[0].size == (64, 64) and [s[0] for s in seen] == [0, 1]
        assert seen[0][1] == [999, 499] and seen[1][1] == [499, 499]
        unicon.save_pretrained(tmp_path)
        again = diffusers_ext.UniConPipeline.from_pretrained(tmp_path)
        assert type(again) is UniConPipeline and not any("lora" in key for key in again.unet.state_dict())

    def test_with_a_cache(self, unicon):
        with awake(fresh(unicon)).attach(unicon), diffusers_ext.apply(unicon, diffusers_ext.DeepCacheConfig()):
            options = {**self.OPTIONS, "num_inference_steps": 6}
            one, two = (unicon(prompts="a star", generator=noise(), **options).images for _ in range(2))
        assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(one, two))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"pairs": [(0, 2, "depth")]}, r"names input 2; there are 0 to 1"),
            ({"pairs": [(0, 1, "dpeth")]}, "Did you mean 'depth'"),
            ({"pairs": [(0, 1)]}, "is not \\(x, y, weight of x"),
            ({"pairs": [(1, 1, "depth")]}, "with itself"),
            ({"prompts": ["a", "b", "c"]}, "3 inputs for 1 attached adapters"),
            ({"prompts": [["a", "b"], ["c", "d", "e"]]}, "give one, or as many everywhere"),
            ({"images": [torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 32, 64)]}, "different sizes"),
            ({"images": [None, torch.zeros(1, 3, 64, 64)], "height": 32}, "resize it"),
            ({"images": [None, torch.zeros(1, 3, 62, 64)]}, "multiples of 4"),
            ({"strengths": [1, 0]}, "no picture"),
            ({"strengths": [1, 2]}, "strength of input 1 is 2"),
            ({"guidance_scale": [1.0]}, "guidance_scale has 1 entries for 2 inputs"),
            ({"masks": [torch.zeros(64, 64), None]}, "accepted: a tensor"),
            ({"latents": [torch.zeros(1, 4, 8, 8), None]}, "latents of input 0"),
            ({"generator": [torch.Generator()] * 3}, "3 generators for 1 pictures"),
        ],
    )
    def test_bad_input(self, unicon, options, words):
        with fresh(unicon).attach(unicon), pytest.raises(ValueError, match=words):
            unicon(**{"prompts": "a star", "num_inference_steps": 2, **options})

    def test_two_adapters_of_one_name(self, unicon):
        with (
            fresh(unicon).attach(unicon),
            fresh(unicon).attach(unicon),
            pytest.raises(ValueError, match="same model_name"),
        ):
            unicon(prompts="a star")


class TestFiles:
    def official(self, folder, adapter, peft=False):
        """The folder that the authors' training writes, from the weights of an adapter."""
        files = {part: {} for part in ("xy_lora", "yx_lora", "y_lora")}
        model = {}
        for name, tensor in adapter.state_dict().items():
            part, rest = name.split(".", 1)
            if part == "post":
                model[rest.replace(".weight", ".conv1n.weight")] = tensor
            else:
                up, down = ("lora_B", "lora_A") if peft else ("lora.up", "lora.down")
                rest = rest.replace(".up.", f".{up}.").replace(".down.", f".{down}.")
                files[part][f"unet.{rest}"] = tensor
        for block, width in adapter.config.blocks.items():
            for projection in PROJECTIONS:
                model[f"{block}.attn1n.{projection}.weight"] = torch.zeros(width, width)
        for part, tensors in files.items():
            if tensors:
                (folder / part).mkdir(parents=True)
                save_file(
                    {k: v.clone() for k, v in tensors.items()}, folder / part / "pytorch_lora_weights.safetensors"
                )
        save_file({k: v.clone() for k, v in model.items()}, folder / "model.safetensors")
        return folder

    @pytest.mark.parametrize(
        ("config", "peft"), [({}, False), ({"post_joint": "conv", "use_y_lora": False}, True), ({"rank": 2}, True)]
    )
    def test_the_authors_layout(self, shapes_unet, tmp_path, config, peft):
        adapter = awake(fresh(shapes_unet, **config))
        loaded = UniConAdapter.from_pretrained(
            self.official(tmp_path / "depth", adapter, peft), trigger_word="depth_map, "
        )
        state = loaded.state_dict()
        assert state.keys() == adapter.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in adapter.state_dict().items())
        assert loaded.config.model_name == "depth" and loaded.config.trigger_word == "depth_map, "
        assert loaded.config.post_joint == adapter.config.post_joint
        with loaded.attach(shapes_unet):
            pass

    def test_what_is_wrong_with_a_folder(self, shapes_unet, tmp_path):
        folder = self.official(tmp_path / "depth", awake(fresh(shapes_unet)))
        model = folder / "model.safetensors"
        model.rename(folder / "model.pth")
        with pytest.raises(ValueError, match="weights_only=True"):
            UniConAdapter.from_pretrained(folder)
        save_file({"time_embedding.linear_1.weight": torch.zeros(1)}, model)
        with pytest.raises(ValueError, match="model.time_embedding.linear_1.weight"):
            UniConAdapter.from_pretrained(folder)
        (folder / "model.pth").rename(model)
        lora = folder / "yx_lora/pytorch_lora_weights.safetensors"
        lora.unlink()
        with pytest.raises(ValueError, match="no yx_lora"):
            UniConAdapter.from_pretrained(folder)
        save_file({}, lora)
        with pytest.raises(ValueError, match="tensors missing"):
            UniConAdapter.from_pretrained(folder)

    def test_another_model(self, shapes_unet, shapes_dit, tmp_path):
        with pytest.raises(ValueError, match="has no blocks that UniCon knows"):
            UniConAdapter.for_model(shapes_dit)
        with pytest.raises(ValueError, match="with 8 channels, is missing"):
            UniConAdapter({"down_blocks.9": 8}, 128, rank=2).attach(shapes_unet)
        blocks = {**fresh(shapes_unet).config.blocks, TestFormula.NAME: 32}
        with pytest.raises(ValueError, match="with 32 channels, has 64 channels"):
            UniConAdapter(blocks, 128, rank=2).attach(shapes_unet)
        with pytest.raises(ValueError, match="text of width 128, the adapter 768"):
            UniConAdapter(fresh(shapes_unet).config.blocks, rank=2).attach(shapes_unet)

    @pytest.mark.parametrize(
        ("config", "words"),
        [({"rank": 0}, "rank is 0"), ({"post_joint": "add"}, "'conv_fuse', 'conv'"), ({"blocks": {}}, "for_model")],
    )
    def test_configs(self, config, words):
        with pytest.raises(ValueError, match=words):
            UniConAdapter(**{"blocks": {"a": 8}, **config})

    def test_pairs_that_do_not_fit_a_batch(self, shapes_unet, call):
        adapter = fresh(shapes_unet)
        with adapter.attach(shapes_unet.unet):
            for pair, words in (
                (([0], [7], 1, 1), "row 7 of a batch of 4"),
                (([0, 1], [2], 1, 1), "2 rows of x for 1"),
            ):
                with adapter.paired(pair), pytest.raises(ValueError, match=words):
                    output(shapes_unet.unet, call)


class TestTraining:
    @pytest.mark.parametrize("name", ["depth", "edge"])
    def test_the_example_runs(self, request, tmp_path, name):
        path = request.config.rootpath / "examples/train_adapters/unicon.py"
        spec = importlib.util.spec_from_file_location("train_unicon", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main([name, "--work", str(tmp_path), "--images", "16", "--steps", "2", "--batch", "4"])
        trained = UniConAdapter.from_pretrained(tmp_path / f"unicon-{name}-shapes-unet.safetensors")
        assert trained.config.model_name == name
        assert all(torch.isfinite(v).all() for v in trained.state_dict().values())
        assert all(trained.post.get_submodule(block).weight.any() for block in trained.config.blocks)


class Draws:
    """What the shipped adapters draw of held-out scenes with plain grounds, where all edges are the objects'.

    Captions tell neither place nor size. Every run has the same noise; each is made once.
    """

    def __init__(self, count=PICTURES, keep=("background",)):
        scenes = zoo.held_out(3 * count)
        rows = (scenes.specs[:, 1] == 0).nonzero().flatten()[:count]
        captions = [zoo.caption(scenes.specs[i].tolist(), keep=keep) for i in rows]
        self.scenes = zoo.Scenes(scenes.specs[rows], captions, scenes.images[rows], scenes.masks[rows])
        self.y = {"depth": depth(self.scenes), "edge": outlines(self.scenes)}
        self.pipe = UniConPipeline.from_pipe(zoo.load("shapes-unet"))
        self.pipe.set_progress_bar_config(disable=True)
        self.adapters = {
            name: UniConAdapter.from_pretrained(zoo.adapter_file(f"unicon-{name}-shapes-unet")) for name in self.y
        }
        self.kept = {}

    def run(self, names, images, texts=None, guidance=3.0, **options):
        with contextlib.ExitStack() as attached:
            for name in names:
                attached.enter_context(self.adapters[name].attach(self.pipe))
            return self.pipe(
                images=images, prompts=[self.scenes.captions] * len(images) if texts is None else texts,
                guidance_scale=guidance, num_inference_steps=STEPS, generator=noise(len(self.scenes)),
                output_type="pt", **options,
            ).images  # fmt: skip

    def once(self, key, *arguments, **options):
        if key not in self.kept:
            self.kept[key] = self.run(*arguments, **options)
        return self.kept[key]

    def free(self, **options):
        """Without any condition."""
        return self.once(("free", *options), ["depth"], [None, self.y["depth"]], joint_scale=0.0, **options)[0]

    def controlled(self, name, strength=0.0):
        options = {"strengths": [1.0, strength]} if strength else {}
        return self.once((name, strength), [name], [None, self.y[name]], **options)[0]

    def estimated(self, name):
        images = [(self.scenes.images + 1) / 2, None]
        return self.once((name, "estimated"), [name], images, texts="", guidance=1.0)[1].mean(1, keepdim=True)

    def layout(self, x, tolerance=1):
        """IoU of the edges of x with the outlines of the scenes, within so many pixels."""
        return edge_iou(edges(x * 2 - 1), outlines(self.scenes, 0), tolerance).mean().item()

    def agreement(self, name, x, y):
        """IoU of the edges of x with the edges of depth y, or with the lines of y."""
        found = edges(x * 2 - 1)
        if name == "depth":
            return edge_iou(found, edges(y.expand(-1, 3, -1, -1) * 2 - 1)).mean().item()
        wide = nn.functional.max_pool2d(found, 3, 1, 1)
        return edge_iou(wide, (y.mean(1, keepdim=True) > 0.5).float(), 0).mean().item()


@pytest.fixture(scope="module")
def draws():
    return Draws()


class TestLearnt:
    """One set of weights per condition, for all directions."""

    @pytest.mark.parametrize("name", ["depth", "edge"])
    def test_x_follows_y(self, draws, name):
        found = draws.layout(draws.controlled(name))
        assert found > 2 * draws.layout(draws.free(texts=""))
        assert found > 1.7 * draws.layout(draws.free())  # the prompt tells much of the layout already

    @pytest.mark.slow
    def test_x_follows_y_where_the_prompt_says_little(self):
        """Captions of shapes and colours only, edges without tolerance: scale 1 beside scale 0."""
        short = Draws(32, keep=())
        free = short.layout(short.free(), 0)
        assert short.layout(short.controlled("depth"), 0) > 4 * free
        assert short.layout(short.controlled("edge"), 0) > 2.9 * free  # in 20 steps 3.03

    def test_edges_of_x_are_estimated(self, draws):
        found = (draws.estimated("edge") > 0.5).float()
        assert edge_f1(found, draws.y["edge"]).mean() > 0.6

    def test_depth_of_x_is_estimated(self, draws):
        """Against the truth: beside an empty map, and beside the depth of another scene."""
        found, true = draws.estimated("depth"), draws.y["depth"]
        error = (found - true).abs().mean()
        assert error < 0.6 * true.abs().mean() and error < 0.5 * (found.roll(1, 0) - true).abs().mean()

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["depth", "edge"])
    def test_x_and_y_drawn_together_agree(self, draws, name):
        given = draws.agreement(name, draws.controlled(name), draws.y[name])
        assert draws.agreement(name, *draws.run([name], [None, None])) > 0.8 * given

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["depth", "edge"])
    def test_a_coarser_y_is_followed_less(self, draws, name):
        found = [draws.layout(draws.controlled(name, strength)) for strength in (0.0, 0.3, 0.6, 1.0)]
        assert all(less < more for more, less in zip(found, found[1:]))

    @pytest.mark.slow
    def test_two_adapters_are_better_than_either(self, draws):
        both = draws.run(["depth", "edge"], [None, draws.y["depth"], draws.y["edge"]])[0]
        assert draws.layout(both) > max(draws.layout(draws.controlled(name)) for name in draws.y)

    def test_what_is_drawn_stays(self, draws, judge):
        """Shapes and colours that the caption names are no worse with a condition."""

        def right(x):
            read = judge.accuracy(x * 2 - 1, draws.scenes.specs)
            return sum(read[name] for name in ("shape1", "colour1", "shape2", "colour2")) / 4

        for name in draws.y:
            assert right(draws.controlled(name)) > right(draws.free()) - 0.04  # one of 32 readings
