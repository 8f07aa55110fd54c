"""RAS: push only a part of the image tokens through a transformer; the others keep the noise predicted before.

Liu et al., "Region-Adaptive Sampling for Diffusion Transformers", 2025, https://arxiv.org/abs/2502.10389
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from diffusers.hooks import ModelHook
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from torch.overrides import TorchFunctionMode

from .._fields import require_types
from ..apply import Attachment, MethodConfig, denoiser_of
from ..registry import Claim, MethodRecord, register
from ._common import (
    PREFIX,
    Position,
    RunHook,
    RunTracker,
    install,
    macs_on_meta,
    macs_or_warning,
    outlines,
    refuse_other_caches,
    steps_of,
)
from ._forecast import require_order
from .ras_tokens import Cache, Call, Plan, Regions, rotate


__all__ = ["RASConfig"]

_HOOK = PREFIX + "ras"
# The paper's reset steps, 12 and 22 of 30, as shares of a run.
_RESETS = (0.4, 11 / 15)
_METRICS = ("std", "l2norm")
_MODES = ("balanced", "official")
_CONTROL = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples")


@dataclass(frozen=True)
class Layout:
    """Where tokens come into being and become outputs in a transformer, and which attention layers see all of them.

    `text` makes the text tokens that the image tokens share their attention with, if there are any.
    """

    embedder: str
    output: str
    attention: tuple[str, ...]
    image_first: bool = True
    text: str | None = None


LAYOUTS = {
    DiTTransformer2DModel: Layout("pos_embed", "proj_out_2", ("attn1",)),
    PixArtTransformer2DModel: Layout("pos_embed", "proj_out", ("attn1",)),
    SD3Transformer2DModel: Layout("pos_embed", "proj_out", ("attn", "attn2"), text="context_embedder"),
    FluxTransformer2DModel: Layout("x_embedder", "proj_out", ("attn",), image_first=False, text="context_embedder"),
}


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of a supported transformer. Others raise `ValueError`."""
    for kind, layout in LAYOUTS.items():
        if isinstance(model, kind):
            return layout
    known = ", ".join(kind.__name__ for kind in LAYOUTS)
    raise ValueError(f"RAS does not know how {type(model).__name__} handles image tokens; it works on {known}")


def attention_layers(model: torch.nn.Module, layout: Layout) -> list[torch.nn.Module]:
    """The self- and joint attention layers, in running order."""
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
    blocks = [getattr(block, "_orig_mod", block) for block in blocks]
    return [getattr(b, n) for b in blocks for n in layout.attention if getattr(b, n, None) is not None]


class _WholeKeys(TorchFunctionMode):
    """Completes the keys and values of the first attention computed inside, from the cache of `call`."""

    def __init__(self, call: Call, layer: int, image_first: bool, rotary: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self.call, self.layer, self.image_first, self.rotary = call, layer, image_first, rotary
        self.done = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # As a function it breaks compiled graphs of torch 2.13, and the mode would meet each part of one again.
        if func is torch.Tensor.unflatten:
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not F.scaled_dot_product_attention or self.done:
            return func(*args, **kwargs)
        self.done = True
        return self.attention(*args, **kwargs)

    def attention(self, query, key, value, attn_mask=None, *args, **kwargs) -> torch.Tensor:
        # Keys beyond the queries' are those of an adapter (EasyControl): rotated, and the same in every step.
        own, more = query.shape[-2], (key[..., query.shape[-2] :, :], value[..., query.shape[-2] :, :])
        key, value = key[..., :own, :], value[..., :own, :]
        if self.rotary is not None:
            query, key = rotate(query, *self.rotary), rotate(key, *self.rotary)
        key, value = self.call.keys_values(self.layer, key, value, self.image_first)
        if more[0].shape[-2]:
            key, value = (torch.cat(pair, -2) for pair in zip((key, value), more))
        if attn_mask is not None and attn_mask.shape[-1] != key.shape[-2]:
            raise ValueError("RAS does not know how to extend an attention mask over the tokens it leaves out")
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)


@dataclass
class _Shared:
    """Read by the inner hooks, written by the root hook. None outside of a call."""

    call: Call | None = None


class _Hook(ModelHook):
    """A hook that steps aside outside of a call."""

    def __init__(self, shared: _Shared):
        super().__init__()
        self.shared = shared


class _ControlHook(_Hook):
    """On the transformer, inside of the root hook: control residuals of the computed tokens only."""

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call = self.shared.call
        if call is not None and call.index is not None:
            for name in _CONTROL:
                if kwargs.get(name) is not None:
                    kwargs[name] = [call.gather(residual) for residual in kwargs[name]]
        return self.fn_ref.original_forward(*args, **kwargs)


class _EmbedderHook(_Hook):
    """On the module whose output are the tokens with their positions."""

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        tokens, call = self.fn_ref.original_forward(*args, **kwargs), self.shared.call
        return tokens if call is None else call.gather(tokens)


class _TextHook(_Hook):
    """On the module whose output are the text tokens."""

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        text, call = self.fn_ref.original_forward(*args, **kwargs), self.shared.call
        return text if call is None else call.gather_text(text)


class _OutputHook(_Hook):
    """On the module whose output is the noise of each token."""

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        tokens, call = self.fn_ref.original_forward(*args, **kwargs), self.shared.call
        return tokens if call is None else call.complete(tokens)


class _AttentionHook(_Hook):
    """On an attention layer: its queries see all tokens."""

    def __init__(self, shared: _Shared, index: int, image_first: bool):
        super().__init__(shared)
        self.index, self.image_first = index, image_first

    def new_forward(self, module: torch.nn.Module, *args, **kwargs):
        call = self.shared.call
        if call is None or (call.index is None and not call.keep):
            return self.fn_ref.original_forward(*args, **kwargs)
        _refuse_second_attention(module)
        rotary = kwargs.get("image_rotary_emb")
        if rotary is not None:
            # Inside of the mode every function of torch takes longer.
            rotary, kwargs = _rows(call, rotary), {**kwargs, "image_rotary_emb": None}
        whole = _WholeKeys(call, self.index, self.image_first, rotary)
        with whole:
            output = self.fn_ref.original_forward(*args, **kwargs)
        # Reading this inside a compiled graph makes torch 2.13 drop the mode from it.
        if not torch.compiler.is_compiling() and not whole.done:
            raise RuntimeError(
                f"the attention of {type(module).__name__} does not run through torch's scaled_dot_product_attention: "
                "RAS works with the native attention backend, call set_attention_backend('native')"
            )
        return output


def _refuse_second_attention(layer: torch.nn.Module) -> None:
    if isinstance(layer.processor, SD3IPAdapterJointAttnProcessor2_0):
        raise ValueError(
            "the IP-Adapter of Stable Diffusion 3 attends to the image tokens a second time, where RAS cannot give it "
            "those that were left out: unload the IP-Adapter, or use DeltaDiTConfig or BACConfig with it"
        )


def _rows(call: Call, tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables `[S, D]` of text and image -> those of the computed tokens, `[M, s, D]`, or `[1, S, D]` of all."""
    if call.index is None:
        return tables[0][None], tables[1][None]
    if call.rotary is None:
        places, _ = call.places(tables[0].shape[0] - call.tokens, image_first=False)
        call.rotary = tables[0][places], tables[1][places]
    return call.rotary


class _RootHook(RunHook[Cache]):
    """On the transformer: starts runs, decides which tokens a call computes, learns from the scheduler's steps."""

    def __init__(self, config: RASConfig, target: Any, model: torch.nn.Module):
        super().__init__(RunTracker(Cache))
        self.config, self.target, self.scheduler = config, target, target.scheduler
        self.patch = _patch_of(model)
        self.shared, self.regions = _Shared(), None
        self.running = False
        self.batch = self.computed = 0
        self.reused: dict[int, int] = {}
        self.arguments: tuple[tuple, dict] | None = None

    @torch.compiler.disable
    def _begin(self, args: tuple, kwargs: dict) -> None:
        self.batch = _batch(args, kwargs)
        super()._begin(args, kwargs)

    def begin_run(self, args: tuple, kwargs: dict) -> None:
        if self.target.scheduler is not self.scheduler:
            raise RuntimeError("the pipeline has another scheduler now: remove RAS and apply it again")
        config = self.config
        self.regions = config.regions(config.num_inference_steps or steps_of(self.target), self.patch)
        self.running, self.computed, self.reused = True, 0, {}
        self.arguments = outlines((args, kwargs))

    def begin_call(self, position: Position[Cache]) -> None:
        step, cache = self.tracker.run_step, position.state
        index = self.regions.active(step, self.batch) if cache.output is not None else None
        self.shared.call = self.regions.plan.call(cache, index, self.regions.tokens, step)

    def end_call(self) -> None:
        if self.shared.call.index is None:
            self.computed += 1
        else:
            count = self.regions.chosen.shape[1]
            self.reused[count] = self.reused.get(count, 0) + 1

    def release(self) -> None:
        self.shared.call = None

    def observe(self, noise: torch.Tensor) -> None:
        """Learn the noise that a step of the scheduler was given."""
        if self.running:
            self.regions.observe(noise.detach(), self.tracker.run_step)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.running = False
        return super().reset_state(module)

    def macs(self, model: torch.nn.Module) -> dict[int | None, int]:
        """MACs of a call by the number of tokens it computes, None for all, counted on the meta device."""
        cache, counts = Cache(), {}
        with self.aside():
            for count in (None, *self.reused):
                index = torch.empty(_batch(*self.arguments), count or 0, dtype=torch.long, device="meta")
                self.shared.call = Call(
                    cache, index if count else None, True, self.regions.tokens, reuse_text=self.config.reuse_text
                )
                counts[count] = macs_on_meta(model, self.arguments)
        return counts


def _batch(args: tuple, kwargs: dict) -> int:
    return len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _patch_of(model: torch.nn.Module) -> int:
    # Flux pipelines pack 2 x 2 pixels into a token themselves.
    return 2 if isinstance(model, FluxTransformer2DModel) else model.config.patch_size


def _watch(root: _RootHook):
    """Let the root hook see what the scheduler's steps are given; returns the undo."""
    scheduler = root.scheduler
    original = scheduler.step

    @functools.wraps(original)
    def step(model_output, *args, **kwargs):
        root.observe(model_output)
        return original(model_output, *args, **kwargs)

    scheduler.step = step

    def undo() -> None:
        if scheduler.__dict__.get("step") is step:
            del scheduler.step
        root.running = False

    return undo


@register(
    MethodRecord(
        slug="ras",
        family="caching",
        kind="cache",
        title="Region-Adaptive Sampling for Diffusion Transformers",
        arxiv="2502.10389",
        summary="Most steps compute only the image tokens that need it; the others keep the noise predicted before",
        targets=("dit", "mmdit"),
        predictions=("epsilon", "v_prediction", "sample", "flow_prediction"),
        nodes=("DXRegionAdaptiveSampling",),
        claim=Claim(
            text="Up to 2.36 times faster on Stable Diffusion 3, 1.6 times at comparable quality",
            setting="SD3, 28 steps, GPU",
            value=2.36,
            unit="times faster",
        ),
        conflicts=("any-size-diffusion", "attention-entropy-scaling", "bac", "delta-dit", "vmoba"),
    )
)
@dataclass(frozen=True)
class RASConfig(MethodConfig):
    """Lets a transformer pipeline compute only a part of the image on most steps.

    After the first steps, the noise predicted for each image token tells how much it needs the next step. Tokens that
    need it go through the transformer and see the whole image through cached keys and values; the others keep the
    noise of the last step that computed them. Works with DiT, PixArt, Stable Diffusion 3 and Flux, and with every
    scheduler that evaluates the model once per step. Paper: https://arxiv.org/abs/2502.10389

    Args:
        sample_ratio: Share of the tokens that a cheap step computes, above 0; 1 changes nothing. The default, 0.25,
            makes a run of 28 steps at 1024 pixels twice as fast; the published code has 0.5, 1.5 times as fast.
        start_step: First step that may leave out tokens, from 1. Default 4.
        end_step: Last step that may. None takes the last of the run.
        error_reset_steps: Steps in between that compute everything. None takes 40 and 73 percent of the run.
        metric: `"std"` or `"l2norm"` over the channels of the predicted noise.
        high_ratio: Share of the left-out tokens taken from those with the busiest noise, 0 to 1, the rest from the
            calmest. Default 1: the paper finds main subjects calm.
        starvation_scale: How strongly a token that was left out is preferred next time. The default, 3, lets tokens
            take turns; the published code has 0.1.
        starvation_mode: `"balanced"`, or `"official"` to weight as the published code does.
        skip_num_step: The dynamic rule: tokens left out more, every `skip_num_step_length` steps.
        skip_num_step_length: See `skip_num_step`; 0 keeps the number constant.
        patch_size: Width of a token in latent pixels, 1 or more. None reads it from the model.
        num_inference_steps: Steps of the run; None reads them from the scheduler.
        forecast_order: What stands in for a token that is left out: 0 (default), its last values, as in the paper; 1,
            the line through its last two. For samplers that add no noise, 1 with a later `start_step` and every
            second or third step among `error_reset_steps` stays much closer for as many operations. A fraction is the
            share of the trend that is continued.
        reuse_text: Whether steps that leave out image tokens leave out the text tokens (but one) too, whose keys and
            values then stand in as those of image tokens do. The default, False, computes them at every step, as in
            the paper. Changes nothing where text is only attended to (PixArt) or there is none (DiT).

    Raises:
        ValueError: Values out of range; on `apply`, an unsupported model or scheduler, or no pipeline; Stable
            Diffusion 3 with an IP-Adapter.

    Example:
        >>> import diffusers_ext
        >>> from diffusers_ext import RASConfig, zoo
        >>> pipe = zoo.load("shapes-dit")
        >>> with diffusers_ext.apply(pipe, RASConfig(sample_ratio=0.5)) as handle:
        ...     images = zoo.generate(pipe, ["a red circle"], num_inference_steps=12)
        ...     handle.summary()["ras"]["tokens"]
        [32, 32, 32, 32, 32, 32]

    Limits:
        Attention must run through torch's scaled_dot_product_attention, without a mask. Reference image tokens (Flux
        Kontext) are always computed. Keys and values of all layers are kept: 2 x layers x tokens x width numbers per
        kind of call, twice as many with a forecast.
    """

    sample_ratio: float = 0.25
    start_step: int = 4
    end_step: int | None = None
    error_reset_steps: Sequence[int] | None = None
    metric: str = "std"
    high_ratio: float = 1.0
    starvation_scale: float = 3.0
    starvation_mode: str = "balanced"
    skip_num_step: int = 0
    skip_num_step_length: int = 0
    patch_size: int | None = None
    num_inference_steps: int | None = None
    forecast_order: float = 0
    reuse_text: bool = False

    def __post_init__(self) -> None:
        require_types(self)
        require_order(self.forecast_order, largest=1)
        if self.error_reset_steps is not None:
            object.__setattr__(self, "error_reset_steps", tuple(sorted(set(self.error_reset_steps))))
        rules = (
            ("sample_ratio", 0 < self.sample_ratio <= 1, "above 0, up to 1"),
            ("start_step", self.start_step >= 1, "whole numbers from 1: the first step must compute everything"),
            ("end_step", self.end_step is None or self.end_step >= self.start_step, "a step from start_step, or None"),
            ("error_reset_steps", min(self.error_reset_steps or (0,)) >= 0, "steps from 0, or None"),
            ("metric", self.metric in _METRICS, _METRICS),
            ("high_ratio", 0 <= self.high_ratio <= 1, "0 to 1"),
            ("starvation_scale", self.starvation_scale >= 0, "0 or more"),
            ("starvation_mode", self.starvation_mode in _MODES, _MODES),
            ("skip_num_step_length", self.skip_num_step_length >= 0, "whole numbers from 0"),
            ("patch_size", self.patch_size is None or self.patch_size >= 1, "whole numbers from 1, or None"),
        )
        for name, right, accepted in rules:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")
        if self.num_inference_steps is not None:
            self.plan(self.num_inference_steps)

    def plan(self, steps: int) -> Plan:
        """Which steps of a run of `steps` steps leave out how many tokens."""
        resets = self.error_reset_steps
        if resets is None:
            resets = tuple(round(share * steps) for share in _RESETS)
        elif any(step >= steps for step in resets):
            raise ValueError(f"error_reset_steps is {list(resets)}; a run of {steps} steps accepts 0 to {steps - 1}")
        end = steps - 1 if self.end_step is None else min(self.end_step, steps - 1)
        dynamic = (self.skip_num_step, self.skip_num_step_length)
        return Plan(
            steps, self.start_step, end, resets, self.sample_ratio, *dynamic, self.forecast_order, self.reuse_text
        )

    def regions(self, steps: int, patch: int) -> Regions:
        """The choice of tokens in a run of `steps` steps on tokens of `patch` x `patch` latent pixels."""
        scale, mode = self.starvation_scale, self.starvation_mode
        return Regions(self.plan(steps), self.patch_size or patch, self.metric, self.high_ratio, scale, mode)

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        model = denoiser_of(target)
        for layer in attention_layers(model, layout_of(model)):
            _refuse_second_attention(layer)
        scheduler = getattr(target, "scheduler", None)
        if scheduler is None:
            raise ValueError("RAS learns from the steps of the scheduler: apply it to the pipeline, not to its model")
        if scheduler.order != 1:
            raise ValueError(
                f"{type(scheduler).__name__} evaluates the model {scheduler.order} times per step; RAS works with "
                "schedulers that evaluate it once, such as FlowMatchEulerDiscreteScheduler or DPM-Solver++ multistep"
            )
        refuse_other_caches(model)
        steps = num_inference_steps or self.num_inference_steps
        if steps is None:
            return ()
        plan = self.plan(steps)
        if not any(plan.skipped(step, 1 << 30) for step in range(steps)):
            return (f"ras: none of {steps} steps leaves out tokens; use more steps, or a smaller start_step or ratio",)
        return ()

    def attach(self, target: Any) -> Attachment:
        model = denoiser_of(target)
        root = _RootHook(self, target, model)
        with ExitStack() as undo:
            undo.callback(install(model, [(model, _ControlHook(root.shared))], _HOOK + ".control"))
            undo.callback(install(model, _hooks(model, root), _HOOK))
            undo.callback(_watch(root))
            return Attachment(undo.pop_all().close, lambda: _summary(root, model))


def _hooks(model: torch.nn.Module, root: _RootHook) -> Iterator[tuple[torch.nn.Module, ModelHook]]:
    layout, shared = layout_of(model), root.shared
    yield model, root
    yield getattr(model, layout.embedder), _EmbedderHook(shared)
    if layout.text:
        yield getattr(model, layout.text), _TextHook(shared)
    yield getattr(model, layout.output), _OutputHook(shared)
    for index, layer in enumerate(attention_layers(model, layout)):
        yield layer, _AttentionHook(shared, index, layout.image_first)


def _summary(root: _RootHook, model: torch.nn.Module) -> dict[str, Any]:
    """Figures of the last run. MACs are left out for models that cannot run on the meta device (offloaded ones)."""
    reused = sum(root.reused.values())
    figures: dict[str, Any] = {"computed": root.computed, "reused": reused}
    if not root.computed:
        return figures
    figures["tokens"] = list(root.regions.history)
    if root.regions.skips is not None:
        figures["times_left_out"] = [int(root.regions.skips.min()), int(root.regions.skips.max())]
    macs = macs_or_warning(root.macs, model)
    if not macs:
        return figures
    figures["macs_full_call"] = macs[None]
    figures["macs_reused_call"] = {count: macs[count] for count in root.reused}
    saved = sum(calls * (macs[None] - macs[count]) for count, calls in root.reused.items())
    figures["macs_saved"] = saved / (macs[None] * (root.computed + reused))
    return figures
