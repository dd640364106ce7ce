"""Tiny text-to-image pipelines of diffusers with random weights, one per class, saved to disk."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SIZE = 64
"""Height and width of an image, pixels."""


# ---------------------------------------------------------------------- tokenizers
def clip_tokenizer(folder: Path, pad: str = "<|endoftext|>"):
    """CLIP's tokenizer with letters as its only tokens."""
    from transformers import CLIPTokenizer

    letters = [*LETTERS, ",", "."]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77, pad_token=pad
    )


def letters_tokenizer(*special: str):
    """A fast tokenizer, letters and some special tokens, of which the first one pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate([*special, "[unk]", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], unk_token="[unk]", model_max_length=512
    )


# ---------------------------------------------------------------------- text encoders
def clip_text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=58, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, bos_token_id=56, eos_token_id=57, pad_token_id=57,
    )  # fmt: skip


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )


# ---------------------------------------------------------------------- U-Nets
def unet_parts(**unet_options):
    """U-Net, autoencoder and scheduler: 64x64 pixels, latents of 8x8."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",
        "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **unet_options,
    )  # fmt: skip
    torch.nn.init.normal_(unet.conv_out.weight)  # images depend visibly on prompts and labels
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        steps_offset=1,
    )  # fmt: skip
    return {"unet": unet, "vae": vae, "scheduler": scheduler}


def stable_diffusion(folder: Path):
    """Stable Diffusion 1.5, and 2 with other weights."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    return StableDiffusionPipeline(
        text_encoder=CLIPTextModel(clip_text_config()), tokenizer=clip_tokenizer(folder / "words"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **unet_parts(cross_attention_dim=16),
    )  # fmt: skip


def stable_diffusion_xl(folder: Path):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = {
        "cross_attention_dim": 32, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }  # fmt: skip
    return StableDiffusionXLPipeline(
        text_encoder=CLIPTextModel(clip_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=clip_tokenizer(folder / "a"), tokenizer_2=clip_tokenizer(folder / "b"),
        **unet_parts(**unet),
    )  # fmt: skip


# ---------------------------------------------------------------------- transformers
def vae_of_16_channels():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5,
    )  # fmt: skip


def stable_diffusion_3(folder: Path):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=16, pos_embed_max_size=96,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae_of_16_channels(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer=clip_tokenizer(folder / "a"),
        text_encoder_2=CLIPTextModelWithProjection(clip_text_config()),
        tokenizer_2=clip_tokenizer(folder / "b"),
        text_encoder_3=t5_encoder(), tokenizer_3=letters_tokenizer("<pad>", "</s>"),
    )  # fmt: skip


def flux(folder: Path, distilled: bool = True):
    """FLUX.1 dev, or schnell without the embedded guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8), guidance_embeds=distilled,
    )  # fmt: skip
    return FluxPipeline(
        transformer=transformer, vae=vae_of_16_channels(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=distilled),
        text_encoder=CLIPTextModel(clip_text_config()), tokenizer=clip_tokenizer(folder / "a"),
        text_encoder_2=t5_encoder(), tokenizer_2=letters_tokenizer("<pad>", "</s>"),
    )  # fmt: skip


def chat_tokenizer():
    """Of a language model: with a chat template."""
    tokenizer = letters_tokenizer("<pad>", "<im_start>", "<im_end>")
    tokenizer.chat_template = (
        "{% for m in messages %}<im_start>{{ m.content if m.content is string else "
        "m.content[0].text }}<im_end>{% endfor %}"
    )
    return tokenizer


def flux2_klein(folder: Path):
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae, text_encoder=text_encoder, tokenizer=chat_tokenizer(), transformer=transformer,
    )  # fmt: skip


def sana(folder: Path):
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    text_encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        )
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6, encoder_block_out_channels=(4, 4, 8, 8, 8, 8),
        decoder_block_out_channels=(4, 4, 8, 8, 8, 8), encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6, scaling_factor=0.4,
        upsample_block_type="interpolate", downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=16, sample_size=2,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=letters_tokenizer("<pad>", "<bos>"), text_encoder=text_encoder, vae=vae,
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip


def qwen_image(folder: Path):
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 16,
        },
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False,
        True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight)
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True), vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=chat_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


PIPELINES = {
    function.__name__: function
    for function in (
        stable_diffusion, stable_diffusion_xl, stable_diffusion_3, flux, flux2_klein, sana,
        qwen_image,
    )
}  # fmt: skip


def save(name: str, folder: Path, **options) -> Path:
    """Save a pipeline of `PIPELINES`; returns its folder."""
    torch.manual_seed(0)
    path = folder / name
    PIPELINES[name](folder / f"{name}_words").save_pretrained(path, **options)
    return path


# ---------------------------------------------------------------------- ControlNets
CONTROLNETS = {
    "stable_diffusion": "ControlNetModel",
    "stable_diffusion_xl": "ControlNetModel",
    "stable_diffusion_3": "SD3ControlNetModel",
    "flux": "FluxControlNetModel",
    "sana": "SanaControlNetModel",
    "qwen_image": "QwenImageControlNetModel",
}
"""Pipeline -> class of its ControlNet."""


def save_controlnet(pipeline: Path, folder: Path, **options) -> Path:
    """A ControlNet of the saved pipeline with random weights; its output is not zero."""
    import diffusers

    loaded = diffusers.DiffusionPipeline.from_pretrained(pipeline, local_files_only=True)
    kind = getattr(diffusers, CONTROLNETS[pipeline.name])
    torch.manual_seed(1)
    if "unet" in loaded.components:
        controlnet = kind.from_unet(loaded.unet, **options)
    else:
        known = inspect.signature(kind.__init__).parameters
        config = {k: v for k, v in loaded.transformer.config.items() if k in known}
        controlnet = kind(**config, **options)
    for parameter in controlnet.parameters():
        if not parameter.any():  # the zero convolutions at the start of training
            torch.nn.init.normal_(parameter, std=20.0 if hasattr(loaded, "unet") else 1.0)
    path = folder / f"{pipeline.name}_controlnet"
    controlnet.save_pretrained(path)
    return path
