"""Adapters side by side: the parameters, operations and memory they add, beside ControlNet, T2I-Adapter and LoRA.

Counted on the meta device on the sizes of the real models: none of it depends on trained weights. Activations are
those that one training step of one picture keeps for its backward pass, the base model frozen, attention fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import T2IAdapter
from peft import LoraConfig

from benchmarks import adapter_easycontrol as easycontrol
from benchmarks.adapter import (
    TOKENS,
    WIDTH,
    Cost,
    controlnet,
    inputs,
    parameters_of,
    peers,
    sd15,
    size_of,
    t2i_adapter,
    unet_macs,
)
from benchmarks.adapter_ctrl_adapter import SDXL
from benchmarks.adapter_scedit import sd15_costs
from benchmarks.adapter_vmix import sd15_cost
from diffusers_ext import CSCTuner, EasyControlAdapter, SCTuner, VMixAdapter
from diffusers_ext.adapters._easycontrol_stream import Bank, flux_attentions, flux_stream, put_on
from diffusers_ext.eval import count_macs


COLUMNS = ["Base", "Adapter", "Parameters", "MACs per step", "MACs once, in steps", "Kept while sampling", "Training"]
RANK = 16
Rows = Iterator[tuple[Cost, int]]


class _Fused(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass: inputs and output, never the weights."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


def activations(step: Callable[[], Any], *modules: torch.nn.Module) -> int:
    """Bytes in float16 that `step` keeps for a backward pass; weights and buffers of `modules` do not count."""
    weights = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.is_floating_point():
            kept[storage._cdata] = storage  # a reference, or its number could be given to another
        return tensor

    def attention(query, key, value, *args: Any, **options: Any) -> torch.Tensor:
        return _Fused.apply(query, key, value)

    with (
        torch.enable_grad(),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        result = step()
    del result
    return sum(storage.nbytes() for storage in kept.values()) // 2


def _frozen(model: torch.nn.Module) -> torch.nn.Module:
    return model.requires_grad_(False)


def _with_adapter(unet: torch.nn.Module, adapter: Any, prepare: Callable[[], Any]) -> int:
    """Activations of a Stable Diffusion step with an adapter that `prepare` gives its condition."""

    def step() -> torch.Tensor:
        prepare()
        return unet(*inputs(), return_dict=False)[0]

    with adapter.attach(unet):
        return activations(step, unet, adapter)


def stable_diffusion() -> Rows:
    """Costs and training activations on Stable Diffusion 1.5."""
    unet, picture = _frozen(sd15()), torch.zeros(1, 3, 512, 512, device="meta")
    with torch.device("meta"):
        labels = [[f"{k}+", f"{k}-"] for k in range(4)]
        vmix = VMixAdapter.for_model(unet, labels, num_text_tokens=TOKENS, aes_emb=torch.zeros(9, WIDTH))
        style, condition = SCTuner.for_model(unet), CSCTuner.for_model(unet)
        control, t2i = controlnet(), t2i_adapter()
    labelled = torch.zeros(1, 4, WIDTH, device="meta")

    def controlled() -> torch.Tensor:
        down, mid = control(*inputs(), picture, return_dict=False)
        return unet(*inputs(), down_block_additional_residuals=down, mid_block_additional_residual=mid)

    def with_features() -> torch.Tensor:
        return unet(*inputs(), down_intrablock_additional_residuals=t2i(picture))

    kept = {
        "VMix": _with_adapter(unet, vmix, lambda: vmix.set_condition(labelled)),
        "SC-Tuner": _with_adapter(unet, style, lambda: None),
        "CSC-Tuner": _with_adapter(unet, condition, lambda: condition.set_condition(picture)),
        "ControlNet": activations(controlled, unet, control),
        "T2I-Adapter": activations(with_features, unet, t2i),
    }
    for cost in (sd15_cost(), *sd15_costs(), *peers()):
        yield cost, kept[cost.name]
    lora = _lora(unet)
    yield lora, activations(lambda: unet(*inputs()), unet)


def _lora(unet: torch.nn.Module) -> Cost:
    """Put peft's LoRA on the attention of a UNet, as DreamBooth scripts do."""
    plain = parameters_of(unet)
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    more = count_macs(unet, *inputs()) - unet_macs()
    return Cost(f"LoRA of rank {RANK}, not fused", parameters_of(unet) - plain, more, 0, 0)


def sdxl() -> tuple[int, Rows]:
    """MACs of a step of SDXL, and rows for what Ctrl-Adapter and its own ControlNet add."""
    s = SDXL()
    _frozen(s.unet), _frozen(s.small)
    call = s.latents, s.t, s.context

    def adapted() -> torch.Tensor:
        mapped = s.adapter(*s.features, s.t, s.context)[0]
        return controlled(mapped[: len(s.features[0]) - 3], s.t.new_zeros(()))  # SDXL has three skips fewer

    def native() -> torch.Tensor:
        return controlled(*s.own(*call, s.picture, **s.added, return_dict=False))

    def controlled(down: Any, mid: torch.Tensor) -> torch.Tensor:
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return s.unet(*call, **s.added, **more)

    def with_features() -> torch.Tensor:
        return s.unet(*call, **s.added, down_intrablock_additional_residuals=t2i(s.picture))

    with torch.device("meta"):
        t2i = T2IAdapter(3, [320, 640, 1280, 1280], downscale_factor=16, adapter_type="full_adapter_xl").eval()
    step, found = s.costs()
    with torch.no_grad():
        features = t2i(s.picture)
    found.append(Cost("T2I-Adapter of SDXL", parameters_of(t2i), 0, count_macs(t2i, s.picture), size_of(features)))
    runs = (adapted, s.adapter), (native, s.own), (with_features, t2i)
    return step, zip(found, (activations(run, s.unet, s.small, own) for run, own in runs))


def flux() -> tuple[int, Rows]:
    """MACs of a step of FLUX.1-dev, and rows for what EasyControl and a ControlNet add."""
    call, (step, found) = easycontrol.inputs("meta"), easycontrol.flux_costs()
    with torch.device("meta"):
        model, net = _frozen(easycontrol.flux()), easycontrol.flux_controlnet()
        adapter, latents = EasyControlAdapter(), torch.zeros(1, 16, 64, 64)

    stream = flux_stream(model, call["pooled_projections"], call["guidance"], torch.float32)
    bank = Bank(adapter)

    def conditioned() -> torch.Tensor:
        bank.made = adapter.encode(stream, latents, "spatial", (64, 64))
        return model(**call)

    def controlled() -> torch.Tensor:
        double, single = net(**call, controlnet_cond=call["hidden_states"], return_dict=False)
        return model(**call, controlnet_block_samples=double, controlnet_single_block_samples=single)

    native = activations(controlled, model, net)
    put_on(flux_attentions(model), bank)
    return step, zip(found, (activations(conditioned, model, adapter), native))


def bench(out_dir: Path) -> dict[str, Any]:
    """Count everything; returns what `benchmarks/run.py` expects."""
    bases = {
        "Stable Diffusion 1.5, 512 x 512": (unet_macs(), stable_diffusion()),
        "SDXL, 1024 x 1024": sdxl(),
        "FLUX.1-dev, 1024 x 1024": flux(),
    }
    rows, shown = [], {}
    for base, (step, found) in bases.items():
        for cost, kept in found:
            rows.append([base, *cost.row(step), f"{kept / 1e9:.1f} GB"])
            shown[f"{cost.name}, {base.split(',')[0]}"] = (cost.parameters / 1e6, kept / 1e9)
    notes = (
        "Counted, not timed: parameters, multiply-accumulates relative to one step of the base model, tensors that "
        "are kept while sampling, and activations that one training step of one picture keeps for the backward pass "
        "(float16, base frozen, fused attention, no checkpointing). EasyControl's condition is 512 x 512. "
        "Ctrl-Adapter's MACs once are the SD 1.5 ControlNet's at a fixed timestep. A fused LoRA costs nothing, and so "
        "do Orthogonal Adaptation's concepts: they are LoRAs, merged into the weights."
    )
    return {"columns": COLUMNS, "rows": rows, "notes": notes, "picture": bars(shown, Path(out_dir) / "adapters.png")}


def bars(found: dict[str, tuple[float, float]], path: Path) -> Path:
    """Save parameters and training activations of every adapter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.35 * len(found) + 1), dpi=110, sharey=True)
    titles = ("parameters, millions", "activations of a training step, GB")
    for panel, title, values in zip(axes, titles, zip(*found.values())):
        panel.bar_label(
            panel.barh(list(found), values),
            fmt=lambda v: f"{v:.0f}" if v >= 100 else f"{v:.1f}",
            padding=3,
            fontsize=8,
        )
        panel.set(xlabel=title, xscale="log")
        panel.margins(x=0.15)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
