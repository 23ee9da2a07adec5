"""LoRA adapters on FLUX: per request, as in the stock pipeline, without a trace in the requests after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from app.engine.adapters import Loras, load_adapters
from app.engine.flux import FluxFamily
from app.errors import ModelLoadFailed
from app.generation import GenerateRequest
from tests.integration.stock import ours, theirs
from tests.tiny_flux import make_flux

COMMON: dict[str, Any] = {
    **{"prompt": "a red star", "height": 64, "width": 64},
    **{"num_inference_steps": 3, "max_sequence_length": 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with random weights, one of them with text encoder layers too."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("first", "second")):
        pipeline = make_flux()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        pipeline.transformer.add_adapter(config)
        layers = {"transformer_lora_layers": get_peft_model_state_dict(pipeline.transformer)}
        if name == "second":
            text = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
            pipeline.text_encoder.add_adapter(text)
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(pipeline.text_encoder)
        pipeline.save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers)
    return folder


@pytest.fixture(scope="module")
def with_loras(folder: Path) -> FluxFamily:
    pipeline = make_flux()
    references = (f"first={folder / 'first.safetensors'}", f"second={folder / 'second.safetensors'}:0.5")
    return FluxFamily(pipeline, load_adapters(pipeline, references))


def quiet() -> FluxPipeline:
    pipeline = make_flux()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize(
    ("loras", "names", "scales"),
    [
        ((("first", 1.0),), ["first"], [1.0]),
        ((("second", 0.8),), ["second"], [0.4]),
        ((("second", 1.0), ("first", 0.3)), ["first", "second"], [0.3, 0.5]),
    ],
)
def test_an_adapter_paints_as_in_the_stock_pipeline(
    with_loras: FluxFamily, folder: Path, loras: Loras, names: list[str], scales: list[float]
) -> None:
    stock = quiet()
    for name in names:
        stock.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    stock.set_adapters(names, scales)
    assert np.array_equal(ours(with_loras, seed=2, loras=loras, **COMMON), theirs(stock, 2, **COMMON))


def test_a_request_without_adapters_is_painted_as_if_none_were_loaded(with_loras: FluxFamily) -> None:
    plain = theirs(quiet(), 2, **COMMON)
    assert np.array_equal(ours(with_loras, seed=2, **COMMON), plain)
    changed = ours(with_loras, seed=2, loras=(("second", 2.0),), **COMMON)
    assert np.abs(changed.astype(int) - plain).mean() > 1
    assert np.array_equal(ours(with_loras, seed=2, **COMMON), plain), "an adapter left a trace"


def test_only_jobs_with_the_same_adapters_share_a_pass_and_each_keeps_its_own(with_loras: FluxFamily) -> None:
    choices: list[Loras | None] = [None, (("first", 1.0),), (("first", 0.5),), (("second", 1.0), ("first", 0.5))]
    requests = [
        with_loras.resolve(GenerateRequest(seed=seed, loras=loras, **COMMON)) for seed, loras in enumerate(choices)
    ]
    jobs = [with_loras.begin(request, with_loras.encode(request)) for request in requests]
    assert len({with_loras.signature(job) for job in jobs}) == 4
    while not jobs[0].done:
        for job in jobs:
            with_loras.step([job])
    for seed, (loras, job) in enumerate(zip(choices, jobs, strict=True)):
        assert np.array_equal(with_loras.decode([job])[0], ours(with_loras, seed=seed, loras=loras, **COMMON))


@pytest.mark.parametrize("control", ["x_embedder", "norm"])
def test_a_control_adapter_which_would_change_the_model_itself_is_refused(
    folder: Path, tmp_path: Path, control: str
) -> None:
    pipeline = make_flux()
    tensors, width = load_file(folder / "first.safetensors"), pipeline.transformer.config.in_channels
    if control == "x_embedder":
        out = pipeline.transformer.x_embedder.out_features
        shapes = {"lora_A": (4, 2 * width), "lora_B": (out, 4)}
        tensors |= {f"transformer.x_embedder.{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    else:
        tensors["transformer.transformer_blocks.0.attn.norm_q.weight"] = torch.ones(16)
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(ModelLoadFailed, match=r"control\.safetensors is a Control LoRA .* is not served"):
        load_adapters(pipeline, [f"x={tmp_path / 'control.safetensors'}"])


OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    "double_blocks_0_img_mlp_0": "transformer_blocks.0.ff.net.0.proj",
}


def test_kohyas_layers_around_the_blocks_count_too_each_with_its_own_alpha(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, pipeline = quiet(), make_flux()
    torch.manual_seed(4)
    tensors: dict[str, torch.Tensor] = {}
    for number, (kohya, name) in enumerate(OUTER.items()):
        layer, rank, alpha = expected.transformer.get_submodule(name), 2 + number % 3, 0.5 * (1 + number % 2)
        down, up = 0.3 * torch.randn(rank, layer.in_features), 0.3 * torch.randn(layer.out_features, rank)
        parts = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
        tensors |= {f"lora_unet_{kohya}.{part}": tensor for part, tensor in parts.items()}
        if name == "norm_out.linear":  # its authors have shift before scale, diffusers scale before shift
            up = torch.cat(up.chunk(2)[::-1])
        with torch.no_grad():
            layer.weight += up @ down * alpha / rank
    save_file(tensors, tmp_path / "x.safetensors")
    family = FluxFamily(pipeline, load_adapters(pipeline, [f"x={tmp_path}/x.safetensors"]))
    assert "ignores" not in caplog.text
    picture = ours(family, seed=2, loras=(("x", 1.0),), **COMMON)
    assert np.abs(picture.astype(int) - theirs(expected, 2, **COMMON)).max() <= 2
    assert np.abs(picture.astype(int) - theirs(quiet(), 2, **COMMON)).mean() > 1


def test_layers_without_a_place_in_the_model_are_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """XLabs' adapters have query, key and value in one layer; T5's layers are passed over by diffusers."""
    width = 32
    fused = {
        f"double_blocks.0.processor.qkv_lora{stream}.{way}.weight": torch.ones(shape)
        for stream in (1, 2)
        for way, shape in (("down", (4, width)), ("up", (3 * width, 4)))
    }
    save_file(fused, tmp_path / "fused.safetensors")
    load_adapters(make_flux(), [f"x={tmp_path / 'fused.safetensors'}", f"y={folder / 'second.safetensors'}"])
    assert "ignores" not in caplog.text
    tensors = load_file(folder / "second.safetensors")
    has = len(tensors) // 2
    kohya = {
        f"lora_{layer}.{part}": tensor
        for layer in ("unet_double_blocks_0_img_attn_proj", "te3_encoder_block_0_layer_0_SelfAttention_q")
        for part, tensor in (
            ("lora_down.weight", torch.ones(4, width)),
            ("lora_up.weight", torch.ones(width, 4)),
            ("alpha", torch.tensor(4.0)),
        )
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    load_adapters(make_flux(), [f"z={tmp_path / 'kohya.safetensors'}"])
    assert "takes 1 of the 2 layers that the adapter z has" in caplog.text
    stray = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    tensors |= {f"{stray}.lora_A.weight": torch.ones(4, width), f"{stray}.lora_B.weight": torch.ones(width, 4)}
    save_file(tensors, tmp_path / "t5.safetensors")
    load_adapters(make_flux(), [f"x={tmp_path / 't5.safetensors'}"])
    said = f"the model takes {has} of the {has + 1} layers that the adapter x has, and ignores the others"
    assert said in caplog.text
