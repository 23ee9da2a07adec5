"""Single files, by their headers: what they hold, and which configuration they get."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from app.engine.checkpoints import Checkpoint, read_checkpoint
from app.engine.folders import Kind, read_index
from app.engine.single_files import CONFIGS, SingleFile, detect, read_single_file
from app.engine.weights import DEMO_WEIGHTS
from app.errors import ModelLoadFailed
from tests import exporting
from tests.small_models import load_demo, make_refiner

DEMO = DEMO_WEIGHTS / "sdxl"
FULL_SIZES = {
    # Parameters of the published models.
    "sdxl-base": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "sdxl-refiner": {"unet": 2_259_526_660, "text_encoder_2": 694_659_840, "vae": 83_653_863},
    "flux-dev": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683},
    "flux-schnell": {"transformer": 11_891_178_560, "text_encoder": 123_060_480},
}


def on_meta(config: Path, name: str) -> Any:
    """A component in full size, without its weights."""
    library, class_name = read_index(config)[1][name]
    cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(json.loads((config / name / "config.json").read_text()))
        return cls(cls.config_class.from_pretrained(config / name))


def full_size(config: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a full-size single file, in its authors' own names."""
    folder = CONFIGS / config
    if config.startswith("flux"):
        tensors = exporting.rename_flux(on_meta(folder, "transformer"))
    else:
        tensors = exporting.export_unet(on_meta(folder, "unet")) | exporting.export_vae(on_meta(folder, "vae"))
        second = exporting.export_open_clip
        if config == "sdxl-base":
            tensors |= exporting.export_clip(on_meta(folder, "text_encoder"))
            tensors |= second(on_meta(folder, "text_encoder_2"), "conditioner.embedders.1.model.")
        else:
            tensors |= second(on_meta(folder, "text_encoder_2"), "conditioner.embedders.0.model.")
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("config", "name"), [(c, n) for c, names in FULL_SIZES.items() for n in names])
def test_the_configurations_that_ship_describe_the_published_models(config: str, name: str) -> None:
    module = on_meta(CONFIGS / config, name)
    assert sum(parameter.numel() for parameter in module.parameters()) == FULL_SIZES[config][name]


def write_header(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file with those tensors, of one value each: only the header counts."""
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        # A hole: the file has its full length and takes no place.
        file.truncate(8 + len(header) + place)
    return path


@pytest.mark.parametrize("config", FULL_SIZES)
def test_a_full_size_file_gets_the_configuration_that_ships(tmp_path: Path, config: str) -> None:
    found = read_single_file(write_header(tmp_path / "model.safetensors", full_size(config)), None, "config_dir")
    assert found.config == CONFIGS / config
    assert found.shipped
    assert found.kind is read_index(CONFIGS / config)[0]


def test_an_inpainting_model_gets_the_same_but_for_its_channels(tmp_path: Path) -> None:
    shapes = full_size("sdxl-base") | {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    found = read_single_file(write_header(tmp_path / "model.safetensors", shapes), None, "config_dir")
    assert found.config == CONFIGS / "sdxl-base"
    assert found.overrides == {"in_channels": 9}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"distilled_guidance_layer.in_proj.weight": (5120, 64)}, "is a Chroma model"),
        (
            {"double_stream_modulation_img.lin.weight": (36864, 6144), "img_in.weight": (6144, 128)},
            "is a FLUX.2 model",
        ),
        ({"controlnet_blocks.0.weight": (3072, 3072)}, "is a ControlNet"),
        ({"img_in.weight": (3072, 128)}, "is FLUX.1 Depth or Canny"),
        ({"img_in.weight": (3072, 384)}, "is FLUX.1 Fill"),
        ({"txt_in.weight.quant_state.bitsandbytes__nf4": (80,)}, "is a model in 4 bits of bitsandbytes"),
        ({"txt_in.weight": (3072, 2048), "txt_in.weight_scale": (3072, 256)}, "is a model in NVFP4 or MXFP8"),
    ],
)
def test_what_only_resembles_flux_is_named(
    tmp_path: Path, prefix: str, other: dict[str, tuple[int, ...]], says: str
) -> None:
    shapes = {f"{prefix}{name}": shape for name, shape in (full_size("flux-dev") | other).items()}
    path = write_header(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ModelLoadFailed) as caught:
        read_single_file(path, None, "config_dir")
    assert str(caught.value).startswith(f"{path} {says}")


@pytest.mark.parametrize("shape", [(), (1,), (3072,), (3072, 1)])
def test_a_flux_transformer_may_have_a_scale_for_each_layer_or_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    shapes = full_size("flux-dev") | {"txt_in.weight_scale": shape}
    found = read_single_file(write_header(tmp_path / "model.safetensors", shapes), None, "config_dir")
    assert found.kind is Kind.FLUX


def test_a_flux_transformer_is_known_with_any_prefix_and_in_diffusers_layout(tmp_path: Path) -> None:
    shapes = full_size("flux-dev")
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    own = {name: tuple(t.shape) for name, t in on_meta(CONFIGS / "flux-dev", "transformer").state_dict().items()}
    for names in (prefixed, own):
        found = read_single_file(write_header(tmp_path / "model.safetensors", names), None, "config_dir")
        assert (found.kind, found.config.name) == (Kind.FLUX, "flux-dev")


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_playgrounds_model_and_cosxl_have_sdxls_shapes_and_another_schedule(tmp_path: Path, mark: str) -> None:
    file = write_header(tmp_path / "model.safetensors", full_size("sdxl-base") | {mark: (1,)})
    with pytest.raises(ModelLoadFailed, match=r"of another architecture .* with --config_dir\.$"):
        read_single_file(file, None, "config_dir")
    config = Path(shutil.copytree(CONFIGS / "sdxl-base", tmp_path / "config"))
    with pytest.raises(ModelLoadFailed, match=r"other noise levels than the scheduler in .* with --config_dir\.$"):
        read_single_file(file, config, "config_dir")
    index = json.loads((config / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (config / "model_index.json").write_text(json.dumps(index))
    assert read_single_file(file, config, "config_dir").config == config


def test_a_model_that_edits_pictures_is_named(tmp_path: Path) -> None:
    shapes = full_size("sdxl-base") | {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}
    file = write_header(tmp_path / "model.safetensors", shapes)
    with pytest.raises(ModelLoadFailed, match="edits pictures as InstructPix2Pix and CosXL Edit do"):
        read_single_file(file, None, "config_dir")


# --- Small models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporting.export_sdxl(load_demo(), tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refiner")
    return exporting.export_sdxl(make_refiner(load_demo()), folder / "refiner.safetensors")


def test_a_small_model_needs_a_folder_with_its_configuration(base: Path) -> None:
    with pytest.raises(ModelLoadFailed) as caught:
        read_single_file(base, None, "config_dir")
    assert str(caught.value).startswith(f"{base} holds an SDXL base model of another architecture")
    assert "--config_dir" in str(caught.value)
    assert read_single_file(base, DEMO, "config_dir").config == DEMO


def test_a_folder_nearby_is_taken_where_it_fits_and_passed_over_where_it_does_not(base: Path, tmp_path: Path) -> None:
    assert read_single_file(base, None, "config_dir", (DEMO,)).config == DEMO
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path, CONFIGS / "sdxl-base", CONFIGS / "flux-dev"):
        with pytest.raises(ModelLoadFailed, match="of another architecture"):
            read_single_file(base, None, "config_dir", (folder,))


@pytest.mark.parametrize("content", ['{"block_out_channels": [32', "[]", '{"block_out_channels": 3}', '{"a": 1}'])
def test_a_folder_nearby_that_is_broken_is_passed_over(base: Path, tmp_path: Path, content: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(DEMO, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    assert read_single_file(base, None, "config_dir", (broken,)).config == broken
    (broken / "unet" / "config.json").write_text(content)
    with pytest.raises(ModelLoadFailed, match="of another architecture"):
        read_single_file(base, None, "config_dir", (broken,))


def test_a_first_layer_of_no_such_shape_is_another_architecture(base: Path, tmp_path: Path) -> None:
    tensors = load_file(base)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(7)
    save_file(tensors, tmp_path / "flat.safetensors")
    with pytest.raises(ModelLoadFailed, match="of another architecture"):
        read_single_file(tmp_path / "flat.safetensors", None, "config_dir", (DEMO,))


def test_a_configuration_of_another_kind_is_refused(base: Path, refiner: Path) -> None:
    for file, config, says in (
        (base, CONFIGS / "sdxl-refiner", "holds an SDXL base model, but {} configures an SDXL refiner"),
        (refiner, DEMO, "holds an SDXL refiner, but {} configures an SDXL base model"),
        (base, CONFIGS / "flux-dev", "holds an SDXL base model, but {} configures a FLUX model"),
    ):
        with pytest.raises(ModelLoadFailed) as caught:
            read_single_file(file, config, "config_dir")
        assert str(caught.value) == f"{file} {says.format(config)}."


def test_a_configuration_that_is_no_folder_is_told_so(base: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="is not a folder; --refiner_config_dir names a folder"):
        read_single_file(base, base, "refiner_config_dir")


@pytest.mark.parametrize(
    ("beginning", "says"),
    [
        ("model.diffusion_model.", "without its UNet"),
        ("first_stage_model.", "without its VAE"),
        ("conditioner.embedders.0.", r"without its text encoder \(conditioner\.embedders\.0\.transformer"),
        ("conditioner.embedders.1.", r"without its text encoder \(conditioner\.embedders\.1\.model"),
    ],
)
def test_a_file_without_one_of_its_parts_is_told_which(base: Path, beginning: str, says: str) -> None:
    whole = read_checkpoint(base)
    rest = {name: shape for name, shape in whole.shapes.items() if not name.startswith(beginning)}
    with pytest.raises(ModelLoadFailed, match=f"holds an SDXL base model {says}"):
        detect(Checkpoint(base, rest, whole.size))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_unet_down_blocks_0.lora_up.weight", "is a LoRA adapter; name it with --lora"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "is a LoRA adapter; name it with --lora"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "is a Stable Diffusion 1 or 2 model"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.bias", "is a Stable Diffusion 3 model"),
        ("joint_blocks.0.x_block.attn.proj.bias", "is a Stable Diffusion 3 model"),
        ("control_model.input_blocks.0.0.bias", "is a ControlNet"),
        ("controlnet_cond_embedding.conv_in.bias", "is a ControlNet"),
        ("model.diffusion_model.input_blocks.0.0.bias", "is a UNet alone"),
        ("down_blocks.0.resnets.0.norm1.bias", "is a UNet alone"),
        ("decoder.conv_in.bias", "is a VAE alone"),
        ("text_model.final_layer_norm.bias", "is a text encoder alone"),
        ("something.else", "is neither an SDXL nor a FLUX checkpoint: it has tensors such as 'something.else'"),
    ],
)
def test_what_is_no_model_of_ours_is_named(tmp_path: Path, name: str, says: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(2)}, path)
    with pytest.raises(ModelLoadFailed) as caught:
        read_single_file(path, None, "config_dir")
    assert str(caught.value).startswith(f"{path} {says}")


def test_what_is_read_stays_what_it_was(base: Path) -> None:
    found = read_single_file(base, DEMO, "config_dir")
    assert isinstance(found, SingleFile)
    assert (found.path, found.kind, found.shipped) == (base, Kind.SDXL, False)
