"""FLUX from folders and from transformers alone paints what the stock pipeline paints."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FluxPipeline, FluxTransformer2DModel

from app.engine.flux import FluxFamily
from app.engine.weights import load_family
from app.errors import ModelLoadFailed
from app.settings import Settings
from tests import exporting
from tests.integration.stock import ours
from tests.tiny_flux import make_flux

COMMON: dict[str, Any] = {"prompt": "a blue star", "num_inference_steps": 2, "height": 64, "width": 64}
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def load(**settings: Any) -> FluxFamily:
    family = load_family(Settings(**settings))
    assert isinstance(family, FluxFamily)
    return family


def complaint(**settings: Any) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        load_family(Settings(**settings))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def make(folder: Path, *, dev: bool) -> FluxPipeline:
    pipeline = make_flux(guidance_embeds=dev, use_dynamic_shifting=dev)
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.fixture(scope="module", params=["dev", "schnell"])
def flux(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FluxPipeline, Path]:
    folder = tmp_path_factory.mktemp("flux")
    return make(folder, dev=request.param == "dev"), folder


def test_a_folder_and_every_kind_of_transformer_file_paint_the_same(
    flux: tuple[FluxPipeline, Path], tmp_path: Path
) -> None:
    pipeline, folder = flux
    expected = ours(FluxFamily(pipeline), seed=3, **COMMON)
    assert np.array_equal(ours(load(model_id=str(folder)), seed=3, **COMMON), expected)
    files = [
        exporting.export_flux(pipeline.transformer, tmp_path / "bfl.safetensors"),
        exporting.export_flux(pipeline.transformer, tmp_path / "ui.safetensors", "model.diffusion_model."),
        folder / TRANSFORMER,
    ]
    for file in files:
        family = load(single_file_model=file, model_id=str(folder), model_type="flux")
        assert np.array_equal(ours(family, seed=3, **COMMON), expected), file
        assert np.array_equal(ours(load(single_file_model=file, config_dir=folder), seed=3, **COMMON), expected), file


@pytest.mark.parametrize("what", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_weights_in_8_bits_are_multiplied_by_the_scales_beside_them(
    flux: tuple[FluxPipeline, Path], tmp_path: Path, prefix: str, what: str
) -> None:
    pipeline, folder = flux
    tensors = {f"{prefix}{name}": tensor for name, tensor in exporting.rename_flux(pipeline.transformer).items()}
    scaled = exporting.scale(tensors, prefix, what)
    files = [exporting.save(scaled, tmp_path / "scaled.safetensors")]
    files.append(exporting.save(exporting.unscaled(scaled, what), tmp_path / "plain.safetensors"))
    pictures = [ours(load(single_file_model=file, model_id=str(folder)), seed=3, **COMMON) for file in files]
    assert np.array_equal(pictures[0], pictures[1])


def test_the_folder_needs_no_transformer_where_a_file_has_it(flux: tuple[FluxPipeline, Path], tmp_path: Path) -> None:
    pipeline, folder = flux
    rest = Path(shutil.copytree(folder, tmp_path / "rest"))
    file = Path(shutil.move(rest / TRANSFORMER, tmp_path / "transformer.safetensors"))
    family = load(single_file_model=file, model_id=str(rest))
    assert np.array_equal(ours(family, seed=1, **COMMON), ours(FluxFamily(pipeline), seed=1, **COMMON))


@pytest.mark.parametrize("layout", ["bfl", "ui", "diffusers"])
def test_a_transformer_file_with_fewer_blocks_than_its_configuration_is_read(
    flux: tuple[FluxPipeline, Path], tmp_path: Path, layout: str
) -> None:
    """As FLUX.1 lite has fewer than FLUX.1."""
    pipeline, folder = flux
    config = {**pipeline.transformer.config, "num_single_layers": 1}
    transformer = FluxTransformer2DModel.from_config(config).eval()
    transformer.load_state_dict(pipeline.transformer.state_dict(), strict=False)
    file = tmp_path / "lite.safetensors"
    if layout == "diffusers":
        exporting.save(transformer.state_dict(), file)
    else:
        exporting.export_flux(transformer, file, "model.diffusion_model." if layout == "ui" else "")
    expected = ours(FluxFamily(FluxPipeline(**{**pipeline.components, "transformer": transformer})), seed=3, **COMMON)
    assert np.array_equal(ours(load(single_file_model=file, model_id=str(folder)), seed=3, **COMMON), expected)


def test_a_dev_transformer_among_schnells_components_keeps_devs_schedule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dev, schnell = make(tmp_path / "dev", dev=True), Path(shutil.copytree(tmp_path / "dev", tmp_path / "schnell"))
    make_flux(guidance_embeds=False, use_dynamic_shifting=False).scheduler.save_pretrained(schnell / "scheduler")
    config = json.loads((schnell / "transformer" / "config.json").read_text())
    (schnell / "transformer" / "config.json").write_text(json.dumps(config | {"guidance_embeds": False}))
    family = load(single_file_model=tmp_path / "dev" / TRANSFORMER, model_id=str(schnell))
    assert "taking the scheduler of flux-dev, which such a transformer was trained for" in caplog.text
    assert np.array_equal(ours(family, seed=2, **COMMON), ours(FluxFamily(dev), seed=2, **COMMON))


def test_a_transformer_alone_says_what_else_is_needed(tmp_path: Path) -> None:
    shapes_of_flux_1 = tmp_path / "flux1.safetensors"
    entries = {
        "img_in.weight": [3072, 64],
        "double_blocks.0.img_attn.qkv.weight": [1],
    }
    offset, header = 0, {}
    for name, shape in entries.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    shapes_of_flux_1.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))
    assert complaint(single_file_model=shapes_of_flux_1, model_id="/nowhere/models") == (
        f"{shapes_of_flux_1} holds the transformer of a FLUX model alone; name the folder or the hub's name of the "
        "whole model, which has the text encoders, tokenizers and VAE, with --model_id."
    )


def test_a_type_that_is_not_the_models_is_told(flux: tuple[FluxPipeline, Path]) -> None:
    _, folder = flux
    assert complaint(model_id=str(folder), model_type="sdxl").startswith(
        f"{folder} holds a FLUX model, but --model_type is sdxl"
    )
    assert complaint(model_id=str(folder), use_refiner=True, refiner_id="demo").startswith(
        f"--use_refiner is for SDXL, but {folder} holds a FLUX model"
    )


def test_a_file_that_lacks_a_tensor_or_has_another_shape_is_told(
    flux: tuple[FluxPipeline, Path], tmp_path: Path
) -> None:
    pipeline, folder = flux
    file = tmp_path / "flux.safetensors"
    for name in ("double_blocks.0.txt_attn.qkv.bias", "single_blocks.1.linear1.weight", "final_layer.linear.bias"):
        tensors = exporting.rename_flux(pipeline.transformer)
        removed = tensors.pop(name)
        exporting.save(tensors, file)
        sentence = complaint(single_file_model=file, config_dir=folder)
        assert sentence.startswith(f"{file} lacks ") or f"tensor '{name}' is missing" in sentence
        exporting.save({**tensors, name: removed.repeat_interleave(2, 0)}, file)
        assert complaint(single_file_model=file, config_dir=folder).startswith(f"{file} ")


def test_quantized_storage_paints_almost_the_same(flux: tuple[FluxPipeline, Path]) -> None:
    pipeline, folder = flux
    family = load(model_id=str(folder), quantization="fp8")
    stored = {str(p.dtype) for p in family._transformer.parameters()}
    assert "torch.float8_e4m3fn" in stored
    difference = ours(family, seed=3, **COMMON).astype(int) - ours(FluxFamily(pipeline), seed=3, **COMMON)
    assert 0 < abs(difference).mean() < 10
