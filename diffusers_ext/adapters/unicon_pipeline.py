"""Drawing any of the inputs of UniCon from the others: own noise level, scheduler, prompt and mask for each.

Li et al., "A Simple Approach to Unifying Diffusion-based Conditional Generation", ICLR 2025,
https://arxiv.org/abs/2410.11439
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..registry import unknown
from .unicon import UniConAdapter, attached_adapters, encode_pictures


__all__ = ["UniConPipeline", "UniConPipelineOutput"]


@dataclass
class UniConPipelineOutput(BaseOutput):
    """What was drawn.

    Args:
        images: For every input a list of `PIL.Image`, an array, a tensor `[n, 3, h, w]` in [0, 1], or latents.
    """

    images: list[list[PIL.Image.Image] | np.ndarray | torch.Tensor]


@dataclass(frozen=True)
class Joined:
    """One pair of inputs: indices of x and y, weights of what is added to each, and the adapter."""

    x: int
    y: int
    w_x: float
    w_y: float
    adapter: UniConAdapter


def sample_schedule(strengths: Sequence[float], steps: int, order: int = 1) -> list[tuple[int, ...]]:
    """Index into the timesteps of every input at every step of a run.

    Args:
        strengths: Of the noise each input starts from: 1 all of it, 0 none (it stays at the last, cleanest index).
        steps: Number of timesteps.
        order: Timesteps per step of the scheduler; inputs start at multiples of it.

    Returns:
        One tuple per step; an input is drawn on wherever its next index differs, and after the last step.

    Raises:
        ValueError: Nothing is left to draw.
    """
    starts = [min(int((1 - s) * steps / order + 1e-6) * order, steps) for s in strengths]
    count = max(steps - start for start in starts)
    if count < 1:
        raise ValueError(f"strengths {list(strengths)} of {steps} timesteps leave nothing to draw: give one above 0")
    return [tuple(min(a + (steps - a) * j // count, steps - 1) for a in starts) for j in range(count)]


def guided(u_joint, c_joint, c_separate, scale, cond_scale: float) -> torch.Tensor:
    """u_joint + g (c_joint - u_joint) + g_c (c_joint - c_separate).

    Args:
        u_joint: Unconditional prediction, or None without guidance.
        c_joint: Prediction with the prompts and the joint attention.
        c_separate: With the prompts, each input by itself; None for `cond_scale` 0.
        scale, cond_scale: g (a number, or a tensor that broadcasts) and g_c.
    """
    output = c_joint if u_joint is None else u_joint + scale * (c_joint - u_joint)
    return output if c_separate is None else output + cond_scale * (c_joint - c_separate)


class _Input:
    """One input of a run: its scheduler, its latents, what is known of it."""

    def __init__(self, scheduler: Any, noise: torch.Tensor, known: torch.Tensor | None, start: int, strength: float):
        self.scheduler, self.noise, self.known = scheduler, noise, known
        self.mask: torch.Tensor | None = None
        if strength >= 1:
            self.latents = noise * scheduler.init_noise_sigma
        else:
            self.latents = known if strength <= 0 else self._noised(start)
            if start and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(start)

    def _noised(self, index: int) -> torch.Tensor:
        """The known picture with the noise of an index; without any behind the last one."""
        if index >= len(self.scheduler.timesteps):
            return self.known
        return self.scheduler.add_noise(self.known, self.noise, self.scheduler.timesteps[index : index + 1])

    def advance(self, output: torch.Tensor, index: int, **extra: Any) -> None:
        """One step of the scheduler; where the mask is 0 the known picture is put back, at the new noise level."""
        timestep = self.scheduler.timesteps[index]
        self.latents = self.scheduler.step(output, timestep, self.latents, **extra, return_dict=False)[0]
        if self.mask is not None:
            self.latents = torch.lerp(self._noised(index + 1), self.latents, self.mask)


class UniConPipeline(StableDiffusionPipeline):
    """Draws images from conditions, conditions from images, or both together, with `UniConAdapter`s.

    Make it of a Stable Diffusion pipeline, `UniConPipeline.from_pipe(pipe)`, and attach adapters to it. Input 0 is
    the image; each further one belongs to an adapter.

    Example:
        >>> from diffusers_ext import UniConAdapter, UniConPipeline, zoo
        >>> pipe = UniConPipeline.from_pipe(zoo.load("shapes-unet"))
        >>> adapter = UniConAdapter.from_pretrained(zoo.adapter_file("unicon-depth-shapes-unet"))
        >>> with adapter.attach(pipe):
        ...     image, depth = pipe(prompts="a red circle", num_inference_steps=10).images
        ...     estimated = pipe(images=[image[0], None], num_inference_steps=10, guidance_scale=1.0).images[1]
    """

    _callback_tensor_inputs = ["latents"]

    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Any] | None = None,
        strengths: Sequence[float] | None = None,
        prompts: str | Sequence[str | Sequence[str]] = "",
        negative_prompts: str | Sequence[str | Sequence[str]] = "",
        pairs: Sequence[tuple] | None = None,
        masks: Sequence[Any] | None = None,
        joint_scale: float = 1.0,
        guidance_scale: float | Sequence[float] = 7.5,
        cond_guidance_scale: float = 0.0,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Sequence[torch.Tensor | None] | None = None,
        clip_skip: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict] | None = None,
    ) -> UniConPipelineOutput | tuple:
        """Draw.

        Args:
            images: One entry per input: None, a picture, a list of pictures, or a tensor `[n, 3 or 1, h, w]` in
                [0, 1]. Default: none given, everything is drawn.
            strengths: One per input: 0 keeps the picture as it is, 1 draws it from noise, between them it is coarse
                advice and drawn along. Default: 0 where there is a picture, 1 where not.
            prompts: One text for all inputs, or a list with a text or a list of n texts per input. Those of y come
                behind the adapter's trigger word.
            negative_prompts: As `prompts`.
            pairs: (x, y, weight of x, weight of y, name of the adapter), or (x, y, name); an empty list joins
                nothing. Default: input 0 with each further one, by the adapters in the order they were attached.
            masks: One entry per input: None, or a tensor `[n, 1, h, w]`: 1 where to draw anew, 0 where the picture
                stays.
            joint_scale: Strength of the joint attention, times each adapter's own scale; 0 is the model alone.
            guidance_scale: Of the prompts, one number or one per input; 1 turns it off.
            cond_guidance_scale: Pushes away from what inputs would be without each other; one more call per step.
            num_inference_steps: Of an input that starts from noise.
            height, width: In pixels. Default: of the first picture that is given, or the model's.
            num_images_per_prompt, eta, clip_skip, return_dict: As in `StableDiffusionPipeline`.
            generator: One, or one per picture; draws the noise of the inputs in their order.
            latents: Starting noise, one entry per input.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            callback_on_step_end: `callback(pipe, step, timesteps, {"latents": [of every input]})`.

        Returns:
            `UniConPipelineOutput`, or a tuple with its list.

        Raises:
            ValueError: Lists of other lengths than there are inputs, an unknown adapter, pictures of different sizes.
        """
        joined, count = self._joined(pairs, images, prompts)
        images, masks = _per_input("images", images, count), _per_input("masks", masks, count)
        latents, strengths = _per_input("latents", latents, count), _strengths(strengths, images, count)
        scales = [guidance_scale] * count if isinstance(guidance_scale, (int, float)) else list(guidance_scale)
        _require_length("guidance_scale", scales, count)
        texts = tuple([_texts(said, i, count) for i in range(count)] for said in (prompts, negative_prompts))
        height, width = self._size(images, height, width)
        known = [self._known(image, height, width) for image in images]
        batch = _batch([*map(len, texts[0]), *map(len, texts[1]), *(len(k) for k in known if k is not None)])
        self._guidance_scale, self._clip_skip, self._interrupt = max(scales), clip_skip, False
        self._cross_attention_kwargs = None
        text = self._text(texts, joined, batch, num_images_per_prompt)
        size = (batch * num_images_per_prompt, height, width)
        inputs, schedule = self._prepare(known, strengths, num_inference_steps, size, generator, latents, text.dtype)
        for one, mask in zip(inputs, masks):
            one.mask = None if mask is None else self._mask(mask, one.latents)
        extra = self.prepare_extra_step_kwargs(generator, eta)
        for step, places in enumerate(self.progress_bar(schedule)):
            if self.interrupt:
                continue
            outputs = self._predict(inputs, places, text, joined, joint_scale, scales, cond_guidance_scale)
            self._advance(inputs, outputs, strengths, schedule, step, extra)
            self._report(callback_on_step_end, step, inputs, places)
        drawn = [self._decoded(one.latents, output_type) for one in inputs]
        self.maybe_free_model_hooks()
        return UniConPipelineOutput(drawn) if return_dict else (drawn,)

    def _advance(self, inputs, outputs, strengths, schedule, step: int, extra: dict[str, Any]) -> None:
        """One step of every input whose next index differs."""
        for i, one in enumerate(inputs):
            now = schedule[step][i]
            later = schedule[step + 1][i] if step + 1 < len(schedule) else len(one.scheduler.timesteps)
            if strengths[i] > 0 and later != now:
                one.advance(outputs[i], now, **extra)

    def _joined(self, pairs: Sequence[tuple] | None, images: Any, prompts: Any) -> tuple[list[Joined], int]:
        """The pairs with their adapters, and the number of inputs."""
        adapters = attached_adapters(self.unet)
        names = {adapter.config.model_name: adapter for adapter in adapters}
        if len(names) < len(adapters):
            raise ValueError(f"adapters of the same model_name are attached: {', '.join(names)}; detach one")
        given = [value for value in (images, None if isinstance(prompts, str) else prompts) if value is not None]
        count = len(given[0]) if given else 1 + len(adapters)
        if pairs is None:
            if count != 1 + len(adapters):
                raise ValueError(
                    f"{count} inputs for {len(adapters)} attached adapters: attach one per condition, or give pairs"
                )
            return [Joined(0, 1 + i, 1.0, 1.0, adapter) for i, adapter in enumerate(adapters)], count
        return [_pair(tuple(pair), count, names) for pair in pairs], count

    def _size(self, images: Sequence[Any], height: int | None, width: int | None) -> tuple[int, int]:
        sizes = {_size_of(image) for image in images if image is not None}
        if len(sizes) > 1:
            raise ValueError(f"the inputs have different sizes {sorted(sizes)} (height, width): resize them to one")
        default = self.unet.config.sample_size * self.vae_scale_factor
        own = sizes.pop() if sizes else (default, default)
        size = height or own[0], width or own[1]
        if any(side % self.vae_scale_factor for side in size):
            raise ValueError(f"height and width are {size}: give multiples of {self.vae_scale_factor}")
        return size

    def _known(self, image: Any, height: int, width: int) -> torch.Tensor | None:
        if image is None:
            return None
        if not isinstance(image, torch.Tensor):
            image = (self.image_processor.preprocess(image, height=height, width=width) + 1) / 2
        elif image.shape[-2:] != (height, width):
            raise ValueError(f"a picture has {list(image.shape[-2:])} pixels, the run {[height, width]}: resize it")
        return encode_pictures(self, image)

    def _mask(self, mask: Any, latents: torch.Tensor) -> torch.Tensor:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
            shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"a mask is {shape}; accepted: a tensor [n, 1, height, width] in [0, 1]")
        small = F.interpolate(mask.to(latents), latents.shape[-2:], mode="area")
        return (small > 0.5).to(latents).expand(len(latents), -1, -1, -1)

    def _text(self, texts: tuple, joined: Sequence[Joined], batch: int, images: int) -> torch.Tensor:
        """Text states `[parts * inputs * batch * images, tokens, width]`; the unconditional part first."""
        triggers = {pair.y: pair.adapter.config.trigger_word for pair in joined}
        said = [[triggers.get(i, "") + t for t in _spread(own, batch)] for i, own in enumerate(texts[0])]
        against = [_spread(own, batch) for own in texts[1]]
        positive, negative = self.encode_prompt(
            sum(said, []), self._execution_device, images, self.do_classifier_free_guidance,
            sum(against, []), clip_skip=self.clip_skip,
        )  # fmt: skip
        return torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive

    def _prepare(
        self,
        known: Sequence[Any],
        strengths: Sequence[float],
        steps: int,
        size: tuple,
        generator: Any,
        latents: Any,
        dtype,
    ) -> tuple[list[_Input], list[tuple[int, ...]]]:
        """Every input with a scheduler of its own, and the run's schedule."""
        device, (batch, height, width) = self._execution_device, size
        shape = (batch, self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} pictures: give one, or one per picture")
        schedulers = [type(self.scheduler).from_config(self.scheduler.config) for _ in known]
        for scheduler in schedulers:
            scheduler.set_timesteps(steps, device=device)
        timesteps = schedulers[0].timesteps
        schedule = sample_schedule(strengths, len(timesteps), getattr(schedulers[0], "order", 1))
        inputs = []
        for i, scheduler in enumerate(schedulers):
            noise = latents[i] if latents[i] is not None else randn_tensor(shape, generator, device, dtype)
            if tuple(noise.shape) != shape:
                raise ValueError(f"latents of input {i} have shape {list(noise.shape)}; accepted: {list(shape)}")
            own = None if known[i] is None else known[i].to(dtype).repeat_interleave(batch // len(known[i]), 0)
            inputs.append(_Input(scheduler, noise.to(device, dtype), own, schedule[0][i], strengths[i]))
        # For methods that ask the pipeline where in the run a step is.
        self.scheduler.set_timesteps(steps, device=device)
        return inputs, schedule

    def _predict(
        self, inputs: Sequence[_Input], places: Sequence[int], text: torch.Tensor, joined: Sequence[Joined],
        joint_scale: float, scales: Sequence[float], cond_scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """What the model predicts for every input, guided; `[inputs, batch, c, h, w]`."""
        count, batch = len(inputs), len(inputs[0].latents)
        times = [one.scheduler.timesteps[place] for one, place in zip(inputs, places)]
        x = torch.cat([one.scheduler.scale_model_input(one.latents, t) for one, t in zip(inputs, times)])
        parts = len(text) // len(x)
        t = torch.stack(times).repeat_interleave(batch).repeat(parts)

        def call(joint: bool) -> list[torch.Tensor]:
            with self._joining(joined, count, batch, parts, joint_scale, joint):
                output = self.unet(x.repeat(parts, 1, 1, 1), t, text, return_dict=False)[0]
            return [part.unflatten(0, (count, batch)) for part in output.chunk(parts)]

        together = call(True)
        separate = call(False)[-1] if cond_scale and joint_scale else None
        g = torch.tensor(scales, device=x.device, dtype=x.dtype).view(-1, 1, 1, 1, 1)
        return guided(together[0] if parts > 1 else None, together[-1], separate, g, cond_scale)

    def _joining(self, joined, count: int, batch: int, parts: int, joint_scale: float, joint: bool) -> ExitStack:
        """Tell every attached adapter its pairs of rows; rows are counted by part, input, picture."""
        rows = torch.arange(parts * count * batch).view(parts, count, batch)
        with ExitStack() as stack:
            for adapter in attached_adapters(self.unet):
                own = [p for p in joined if p.adapter is adapter and joint_scale]
                pairs = [
                    (rows[:, p.x].flatten(), rows[:, p.y].flatten(), joint_scale * p.w_x, joint_scale * p.w_y)
                    for p in own
                ]
                stack.enter_context(adapter.paired(*pairs, joint=joint))
            return stack.pop_all()

    def _report(self, callback: Callable | None, step: int, inputs: Sequence[_Input], places: Sequence[int]) -> None:
        if callback is None:
            return
        times = [one.scheduler.timesteps[place] for one, place in zip(inputs, places)]
        changed = callback(self, step, times, {"latents": [one.latents for one in inputs]}).get("latents", [])
        for one, latents in zip(inputs, changed):
            one.latents = latents

    def _decoded(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        image, flagged = self.run_safety_checker(image, image.device, image.dtype)
        normalize = [True] * len(image) if flagged is None else [not bad for bad in flagged]
        return self.image_processor.postprocess(image, output_type=output_type, do_denormalize=normalize)


def _require_length(name: str, values: Sequence, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} inputs: give one per input, the image first")


def _per_input(name: str, values: Sequence | None, count: int) -> list:
    """One entry per input, None where nothing is given."""
    if values is None:
        return [None] * count
    _require_length(name, values, count)
    return list(values)


def _strengths(strengths: Sequence[float] | None, images: Sequence[Any], count: int) -> list[float]:
    if strengths is None:
        return [1.0 if image is None else 0.0 for image in images]
    _require_length("strengths", strengths, count)
    for i, (strength, image) in enumerate(zip(strengths, images)):
        if not 0 <= strength <= 1:
            raise ValueError(f"the strength of input {i} is {strength}; accepted: 0 (keep) to 1 (draw from noise)")
        if image is None and strength < 1:
            raise ValueError(f"input {i} has strength {strength} and no picture: give one, or strength 1")
    return list(strengths)


def _texts(prompts: str | Sequence, i: int, count: int) -> list[str]:
    """The texts of one input."""
    if isinstance(prompts, str):
        return [prompts]
    _require_length("prompts", prompts, count)
    return [prompts[i]] if isinstance(prompts[i], str) else list(prompts[i])


def _batch(lengths: Sequence[int]) -> int:
    """Pictures per input: the one length beside 1 that occurs."""
    several = set(lengths) - {1}
    if len(several) > 1 or 0 in several:
        raise ValueError(f"inputs and prompts hold {sorted(set(lengths))} pictures: give one, or as many everywhere")
    return several.pop() if several else 1


def _spread(values: list[str], batch: int) -> list[str]:
    return values * batch if len(values) == 1 else values


def _size_of(image: Any) -> tuple[int, int]:
    """Height and width of a picture, the first of a list, or a tensor."""
    if isinstance(image, torch.Tensor):
        return tuple(image.shape[-2:])
    first = image[0] if isinstance(image, (list, tuple)) else image
    return first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)


def _pair(pair: tuple, count: int, adapters: dict[str, UniConAdapter]) -> Joined:
    """A pair as the caller gives it, checked."""
    if len(pair) not in (3, 5):
        raise ValueError(f"pair {pair} is not (x, y, weight of x, weight of y, adapter) or (x, y, adapter)")
    x, y, *weights, name = pair
    for index in (x, y):
        if not 0 <= index < count:
            raise ValueError(f"pair {pair} names input {index}; there are 0 to {count - 1}")
    if x == y:
        raise ValueError(f"pair {pair} joins input {x} with itself: x and y are different inputs")
    if name not in adapters:
        raise ValueError(unknown("attached adapter", name, adapters))
    w_x, w_y = weights or (1.0, 1.0)
    return Joined(x, y, w_x, w_y, adapters[name])
