"""AutoDiffusion: search the noise levels of few steps and the blocks to leave out there, load them, apply them."""

from __future__ import annotations

import contextlib
import functools
import re

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ._files import SavedFiles, check_name
from ._inputs import name_input, seed_input
from ._runs import standing_in


SCHEDULE = io.Custom("DX_SEARCHED_SCHEDULE")
CATEGORY = "diffusers-ext/schedulers"
KEY = "diffusers_ext.autodiffusion"
FILES = SavedFiles("schedules", ".json", "searched schedule")
STATES = SavedFiles("schedules", ".search", "state of a search")
_BLOCK = re.compile(r"(.+\.(?:resnets|attentions)\.\d+)\.")


def skippable(model) -> dict[str, tuple[torch.nn.Module, int]]:
    """Blocks of a MODEL that the identity can stand in for, under diffusers' names, and how many of their inputs they
    hand through.

    Raises:
        ValueError: Neither a UNet nor a Flux model.
    """
    net = model.model.diffusion_model
    if isinstance(net, Flux):
        double = {f"transformer_blocks.{i}": (block, 2) for i, block in enumerate(net.double_blocks)}
        return double | {f"single_transformer_blocks.{i}": (b, 1) for i, b in enumerate(net.single_blocks)}
    if not isinstance(net, UNetModel):
        raise ValueError(f"cannot leave out blocks of {type(net).__name__}: only UNets and Flux models are supported")
    found = {}
    for theirs, ours in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items():
        match = _BLOCK.match(theirs)
        if match and match.group(1) not in found:
            depth = 2 if ours.startswith("middle_block") else 3
            block = net.get_submodule(".".join(ours.split(".")[:depth]))
            if isinstance(block, SpatialTransformer) or (
                isinstance(block, ResBlock) and block.channels == block.out_channels and not block.updown
            ):
                found[match.group(1)] = (block, 1)
    return found


class BlockSkip:
    """Wrapper of a MODEL: hands the input of blocks through at chosen noise levels. Remembers nothing between calls.

    Args:
        blocks: Of `skippable`.
    """

    def __init__(self, blocks: dict[str, tuple[torch.nn.Module, int]]):
        self.blocks, self.sigmas, self.rows = blocks, (), ()

    def use(self, result) -> None:
        """Leave out what this search result says.

        Raises:
            ValueError: It names a block that this model does not have, or that changes shapes.
        """
        missing = sorted({name for row in result.skip_blocks for name in row} - set(self.blocks))
        if missing:
            raise ValueError(f"this model has no block {missing[0]!r} that can be left out: {', '.join(self.blocks)}")
        self.sigmas, self.rows = result.sigmas[: len(result.skip_blocks)], result.skip_blocks

    def forward(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL: the model without the blocks of this noise level."""
        from diffusers_ext.schedulers._autodiffusion_blocks import nearest

        options = next(v for v in (*args, *kwargs.values()) if isinstance(v, dict) and "sigmas" in v)
        row = nearest(float(options["sigmas"].max()), self.sigmas, 5e-4)
        skipped = [self.blocks[name] for name in (self.rows[row] if row is not None else ())]
        with standing_in((block, functools.partial(_first_inputs, count)) for block, count in skipped):
            return executor(*args, **kwargs)


def _first_inputs(count: int, *args, **kwargs):
    """In place of a block: its input."""
    values = (*args, *kwargs.values())
    return values[0] if count == 1 else values[:count]


def _patched(model, result=None):
    """A clone of a MODEL and the wrapper that leaves out its blocks."""
    patched, skip = model.clone(), BlockSkip(skippable(model))
    if result is not None:
        skip.use(result)
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, skip.forward)
    return patched, skip


def _result(file: str, searched):
    from diffusers_ext.schedulers.autodiffusion import ScheduleSearchResult

    return searched or ScheduleSearchResult.load(FILES.find(file))


def _search(guider, skip, latent, sampler, steps: int, budget: int, share: float, seed: int, name: str):
    """Search on a guider's model; an interrupted search goes on the next time."""
    from diffusers_ext.schedulers._autodiffusion_native import NativeSampler, native_search

    found, noise = [], comfy.sample.prepare_noise(latent["samples"], seed)
    epochs = 10 if share else 5  # blocks are left out from the sixth one on at the latest
    options = {"population": max(2, budget // epochs), "max_epochs": epochs, "seed": seed, "max_prun": share}
    options |= {"blocks": tuple(skip.blocks) if share else ()}

    def search(model, x, sigmas, extra_args=None, callback=None, disable=None):
        solve = functools.partial(sampler.sampler_function, **sampler.extra_options)
        native = NativeSampler(model, noise.to(x), extra_args, solve, skip.use)
        found.append(_run(native_search(native, steps, **options), STATES.new(name)))
        return x

    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(search), torch.ones(2), seed=seed)
    return found[0]


def _run(search, state):
    """Run a search with ComfyUI's progress bar and interruption; its state is kept in a file until it is done."""
    if state.is_file():
        with contextlib.suppress(ValueError):  # the state of a search with other inputs
            search.load(state)
    bar = comfy.utils.ProgressBar(search.max_evaluations)

    def on_evaluation(n: int) -> None:
        bar.update_absolute(n + 1)
        comfy.model_management.throw_exception_if_processing_interrupted()

    try:
        search.run(progress=False, on_evaluation=on_evaluation)
    except BaseException:
        search.save(state)
        raise
    state.unlink(missing_ok=True)
    return search


class DXSearchSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXSearchSigmas",
            display_name="Search Sigmas (AutoDiffusion)",
            category=CATEGORY,
            description="Searches the few noise levels with which a sampler comes nearest to many steps on this model "
            "and saves them as output/schedules/<name>.json. An interrupted search goes on when it is run again.",
            search_aliases=["autodiffusion", "timestep search", "optimal steps", "few steps", "calibrate"],
            inputs=[
                io.Model.Input("model", tooltip="The model to search for."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Latent.Input("latent", tooltip="Empty latents of the size you sample; 4 or more of them."),
                io.Sampler.Input("sampler", tooltip="The sampler that will use the noise levels."),
                io.Float.Input(
                    "cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The cfg you will sample with."
                ),
                io.Int.Input("steps", default=5, min=1, max=100, tooltip="Steps to find noise levels for."),
                io.Int.Input(
                    "budget", default=100, min=10, max=10000, tooltip="Candidates to try, each a run of the batch."
                ),
                io.Float.Input(
                    "leave_out",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="Largest share of the blocks left out at a step; 0 keeps all. UNet and Flux models only.",
                ),
                seed_input("Seed of noise and search."),
                name_input(),
            ],
            outputs=[
                io.Sigmas.Output(tooltip="The noise levels, for SamplerCustom."),
                SCHEDULE.Output(display_name="schedule", tooltip="For Apply Block Skip Schedule."),
                io.String.Output(display_name="report", tooltip="What has been found, for Preview Any."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name):
        """Only a plain file name: nothing is written outside the output folder."""
        return check_name(name)

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sampler, cfg, steps, budget, leave_out, seed, name
    ) -> io.NodeOutput:
        patched, skip = _patched(model) if leave_out else (model, BlockSkip({}))
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        search = _search(guider, skip, latent, sampler, steps, budget, leave_out, seed, name)
        search.result.save(FILES.new(name))
        return io.NodeOutput(torch.tensor(search.result.sigmas), search.result, search.report())


def _choice() -> list:
    return [
        io.Combo.Input(
            "file",
            options=FILES.options(),
            tooltip="A schedule of models/schedules or output/schedules; not used if schedule is connected.",
        ),
        SCHEDULE.Input("schedule", optional=True, tooltip="Result of Search Sigmas, instead of a file."),
    ]


class DXLoadSearchedSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXLoadSearchedSigmas",
            display_name="Load Searched Sigmas (AutoDiffusion)",
            category=CATEGORY,
            description="Noise levels of a searched schedule.",
            search_aliases=["autodiffusion", "sigmas", "scheduler", "few steps"],
            inputs=_choice(),
            outputs=[io.Sigmas.Output(tooltip="For SamplerCustom, with the sampler of the search.")],
        )

    @classmethod
    def execute(cls, file, schedule=None) -> io.NodeOutput:
        return io.NodeOutput(torch.tensor(_result(file, schedule).sigmas))


class DXApplyBlockSkipSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXApplyBlockSkipSchedule",
            display_name="Apply Block Skip Schedule (AutoDiffusion)",
            category=CATEGORY,
            description="Leaves blocks of the model out at the noise levels of a searched schedule, which saves time. "
            "At any other noise level the model is unchanged. UNet and Flux models.",
            search_aliases=["autodiffusion", "skip layers", "speed up", "faster"],
            inputs=[io.Model.Input("model", tooltip="The model of the search."), *_choice()],
            outputs=[io.Model.Output(tooltip="The model; sample it with the sigmas of the same schedule.")],
        )

    @classmethod
    def execute(cls, model, file, schedule=None) -> io.NodeOutput:
        return io.NodeOutput(_patched(model, _result(file, schedule))[0])


NODES = [DXSearchSigmas, DXLoadSearchedSigmas, DXApplyBlockSkipSchedule]
