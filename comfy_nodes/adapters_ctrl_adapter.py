"""Ctrl-Adapter: a ControlNet made for one model in the conditioning of another."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_sampling import CONST
from comfy_api.latest import io

from ._adapters import ADAPTERS
from ._skips import skip_widths


CTRL_ADAPTER = io.Custom("DX_CTRL_ADAPTER")
CATEGORY = "diffusers-ext/adapters"


class ControlSampling:
    """Model sampling as a ControlNet of another model needs it: timesteps of 1000, or the same at every noise level.

    Args:
        sampling: Of the model that draws.
        fixed: The same timestep at every noise level; -1 for off.
    """

    def __init__(self, sampling: Any, fixed: int = -1):
        self.calculate_input, self._sampling, self._fixed = sampling.calculate_input, sampling, fixed

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        if self._fixed >= 0:
            return torch.full_like(sigma, self._fixed)
        flow = isinstance(self._sampling, CONST)
        return (1000 * sigma).round() if flow else self._sampling.timestep(sigma)


class AdaptedControl(ControlBase):
    """A ControlNet of another model with a Ctrl-Adapter behind it, in the place of a ControlNet.

    Args:
        control_net: CONTROL_NET with its picture and strength set.
        adapter: `CtrlAdapterModel`.
    """

    def __init__(self, control_net: Any, adapter: Any):
        super().__init__()
        self.control_net, self.adapter = control_net, adapter
        self._kept: list[tuple] = []

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.control_net.pre_run(model, percent_to_timestep_function)
        config, self._kept = self.adapter.config, []
        own = ControlSampling(model.model_sampling, config.fixed_controlnet_timestep)
        self.control_net.model_sampling_current = own
        self._sampling = ControlSampling(model.model_sampling, config.fixed_adapter_timestep)
        self._network = model.diffusion_model
        require_fit(self.adapter, self._network)

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        """Residuals for the backbone, on top of those of the controls before this one."""
        previous = None
        if self.previous_controlnet is not None:
            previous = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        first, last = self.timestep_range
        if t[0] > first or t[0] < last:
            return previous
        found = self._once(x_noisy, t, cond, batched_number, transformer_options)
        return self.control_merge(found, previous, None)

    def _once(self, x: torch.Tensor, t: torch.Tensor, cond: dict, *rest: Any) -> dict:
        """`_adapted`, or what it gave for the same prompts in an earlier step, where the step makes no difference."""
        config, said = self.adapter.config, [cond["c_crossattn"], cond.get("crossattn_controlnet", torch.zeros(()))]
        if not config.skip_conv_in or min(config.fixed_controlnet_timestep, config.fixed_adapter_timestep) < 0:
            return self._adapted(x, t, cond, *rest)
        for shape, before, found in self._kept:
            if shape == x.shape and all(torch.equal(a, b) for a, b in zip(said, before)):
                return found
        found = self._adapted(x, t, cond, *rest)
        self._kept.append((x.shape, said, found))
        return found

    def _adapted(self, x: torch.Tensor, t: torch.Tensor, cond: dict, batched_number: int, options: dict) -> dict:
        from diffusers_ext.adapters.ctrl_adapter_control import pooled

        small = pooled(x, self.adapter.latent_ratio)
        with ExitStack() as undo:
            if self.adapter.config.skip_conv_in:
                first = self.control_net.control_model.input_blocks[0]
                undo.callback(first.register_forward_hook(lambda module, args, output: output * 0).remove)
            control = self.control_net.get_control(small, t, cond, batched_number, options)
        context = cond["c_crossattn"].to(x.device)
        adapter = self.adapter.to(x.device, context.dtype)
        outputs = [r.to(context.dtype) for r in control["output"]]
        mid = control["middle"][0].to(context.dtype)
        time = self._sampling.timestep(t)
        down, mid = adapter(outputs, mid, timestep=time, encoder_hidden_states=context)
        return self._placed([*down, mid])

    def _placed(self, residuals: list[torch.Tensor]) -> dict[str, list]:
        active = [r if k in self.adapter.active else None for k, r in enumerate(residuals)]
        if hasattr(self._network, "input_blocks"):
            skips = len(self._network.input_blocks)  # entries are taken from the end, so there must be as many
            return {"input": [], "middle": active[-1:], "output": active[:-1][:skips]}
        from diffusers_ext.adapters._ctrl_adapter_backbones import spread

        tokens = [r.flatten(2).transpose(1, 2) for r in active if r is not None]
        return {"input": spread(tokens, len(self._network.double_blocks)), "middle": [], "output": []}

    def cleanup(self) -> None:
        super().cleanup()
        self._kept = []
        self.control_net.cleanup()

    def get_models(self) -> list:
        return [*super().get_models(), *self.control_net.get_models()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        own = self.control_net.inference_memory_requirements(dtype)
        return own + super().inference_memory_requirements(dtype)

    def copy(self) -> AdaptedControl:
        copied = AdaptedControl(self.control_net.copy(), self.adapter)
        self.copy_to(copied)
        return copied


def require_fit(adapter: Any, network: torch.nn.Module) -> None:
    """Raise `ValueError` if the residuals of an adapter do not have the widths of this model."""
    flux, mine = hasattr(network, "double_blocks"), adapter.widths
    theirs = [network.hidden_size] * len(mine) if flux else skip_widths(network, "Ctrl-Adapter")
    for k in adapter.active:
        here = theirs[-1] if k == len(mine) - 1 else (*theirs, *mine)[k]
        if mine[k] != here:
            raise ValueError(
                f"this Ctrl-Adapter gives {mine[k]} channels at residual {k}, {type(network).__name__} has {here}: "
                "use a file that was made for this model"
            )


class DXCtrlAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXCtrlAdapterLoader",
            display_name="Ctrl-Adapter Loader",
            category=CATEGORY,
            description="Loads a Ctrl-Adapter, which lets ControlNets of one model drive another one.",
            search_aliases=["ctrl adapter", "controlnet", "sdxl", "diffusers-ext"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=ADAPTERS.options(),
                    tooltip="A file in models/diffusers_ext_adapters (the authors' as well), or a shipped one.",
                )
            ],
            outputs=[CTRL_ADAPTER.Output(tooltip="For Ctrl-Adapter Apply.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        from diffusers_ext import CtrlAdapterModel

        return io.NodeOutput(CtrlAdapterModel.from_pretrained(ADAPTERS.find(file)))


class DXCtrlAdapterApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DXCtrlAdapterApply",
            display_name="Ctrl-Adapter Apply",
            category=CATEGORY,
            description="Controls a model with a ControlNet that was made for another one, such as an SD 1.5 "
            "ControlNet for SDXL.",
            search_aliases=["ctrl adapter", "controlnet", "sdxl", "depth", "canny", "diffusers-ext"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="Prompt of the model that draws."),
                io.Conditioning.Input("negative", tooltip="Its negative prompt."),
                CTRL_ADAPTER.Input("ctrl_adapter", tooltip="From Ctrl-Adapter Loader; made for the model that draws."),
                io.ControlNet.Input("control_net", tooltip="Made for another model: SD 1.5 for the authors' files."),
                io.Clip.Input("clip", tooltip="Text encoder of the model that the ControlNet was made for."),
                io.String.Input(
                    "prompt", multiline=True, default="", tooltip="The same prompt again, for the ControlNet."
                ),
                io.Image.Input("image", tooltip="What to draw by, e.g. edges or depth, as the ControlNet takes it."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies what the ControlNet says; 0 turns control off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="No control before this part of the run.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="No control after this part of the run: lower follows less and looks better.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Prompt with control."),
                io.Conditioning.Output(display_name="negative", tooltip="Negative prompt with control."),
            ],
        )

    @classmethod
    def execute(
        cls, positive, negative, ctrl_adapter, control_net, clip, prompt, image, strength, start_percent, end_percent
    ) -> io.NodeOutput:
        if strength == 0:
            return io.NodeOutput(positive, negative)
        inner = control_net.copy().set_cond_hint(image.movedim(-1, 1), strength, (0.0, 1.0))
        control = AdaptedControl(inner, ctrl_adapter)
        control.timestep_percent_range = (start_percent, end_percent)
        texts = [clip.encode_from_tokens(clip.tokenize(text)) for text in (prompt, "")]
        return io.NodeOutput(*controlled((positive, negative), control, texts))


def controlled(conditionings: tuple[list, list], control: AdaptedControl, texts: list[torch.Tensor]) -> list[list]:
    """Conditionings with a control behind those they have, and the prompts in the words of the ControlNet."""
    behind: dict[Any, AdaptedControl] = {}  # one object for both where possible: ComfyUI then runs them in one batch
    found = []
    for conditioning, text in zip(conditionings, texts):
        found.append([])
        for cond, options in conditioning:
            before = options.get("control")
            if before not in behind:
                behind[before] = control.copy()
                behind[before].set_previous_controlnet(before)
            added = {"control": behind[before], "control_apply_to_uncond": False, "cross_attn_controlnet": text}
            found[-1].append([cond, {**options, **added}])
    return found


NODES = [DXCtrlAdapterLoader, DXCtrlAdapterApply]
