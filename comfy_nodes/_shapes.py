"""ComfyUI's own model classes, built small and filled with the weights this package ships.

Imported when the node runs, never at ComfyUI's start.
"""

from __future__ import annotations

import contextlib
from functools import partial

import comfy.ldm.modules.diffusionmodules.model as autoencoder_blocks
import comfy.ops
import folder_paths
import torch
from comfy import (
    controlnet,
    latent_formats,
    model_base,
    model_management,
    model_patcher,
    sd,
    sd1_clip,
    supported_models_base,
)
from comfy.cldm import cldm
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from comfy.text_encoders.flux import FluxClipModel
from comfy.text_encoders.t5 import T5

from diffusers_ext.zoo import comfy_layout as layout
from diffusers_ext.zoo.pipelines import ADAPTERS


def _operations(groups: int) -> type:
    """ComfyUI's layers with this number of normalisation groups in place of the 32 it fixes."""

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **kwargs):
                super().__init__(groups, num_channels, **kwargs)

    return Operations


class _ShapesLatent(latent_formats.LatentFormat):
    def __init__(self, vae: dict):
        self.scale_factor = vae["scaling_factor"]
        self.shift_factor = vae.get("shift_factor") or 0.0
        self.latent_channels = vae["latent_channels"]
        self.spacial_downscale_ratio = 2 ** (len(vae["block_out_channels"]) - 1)

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


def _model_config(arguments: dict, settings: dict, vae: dict, operations: type | None):
    class ShapesConfig(supported_models_base.BASE):
        unet_extra_config = {}
        sampling_settings = settings
        latent_format = partial(_ShapesLatent, vae)
        custom_operations = operations

    config = ShapesConfig({**arguments, "adm_in_channels": None} if "model_channels" in arguments else arguments)
    config.set_inference_dtype(torch.float32, None)
    return config


def _model(name: str):
    """(MODEL object of ComfyUI, weights in its layout) of a shipped denoiser."""
    vae, scheduler = layout.read_config(name, "vae"), layout.read_config(name, "scheduler")
    settings = layout.sampling_settings(scheduler)
    if (layout.model_folder(name) / "unet").is_dir():
        config, state = layout.read_config(name, "unet"), layout.read_weights(name, "unet")
        kinds = {"epsilon": model_base.ModelType.EPS, "v_prediction": model_base.ModelType.V_PREDICTION}
        built = _model_config(layout.unet_arguments(config), settings, vae, _operations(config["norm_num_groups"]))
        return model_base.BaseModel(built, kinds[scheduler["prediction_type"]]), layout.unet_state(state, config)
    config, state = layout.read_config(name, "transformer"), layout.read_weights(name, "transformer")
    built = _model_config(layout.flux_arguments(config, vae["latent_channels"]), settings, vae, None)
    return model_base.Flux(built, model_base.ModelType.FLOW), layout.flux_state(state, config)


def load_model(name: str):
    """The denoiser as a ComfyUI MODEL. An unknown name raises `ValueError`, a damaged folder `RuntimeError`."""
    model, state = _model(name)
    patcher = model_patcher.CoreModelPatcher(
        model, load_device=model_management.get_torch_device(), offload_device=model_management.unet_offload_device()
    )
    model.diffusion_model.load_state_dict(state, strict=True, assign=patcher.is_dynamic())
    return patcher


def _hint_encoder(channels: list[int], hint_channels: int, width: int, operations: type) -> torch.nn.Module:
    """The condition's encoder of a ControlNet: `channels` at falling resolutions, then `width`."""
    layers = [operations.Conv2d(hint_channels, channels[0], 3, padding=1)]
    for before, after in zip(channels[:-1], channels[1:]):
        layers += [torch.nn.SiLU(), operations.Conv2d(before, before, 3, padding=1)]
        layers += [torch.nn.SiLU(), operations.Conv2d(before, after, 3, padding=1, stride=2)]
    return TimestepEmbedSequential(*layers, torch.nn.SiLU(), operations.Conv2d(channels[-1], width, 3, padding=1))


def load_controlnet(name: str):
    """A shipped ControlNet as a ComfyUI CONTROL_NET. An unknown name raises `ValueError`."""
    from diffusers_ext import zoo

    model = zoo.load_controlnet(name)
    config, widths = dict(model.config), list(model.config.conditioning_embedding_out_channels)
    operations = _operations(config["norm_num_groups"])
    network = cldm.ControlNet(**layout.controlnet_arguments(config), operations=operations, dtype=torch.float32)
    network.input_hint_block = _hint_encoder(
        widths, config["conditioning_channels"], config["block_out_channels"][0], operations
    )
    network.load_state_dict(layout.controlnet_state(model.state_dict(), config), strict=True)
    return controlnet.ControlNet(
        network, compression_ratio=2 ** (len(widths) - 1), load_device=model_management.get_torch_device()
    )


@contextlib.contextmanager
def _autoencoder_operations(operations: type):
    """Let ComfyUI's autoencoder blocks be built from other layers; they read them from their module."""
    previous = autoencoder_blocks.ops
    autoencoder_blocks.ops = operations
    try:
        yield
    finally:
        autoencoder_blocks.ops = previous


def load_vae(name: str):
    """The autoencoder as a ComfyUI VAE."""
    config = layout.read_config(name, "vae")
    state = layout.vae_state(layout.read_weights(name, "vae"), config)
    with _autoencoder_operations(_operations(config["norm_num_groups"])):
        vae = sd.VAE(sd=state, config={"params": layout.vae_arguments(config)}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(config["block_out_channels"]) - 1)
    vae.latent_channels = config["latent_channels"]
    return vae


class _FileTokenizer:
    """A tokenizer.json behind the few calls ComfyUI makes on a Hugging Face tokenizer."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def from_pretrained(cls, path: str) -> _FileTokenizer:
        return cls(path)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text).ids}

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def decode(self, token_ids, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class _SmallCLIP(CLIPTextModel):
    """ComfyUI's CLIP with the vocabulary size of the config, which it otherwise fixes."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings.token_embedding = operations.Embedding(
            config["vocab_size"], config["hidden_size"], dtype=dtype, device=device
        )


class _SmallT5(T5):
    """ComfyUI's T5 with the relative position buckets of the config, which it otherwise fixes."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        attention = self.encoder.block[0].layer[0].SelfAttention
        attention.relative_attention_num_buckets = config["relative_attention_num_buckets"]
        attention.relative_attention_max_distance = config["relative_attention_max_distance"]
        attention.relative_attention_bias = operations.Embedding(
            config["relative_attention_num_buckets"], config["num_heads"], dtype=dtype, device=device
        )


def _clip_l(name: str):
    """(tokenizer factory, text model factory) of the CLIP part."""
    config = layout.read_config(name, "text_encoder")
    tokenizer = partial(
        sd1_clip.SDTokenizer,
        tokenizer_path=str(layout.model_folder(name) / "tokenizer"),
        tokenizer_class=_FileTokenizer,
        max_length=config["max_position_embeddings"],
        embedding_size=config["hidden_size"],
        pad_token=config["pad_token_id"],
    )
    arguments = layout.clip_arguments(config)
    return tokenizer, partial(sd1_clip.SDClipModel, model_class=_SmallCLIP, return_projected_pooled=False, **arguments)


def _t5(name: str, length: int):
    """(tokenizer factory, text model factory) of the T5 part, padded to `length` tokens as in training."""
    config = layout.read_config(name, "text_encoder_2")
    tokenizer = partial(
        sd1_clip.SDTokenizer,
        tokenizer_path=str(layout.model_folder(name) / "tokenizer_2"),
        tokenizer_class=_FileTokenizer,
        max_length=length,
        has_start_token=False,
        pad_with_end=False,
        pad_token=config["pad_token_id"],
        embedding_size=config["d_model"],
        embedding_key="t5xxl",
    )
    return tokenizer, partial(sd1_clip.SDClipModel, model_class=_SmallT5, **layout.t5_arguments(config))


class _TwoTokenizers:
    """What ComfyUI's Flux tokenizer offers, over two given ones."""

    def __init__(self, clip_l, t5xxl, embedding_directory=None, tokenizer_data={}):  # noqa: B006 (ComfyUI's signature)
        self._parts = {"l": clip_l(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)}
        self._parts["t5xxl"] = t5xxl(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs) -> dict[str, list]:
        return {key: part.tokenize_with_weights(text, return_word_ids, **kwargs) for key, part in self._parts.items()}

    def untokenize(self, token_weight_pair):
        return self._parts["l"].untokenize(token_weight_pair)

    def state_dict(self) -> dict:
        return {}


class _TwoTextModels(FluxClipModel):
    """ComfyUI's Flux text side over two given models: T5 states and CLIP's pooled vector."""

    def __init__(self, clip_l, t5xxl, device="cpu", dtype=None, model_options={}):  # noqa: B006 (ComfyUI's signature)
        torch.nn.Module.__init__(self)
        self.clip_l = clip_l(device=device, dtype=dtype, model_options={**model_options, "model_name": "clip_l"})
        self.t5xxl = t5xxl(device=device, dtype=dtype, model_options={**model_options, "model_name": "t5xxl"})
        self.dtypes = {dtype}


def load_clip(name: str):
    """The text side as a ComfyUI CLIP; `embedding:name` finds the user's embeddings and those that ship."""
    tokenizer, text_model = _clip_l(name)
    config = layout.read_config(name, "text_encoder")
    states = [layout.clip_state(layout.read_weights(name, "text_encoder"), config)]
    if (layout.model_folder(name) / "text_encoder_2").is_dir():
        t5_tokenizer, t5_model = _t5(name, config["max_position_embeddings"])
        states.append(layout.read_weights(name, "text_encoder_2"))
        target = supported_models_base.ClipTarget(
            partial(_TwoTokenizers, tokenizer, t5_tokenizer), partial(_TwoTextModels, text_model, t5_model)
        )
    else:
        target = supported_models_base.ClipTarget(
            partial(sd1_clip.SD1Tokenizer, tokenizer=tokenizer), partial(sd1_clip.SD1ClipModel, clip_model=text_model)
        )
    folders = [*folder_paths.get_folder_paths("embeddings"), str(ADAPTERS)]
    return sd.CLIP(target, folders, state_dict=states, model_options={"dtype": torch.float32})
