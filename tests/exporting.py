"""Writes pipelines as the single files that their authors publish: other names, and layers that are kept as one.

The opposite of what diffusers reads, written from the layouts of Stability AI's SDXL checkpoints (ldm, open_clip) and
of Black Forest Labs' FLUX checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def export_sdxl(pipeline: Any, path: Path) -> Path:
    """An SDXL base model, or a refiner where there is no first text encoder."""
    tensors = export_unet(pipeline.unet) | export_vae(pipeline.vae)
    second = "conditioner.embedders.0.model."
    if pipeline.text_encoder is not None:
        second = "conditioner.embedders.1.model."
        tensors |= export_clip(pipeline.text_encoder)
    tensors |= export_open_clip(pipeline.text_encoder_2, second)
    return save(tensors, path)


def save(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def export_unet(unet: Any) -> Tensors:
    per_level, levels = unet.config.layers_per_block, len(unet.config.block_out_channels)
    outer = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    tensors = {}
    for name, tensor in unet.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        found = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", layer)
        if layer in outer:
            theirs = outer[layer]
        elif found:
            side, block, what, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if side == "down":
                number = 1 + block * (per_level + 1) + (per_level if what == "downsamplers" else place)
                theirs = f"input_blocks.{number}." + {"resnets": "0.", "attentions": "1.", "downsamplers": "0.op"}[what]
            else:
                number = block * (per_level + 1) + (per_level if what == "upsamplers" else place)
                attention = "CrossAttn" in unet.config.up_block_types[block]
                after = f"{2 if attention else 1}.conv"
                theirs = f"output_blocks.{number}." + {"resnets": "0.", "attentions": "1.", "upsamplers": after}[what]
            if what in ("resnets", "attentions"):
                theirs += _resnet(rest) if what == "resnets" else rest
        else:
            found = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", layer)
            assert found and levels, layer
            number = 1 if found[1] == "attentions" else 2 * int(found[2])
            theirs = f"middle_block.{number}." + (_resnet(found[3]) if found[1] == "resnets" else found[3])
        tensors[f"model.diffusion_model.{theirs}.{kind}"] = tensor
    return tensors


def _resnet(layer: str) -> str:
    return {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }[layer]


def export_vae(vae: Any) -> Tensors:
    levels = len(vae.config.block_out_channels)
    tensors = {}
    for name, tensor in vae.state_dict().items():
        theirs = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        theirs = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", theirs)
        theirs = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", theirs)
        theirs = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", theirs)
        theirs = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", theirs
        )
        theirs = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", theirs)
        if "mid_block.attentions.0." in theirs:
            theirs = theirs.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
            theirs = theirs.replace("to_out.0", "proj_out").replace("to_", "")
        is_convolution = "mid.attn_1." in theirs and theirs.endswith(".weight") and "norm" not in theirs
        tensors[f"first_stage_model.{theirs}"] = tensor[:, :, None, None] if is_convolution else tensor
    return tensors


def export_clip(encoder: Any) -> Tensors:
    prefix = "conditioner.embedders.0.transformer.text_model."
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def export_open_clip(encoder: Any, prefix: str) -> Tensors:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    outer = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    tensors = {f"{prefix}logit_scale": torch.zeros(1)}
    for name, tensor in state.items():
        found = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if name in outer:
            tensors[prefix + outer[name]] = tensor
        elif name == "text_projection.weight":
            tensors[f"{prefix}text_projection"] = tensor.T
        elif found:
            block, layer, kind = f"{prefix}transformer.resblocks.{found[1]}", found[2], found[3]
            if layer == "self_attn.q_proj":
                parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            elif layer == "self_attn.out_proj":
                tensors[f"{block}.attn.out_proj.{kind}"] = tensor
            elif layer in inner:
                tensors[f"{block}.{inner[layer]}.{kind}"] = tensor
        else:
            assert name.endswith("position_ids"), name
    return tensors


def export_flux(transformer: Any, path: Path, prefix: str = "") -> Path:
    """A FLUX transformer in Black Forest Labs' layout; UIs put ``model.diffusion_model.`` before the names."""
    return save({prefix + name: tensor for name, tensor in rename_flux(transformer).items()}, path)


def rename_flux(transformer: Any) -> Tensors:
    state = transformer.state_dict()
    double = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
    }
    single = {
        "norm.linear": "modulation.lin",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
        "proj_out": "linear2",
    }
    outer = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "proj_out": "final_layer.linear",
    }
    tensors: Tensors = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        found = re.match(r"(single_)?transformer_blocks\.(\d+)\.(.*)", layer)
        if layer in outer:
            tensors[f"{outer[layer]}.{kind}"] = tensor
        elif layer == "norm_out.linear":
            scale, shift = tensor.chunk(2)
            tensors[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        else:
            assert found, name
            block = f"{'single' if found[1] else 'double'}_blocks.{found[2]}"
            ours, table = layer.removesuffix(found[3]), single if found[1] else double

            def fused(*parts: str, ours: str = ours, kind: str = kind) -> torch.Tensor:
                return torch.cat([state[f"{ours}{part}.{kind}"] for part in parts])

            if found[3] in table:
                scale_of_norm = "norm.query" in table[found[3]] or "norm.key" in table[found[3]]
                tensors[f"{block}.{table[found[3]]}.{'scale' if scale_of_norm else kind}"] = tensor
            elif found[3] == "attn.to_q" and found[1]:
                tensors[f"{block}.linear1.{kind}"] = fused("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            elif found[3] == "attn.to_q":
                tensors[f"{block}.img_attn.qkv.{kind}"] = fused("attn.to_q", "attn.to_k", "attn.to_v")
            elif found[3] == "attn.add_q_proj":
                names = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
                tensors[f"{block}.txt_attn.qkv.{kind}"] = fused(*names)
            else:
                assert found[3].rpartition(".")[2] in ("to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp"), name
    return tensors


def scale(tensors: Mapping[str, torch.Tensor], beginning: str, what: str = "scale_weight") -> Tensors:
    """Matrices whose names begin so, in 8 bits with a scale beside each, as ComfyUI's "fp8_scaled" files have them."""
    scaled = {f"{beginning}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        scaled[name] = tensor
        if name.startswith(beginning) and name.endswith(".weight") and tensor.ndim == 2:
            layer, factor = name.removesuffix("weight"), tensor.abs().max() / 448
            scaled |= {name: (tensor / factor).to(torch.float8_e4m3fn), f"{layer}{what}": factor}
            scaled[f"{layer}{'scale_input' if what == 'scale_weight' else 'input_scale'}"] = torch.ones(())
    return scaled


def unscaled(tensors: Mapping[str, torch.Tensor], what: str = "scale_weight") -> Tensors:
    """What such a file stands for."""
    plain = {}
    for name, tensor in tensors.items():
        if not name.endswith((what, "scale_input", "input_scale", "scaled_fp8")):
            factor = tensors.get(f"{name.removesuffix('weight')}{what}")
            plain[name] = tensor if factor is None else tensor.float() * factor
    return plain
