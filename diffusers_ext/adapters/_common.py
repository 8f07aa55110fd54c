"""What every adapter shares: files, attaching, scale, following the model, which rows and steps it works on."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..apply import Applied, Attachment, MethodConfig, apply, denoiser_of
from ..caching._common import Inputs, place_of
from ..registry import MethodRecord, unknown


_CONFIG = "config"  # name of the metadata entry of a single file
_SHOWN = 5
# How far resizing may take a picture's values out of their range.
_ROUNDING = 0.02


@dataclass(frozen=True, eq=False)
class _Attached(MethodConfig):
    """An adapter on its way through `apply`: conflicts, `remove` and undoing are those of all methods."""

    adapter: Adapter

    @property
    def method(self) -> MethodRecord:  # type: ignore[override]
        return self.adapter.method

    def check(self, target: Any, num_inference_steps: int | None = None) -> tuple[str, ...]:
        self.adapter.check(target)
        return ()

    def attach(self, target: Any) -> Attachment:
        return Attachment(self.adapter._put_on(target))


class Adapter(ModelMixin, ConfigMixin):
    """Base of the adapters. Subclasses implement `check` and `install`, and `begin_call` where they need it.

    An adapter is a module of its own: its weights never enter the state dict of the model it works on. It is moved to
    the device and dtype of the model when it is attached, and follows it afterwards.
    """

    config_name = "config.json"
    method: ClassVar[MethodRecord]

    def __init__(self) -> None:
        super().__init__()
        self._handle: Applied | None = None
        self._scale = 1.0

    def check(self, target: Any) -> None:
        """Raise `ValueError` or `TypeError`, naming the layer and the fix, if the adapter does not fit `target`."""

    def install(self, target: Any, undo: ExitStack) -> None:
        """Put hooks or processors on the denoiser of `target`; push on `undo` how to take each of them off."""
        raise NotImplementedError(f"{type(self).__name__} does not implement install()")

    def begin_call(self, target: Any, arguments: Mapping[str, Any]) -> None:
        """Called before every call of the denoiser, with its arguments by name."""

    @classmethod
    def published(cls, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config and state dict from the tensors of a file in the layout of the paper's authors.

        Raises:
            ValueError: Not a layout that is known.
        """
        raise ValueError(
            f"not a file of {cls.__name__}: it carries no config, and no published layout is known for this adapter. "
            f"First keys: {', '.join(sorted(tensors)[:_SHOWN])}"
        )

    @property
    def scale(self) -> float:
        """Strength of the adapter; 0 bypasses it."""
        return self._scale

    @property
    def attached(self) -> bool:
        """Whether the adapter is on a model."""
        return self._handle is not None

    def set_scale(self, scale: float) -> None:
        """Change the strength, also between two steps of a run.

        Args:
            scale: Any finite number; 0 gives the bits of the model without the adapter.
        """
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r}: give a finite number, 0 for off, 1 for the trained strength")
        self._scale = float(scale)

    def attach(self, target: Any, scale: float = 1.0) -> Applied:
        """Put the adapter on a pipeline or model.

        Args:
            target: Pipeline with a `unet` or `transformer`, or the model itself.
            scale: See `set_scale`.

        Returns:
            Handle with `.remove()`, also a context manager.

        Raises:
            ValueError: It does not fit, or is attached already. The model is left as it was.
        """
        if self.attached:
            raise ValueError(f"this {type(self).__name__} is attached already: call detach() first")
        before = self._scale
        self.set_scale(scale)
        try:
            self._handle = apply(target, _Attached(self))
        except BaseException:
            self._scale = before
            raise
        return self._handle

    def detach(self) -> None:
        """Take the adapter off; the model is bit for bit as before. Does nothing when it is not attached."""
        if self._handle is not None:
            self._handle.remove()

    def _put_on(self, target: Any):
        model = denoiser_of(target)
        signature = inspect.signature(type(model).forward)

        @torch.compiler.disable
        def before_call(_, args: tuple, kwargs: dict) -> None:
            arguments = signature.bind(model, *args, **kwargs).arguments
            self._follow(Inputs.of(arguments).sample)
            running, _ = running_pipeline()
            self.begin_call(running or target, arguments)

        with ExitStack() as undo:
            undo.callback(torch.compiler.reset)
            undo.callback(setattr, self, "_handle", None)
            undo.callback(model.register_forward_pre_hook(before_call, with_kwargs=True).remove)
            if model.device.type != "meta":  # offloaded: the adapter follows when the model is called
                self.to(model.device, model.dtype)
            self.install(target, undo)
            # Compiled graphs of modules do not notice hooks that come or go.
            torch.compiler.reset()
            return undo.pop_all().close

    def _follow(self, sample: torch.Tensor) -> None:
        mine = next(self.parameters())
        if mine.device != sample.device or mine.dtype != sample.dtype:
            self.to(sample.device, sample.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Adapter:
        # ModelMixin.to warns at every change of dtype, also where nothing has to stay in float32.
        return torch.nn.Module.to(self, *args, **kwargs)

    def save_file(self, path: str | Path) -> Path:
        """Save weights and config in one safetensors file, which ComfyUI's loaders list by name.

        Args:
            path: Ends in `.safetensors`; its folder must exist.
        """
        path = Path(path)
        _require_suffix(path)
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        metadata = {"class": type(self).__name__, _CONFIG: json.dumps(config)}
        _write(path, {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, metadata)
        return path

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Adapter:
        """Load from a folder of `save_pretrained`, or from one file: `save_file`'s, or of a published layout.

        Args:
            pretrained_model_name_or_path: Folder, or path of a `.safetensors` file.
            kwargs: For folders those of `ModelMixin.from_pretrained`; for files `torch_dtype`, and fields of the
                config that the file does not tell or tells otherwise.

        Raises:
            FileNotFoundError: There is no such file or folder.
            ValueError: Tensors are missing, unknown, or of another shape than the config says.
        """
        path = Path(pretrained_model_name_or_path)
        if path.is_file():
            return cls._from_file(path, **kwargs)
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is neither a folder nor a file: adapters are loaded from your disk only")
        asked = kwargs.pop("output_loading_info", False)
        model, found = super().from_pretrained(path, output_loading_info=True, **kwargs)
        require_complete(cls, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
        return (model, found) if asked else model

    @classmethod
    def _from_file(cls, path: Path, torch_dtype: torch.dtype | None = None, **changes: Any) -> Adapter:
        _require_suffix(path)
        known = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        for name in changes:
            if name not in known:
                raise ValueError(unknown(f"field of {cls.__name__}'s config", name, known))
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name} is not a safetensors file, or a damaged one: {error}") from error
        if _CONFIG not in metadata:
            config, tensors = cls.published(tensors)
        elif metadata.get("class") != cls.__name__:
            raise ValueError(f"{path.name} holds a {metadata.get('class')}, not a {cls.__name__}: use its class")
        else:
            config = json.loads(metadata[_CONFIG])
        return cls._assembled({**config, **changes}, tensors, torch_dtype)

    @classmethod
    def _assembled(
        cls, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], torch_dtype: torch.dtype | None = None
    ) -> Adapter:
        """The adapter of a config with these weights; `ValueError` unless they are exactly what it asks for."""
        with torch.device("meta"):  # nothing is allocated before names and shapes are known to be right
            model = cls.from_config(config)
        expected = model.state_dict()
        wrong = [k for k in expected.keys() & tensors.keys() if expected[k].shape != tensors[k].shape]
        require_complete(cls, expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), wrong)
        model.load_state_dict(tensors, assign=True)
        return model.to(torch_dtype or next(iter(tensors.values())).dtype).eval()


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; the same weights give the same bytes, as safetensors itself shuffles the metadata."""
    packed = save(tensors, metadata)
    body = 8 + int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8:body])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + packed[body:])


def _require_suffix(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} does not end in .safetensors: adapters are kept in safetensors files only")


def require_complete(cls: type, missing: Any, unexpected: Any, mismatched: Any) -> None:
    problems = [
        f"{len(names)} tensors {what}: {', '.join(sorted(map(str, names))[:_SHOWN])}"
        for what, names in (("missing", missing), ("unknown", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        raise ValueError(
            f"these are not the weights that the config of this {cls.__name__} asks for: {'; '.join(problems)}"
        )


def running_pipeline() -> tuple[Any, Mapping[str, Any]]:
    """The pipeline whose call is going on, and that call's local variables; None outside of a pipeline.

    It need not be the one an adapter was attached to: pipelines share their models.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"], frame.f_locals
        frame = frame.f_back
    return None, {}


def conditional_rows(batch: int) -> slice:
    """Rows of a denoiser batch that see the prompt, in the pipeline call that is going on.

    Pipelines put the unconditional rows of classifier-free guidance first and those of perturbed-attention guidance
    last. Outside of a pipeline all rows count.

    Raises:
        ValueError: A pipeline with another order of rows, or rows that its guidance does not divide.
    """
    pipeline, names = running_pipeline()
    told = names.get("do_classifier_free_guidance", False)  # pipelines without a property decide in their call
    guided = bool(getattr(pipeline, "do_classifier_free_guidance", told))
    if guided and getattr(pipeline, "image_guidance_scale", None) is not None:
        raise ValueError(
            f"{type(pipeline).__name__} puts the rows of the prompt first: adapters do not know its batches"
        )
    perturbed = getattr(pipeline, "_pag_scale", None) is not None and bool(pipeline.do_perturbed_attention_guidance)
    parts = 1 + guided + perturbed
    if batch % parts:
        raise ValueError(f"a batch of {batch} does not divide into the {parts} parts that the pipeline's guidance has")
    return slice(batch // parts if guided else 0, None)


def within(target: Any, timestep: torch.Tensor | float, start: float, end: float) -> bool:
    """Whether the step at a timestep lies in a range of the run, as ControlNet pipelines count.

    Args:
        target: Pipeline whose scheduler holds the timesteps of the run.
        timestep: As the denoiser got it, or as the scheduler has it.
        start, end: Fractions of the steps, `0 <= start < end <= 1`.
    """
    if start <= 0 and end >= 1:
        return True
    place = _place(target, float(torch.as_tensor(timestep).flatten()[0]))
    if place is None:
        raise ValueError(
            "start and end need the place of a step in the run: attach to the pipeline, not to its model, and use a "
            "scheduler whose timesteps are all different"
        )
    steps = len(target.scheduler.timesteps)
    return place / steps >= start and (place + 1) / steps <= end


def _place(target: Any, time: float) -> int | None:
    """Index of a step. Flux's transformer gets the timestep over 1000, rounded to the dtype of the latents."""
    place = place_of(target, time)
    timesteps = getattr(getattr(target, "scheduler", None), "timesteps", None)
    if place is not None or timesteps is None or not 0 < time <= 1:
        return place
    away = (timesteps.double() / target.scheduler.config.num_train_timesteps - time).abs()
    nearest = int(away.argmin())
    return nearest if float(away[nearest]) <= time * torch.finfo(torch.bfloat16).eps else None


def require_range(start: float, end: float) -> None:
    """Raise `ValueError` unless `0 <= start < end <= 1`."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"start {start} and end {end}: give fractions of the steps, 0 <= start < end <= 1")


def require_pictures(images: Any, channels: Sequence[int], low: float = 0.0) -> None:
    """Raise `ValueError` unless these are pictures `[n, channels, height, width]` of finite values in [low, 1]."""
    accepted = f"accepted: a tensor [n, {' or '.join(map(str, channels))}, height, width] in [{low:g}, 1]"
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"pictures are of type {type(images).__name__}; {accepted}")
    if images.ndim != 4 or images.shape[1] not in channels:
        raise ValueError(f"pictures of shape {list(images.shape)}; {accepted}")
    least, most = images.min(), images.max()  # nan where any value is
    if not images.is_meta and not (least >= low - _ROUNDING and most <= 1 + _ROUNDING):
        raise ValueError(f"pictures with values from {least:g} to {most:g}; {accepted}")
