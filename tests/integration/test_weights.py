"""Weights from every source paint what the stock pipeline paints from the folder: every pixel."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from app.engine.converting import load_sdxl_file
from app.engine.folders import read_folder
from app.engine.loading import Format, Progress, load_folder
from app.engine.sdxl import SdxlFamily
from app.engine.single_files import read_single_file
from app.engine.weights import DEMO_WEIGHTS, load_family
from app.errors import ModelLoadFailed
from app.settings import Settings
from tests import exporting
from tests.integration.stock import ours, picture, theirs
from tests.small_models import make_refiner

DEMO = DEMO_WEIGHTS / "sdxl"
UNET = "unet/diffusion_pytorch_model.safetensors"
COMMON: dict[str, Any] = {"prompt": "a blue star on a white background", "num_inference_steps": 3}


def load(report: Callable[[str], None] = lambda _: None, **settings: Any) -> SdxlFamily:
    family = load_family(Settings(**settings), report)
    assert isinstance(family, SdxlFamily)
    return family


def complaint(**settings: Any) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        load_family(Settings(**settings))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


@pytest.fixture(scope="module")
def stock_refiner(stock: StableDiffusionXLPipeline) -> StableDiffusionXLImg2ImgPipeline:
    return make_refiner(stock)


@pytest.fixture(scope="module")
def folders(
    stock: StableDiffusionXLPipeline,
    stock_refiner: StableDiffusionXLImg2ImgPipeline,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A base and a refiner, each as a folder and as a single file."""
    folder = tmp_path_factory.mktemp("models")
    stock.save_pretrained(folder / "base")
    stock_refiner.save_pretrained(folder / "refiner")
    exporting.export_sdxl(stock, folder / "base.safetensors")
    exporting.export_sdxl(stock_refiner, folder / "refiner.safetensors")
    return folder


def single(folders: Path) -> dict[str, Any]:
    return {"single_file_model": folders / "base.safetensors", "config_dir": DEMO}


def single_refiner(folders: Path) -> dict[str, Any]:
    return {
        "use_refiner": True,
        "refiner_single_file_model": folders / "refiner.safetensors",
        "refiner_config_dir": folders / "refiner",
    }


# --- Base models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_a_single_file_paints_as_the_folder_does(stock: StableDiffusionXLPipeline, folders: Path, seed: int) -> None:
    expected = theirs(stock, seed, **COMMON, height=128, width=128)
    assert np.array_equal(ours(load(**single(folders)), seed=seed, **COMMON), expected)


def test_a_single_file_finds_its_configuration_beside_it_and_under_model_id(folders: Path, tmp_path: Path) -> None:
    file = shutil.copy(folders / "base.safetensors", tmp_path)
    beside = shutil.copytree(folders / "base", tmp_path / "whole")
    inside = shutil.copy(file, beside)
    expected = ours(load(model_id=str(folders / "base")), seed=1, **COMMON)
    assert np.array_equal(ours(load(single_file_model=file, model_id=str(beside)), seed=1, **COMMON), expected)
    assert np.array_equal(ours(load(single_file_model=inside), seed=1, **COMMON), expected)


def test_single_files_of_the_demo_are_configured_by_the_demo(folders: Path, tmp_path: Path) -> None:
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(DEMO_WEIGHTS / "refiner", dtype=torch.float32)
    files: dict[str, Any] = {
        "single_file_model": folders / "base.safetensors",
        "refiner_single_file_model": exporting.export_sdxl(refiner, tmp_path / "refiner.safetensors"),
    }
    family, expected = (load(model_id="demo", use_refiner=True, **each) for each in (files, {}))
    for limit in (0.6, 1.0):
        asked = {**COMMON, "seed": 8, "denoising_limit": limit}
        assert np.array_equal(ours(family, **asked), ours(expected, **asked))


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_a_folder_of_another_pipeline_paints_the_same(stock: StableDiffusionXLPipeline, model: Path, name: str) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    expected = theirs(stock, 5, **COMMON, height=128, width=128)
    assert np.array_equal(ours(load(model_id=str(model)), seed=5, **COMMON), expected)


def test_an_inpainting_model_keeps_its_nine_channels_as_folder_and_as_file(
    stock: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    unet = UNet2DConditionModel.from_config({**stock.unet.config, "in_channels": 9})
    pipeline = StableDiffusionXLPipeline(**{**stock.components, "unet": unet})
    pipeline.save_pretrained(tmp_path / "folder")
    file = exporting.export_sdxl(pipeline, tmp_path / "file.safetensors")
    for family in (load(model_id=str(tmp_path / "folder")), load(single_file_model=file, config_dir=DEMO)):
        assert family._base.unet.config.in_channels == 9
        assert torch.equal(family._base.unet.conv_in.weight, unet.conv_in.weight)


def test_a_single_file_that_predicts_velocity_is_painted_so(folders: Path, tmp_path: Path) -> None:
    """UIs know such models, NoobAI's among them, by tensors without content."""
    marked = load_file(folders / "base.safetensors") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(marked, tmp_path / "v.safetensors")
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **options)
    family = load(single_file_model=tmp_path / "v.safetensors", config_dir=DEMO)
    expected = theirs(pipeline, 4, **COMMON, height=128, width=128)
    assert np.array_equal(ours(family, seed=4, **COMMON), expected)


def test_fp16_files_and_shards_are_read(
    stock: StableDiffusionXLPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The demo's numbers have half precision, so that both give the same pictures.
    stock.save_pretrained(tmp_path / "half", variant="fp16")
    stock.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    expected = theirs(stock, 2, **COMMON, height=128, width=128)
    caplog.set_level(logging.INFO)
    assert np.array_equal(ours(load(model_id=str(tmp_path / "half")), seed=2, **COMMON), expected)
    assert "taking the fp16 files, which every component has" in caplog.text
    assert np.array_equal(ours(load(model_id=str(tmp_path / "shards")), seed=2, **COMMON), expected)


def test_of_shards_beside_a_whole_file_those_are_read_that_were_checked(model: Path) -> None:
    for component, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole = load_file(model / component / f"{name}.safetensors")
        shard = {each: tensor + 1 for each, tensor in whole.items()}
        save_file(shard, model / component / "shard.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(shard, "shard.safetensors")}
        (model / component / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    folder = read_folder(model)
    loaded = load_folder(folder, Format(torch.float32), Progress(lambda _: None, 0))
    for component, name in (("unet", "conv_in.bias"), ("text_encoder", "final_layer_norm.bias")):
        (file,) = folder.components[component].weights
        read, checked = loaded[component].state_dict(), load_file(file)
        (inside,) = [each for each in checked if each.endswith(name)]
        assert torch.equal(read[next(each for each in read if each.endswith(name))], checked[inside])


def test_files_that_are_read_side_by_side_are_read_whole(stock: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    """In a process of its own, as diffusers decides when it is imported."""
    stock.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    code = (
        "import sys; from app.engine.weights import load_family; from app.settings import Settings\n"
        "family = load_family(Settings(model_id=sys.argv[1]))\n"
        "from diffusers.utils.constants import HF_ENABLE_PARALLEL_LOADING; assert HF_ENABLE_PARALLEL_LOADING\n"
        "family._pipeline.unet.save_pretrained(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "shards"), str(tmp_path / "read")]
    subprocess.run(command, check=True, capture_output=True)
    read, expected = UNet2DConditionModel.from_pretrained(tmp_path / "read").state_dict(), stock.unet.state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("device", "shrinks"), [(None, False), ("meta", False), ("meta", True), ("cpu", False)])
@pytest.mark.parametrize("source", ["sdxl", "flux", "file"])
def test_weights_are_read_to_the_device_but_for_what_is_made_smaller_first(
    source: str, device: str | None, shrinks: bool, folders: Path
) -> None:
    """With the device that holds nothing in the place of a GPU."""
    numbers = Format(torch.float32, device=None if device is None else torch.device(device), shrinks=shrinks)
    progress = Progress(lambda _: None, 0)
    if source == "file":
        file = read_single_file(folders / "base.safetensors", DEMO, "config_dir")
        loaded = load_sdxl_file(file, numbers, progress, "config_dir")
    else:
        loaded = load_folder(read_folder(DEMO_WEIGHTS / source), numbers, progress)
    modules = {name: part for name, part in loaded.items() if isinstance(part, torch.nn.Module)}
    assert len(modules) == 4
    for name, module in modules.items():
        waits = device is None or (shrinks and name in ("unet", "transformer"))
        tensors = [*module.parameters(), *module.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cpu" if waits else device}, name


@pytest.mark.parametrize("what", ["scale_weight", "weight_scale"])
def test_weights_in_8_bits_are_multiplied_by_the_scales_beside_them(folders: Path, tmp_path: Path, what: str) -> None:
    scaled = exporting.scale(load_file(folders / "base.safetensors"), "model.diffusion_model.", what)
    files = [exporting.save(scaled, tmp_path / "scaled.safetensors")]
    files.append(exporting.save(exporting.unscaled(scaled, what), tmp_path / "plain.safetensors"))
    said: list[str] = []
    pictures = [ours(load(said.append, single_file_model=file, config_dir=DEMO), seed=4, **COMMON) for file in files]
    assert np.array_equal(pictures[0], pictures[1])
    amounts = [re.findall(r"[\d.]+", phrase.partition("(")[2]) for phrase in said if phrase.startswith("reading")]
    assert len(amounts) == 8
    assert all(float(done) < float(total) for done, total in amounts), "it has read more than there is"


def test_full_precision_is_read_where_it_is_asked_for(stock: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path, variant="fp16")
    for file in tmp_path.rglob("*.fp16.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace(".fp16", "")))
    changed = load_file(tmp_path / UNET)
    changed["conv_in.bias"] += 1
    save_file(changed, tmp_path / UNET)
    bias = stock.unet.conv_in.bias
    assert torch.equal(load(model_id=str(tmp_path))._base.unet.conv_in.bias, bias)
    assert torch.equal(load(model_id=str(tmp_path), dtype="float32")._base.unet.conv_in.bias, bias + 1)


# --- Refiners --------------------------------------------------------------------------------------------------


def refiner_of(family: SdxlFamily) -> Any:
    assert family._refiner is not None
    return family._refiner.pipeline


def test_base_and_refiner_paint_the_same_from_folders_and_from_single_files(
    stock: StableDiffusionXLPipeline, stock_refiner: StableDiffusionXLImg2ImgPipeline, folders: Path
) -> None:
    refiner_folder = {"use_refiner": True, "refiner_id": str(folders / "refiner")}
    asked = {**COMMON, "seed": 6, "denoising_limit": 0.5}
    expected = ours(SdxlFamily(stock, stock_refiner), **asked)
    assert not np.array_equal(expected, ours(SdxlFamily(stock), **COMMON, seed=6))
    for base in ({"model_id": str(folders / "base")}, single(folders)):
        for refiner in (refiner_folder, single_refiner(folders)):
            assert np.array_equal(ours(load(**base, **refiner), **asked), expected)


@pytest.mark.parametrize("base_is_file", [False, True])
@pytest.mark.parametrize("refiner_is_file", [False, True])
def test_what_base_and_refiner_have_in_common_is_held_once(
    folders: Path, base_is_file: bool, refiner_is_file: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    base = single(folders) if base_is_file else {"model_id": str(folders / "base")}
    folder = {"use_refiner": True, "refiner_id": str(folders / "refiner")}
    family = load(**base, **(single_refiner(folders) if refiner_is_file else folder))
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        assert getattr(refiner_of(family), name) is getattr(family._pipeline, name)
    assert "the refiner shares text_encoder_2 and tokenizer_2 and vae with the base" in caplog.text


@pytest.mark.parametrize("refiner_id", [None, "demo"])
def test_the_demo_brings_a_refiner_that_shares_what_it_can(refiner_id: str | None) -> None:
    family = load(model_id="demo", use_refiner=True, refiner_id=refiner_id)
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        assert getattr(refiner_of(family), name) is getattr(family._pipeline, name)


def test_what_differs_is_not_shared(folders: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    refiner = Path(shutil.copytree(folders / "refiner", tmp_path / "refiner"))
    file = refiner / "text_encoder_2" / "model.safetensors"
    changed = load_file(file)
    name = next(iter(changed))
    changed[name] = changed[name] + 1e-3
    save_file(changed, file, metadata={"format": "pt"})
    config = json.loads((refiner / "vae" / "config.json").read_text())
    (refiner / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.2}))
    family = load(model_id=str(folders / "base"), use_refiner=True, refiner_id=str(refiner))
    assert refiner_of(family).vae is not family._pipeline.vae
    assert refiner_of(family).vae.config.scaling_factor == 0.2
    assert refiner_of(family).text_encoder_2 is not family._pipeline.text_encoder_2
    assert "the refiner shares tokenizer_2 with the base" in caplog.text


def test_a_refiner_that_is_named_but_not_wanted_is_told(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(model_id="demo", refiner_id=str(folders / "refiner"))._refiner is None
    assert "a refiner is named but not loaded; --use_refiner loads it" in caplog.text


def test_a_folder_of_configurations_without_a_single_file_is_told(caplog: pytest.LogCaptureFixture) -> None:
    load(model_id="demo", config_dir="/nowhere", refiner_config_dir="/nowhere")
    assert [record.message for record in caplog.records if "no effect" in record.message] == [
        "--config_dir has no effect: it is for --single_file_model alone",
        "--refiner_config_dir has no effect: it is for --refiner_single_file_model alone",
    ]


def test_base_and_refiner_in_each_others_place_are_told_apart(folders: Path) -> None:
    base, refiner = str(folders / "base"), str(folders / "refiner")
    assert complaint(model_id=refiner) == (
        f"{refiner} holds an SDXL refiner, which cannot begin a picture; name the base model here and the refiner with "
        "--use_refiner and --refiner_id or --refiner_single_file_model."
    )
    assert "holds an SDXL refiner" in complaint(single_file_model=f"{refiner}.safetensors")
    for wrong in ({"refiner_id": base}, {"refiner_single_file_model": f"{base}.safetensors", "model_id": base}):
        sentence = complaint(**{"model_id": base, "use_refiner": True, "refiner_config_dir": base, **wrong})
        assert "holds an SDXL base model and no refiner; name it with --model_id or --single_file_model" in sentence


def test_use_refiner_without_a_refiner_says_how_to_name_one() -> None:
    assert complaint(model_id=str(DEMO), use_refiner=True) == (
        "--use_refiner needs a refiner; name one with --refiner_id or --refiner_single_file_model."
    )
    gone = complaint(model_id=str(DEMO), use_refiner=True, refiner_id="/nowhere/refiner")
    assert gone.startswith("The refiner folder /nowhere/refiner does not exist; ")


# --- What does not fit -----------------------------------------------------------------------------------------


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def with_more_rows(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name]] * 2)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (UNET, "conv_in.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
        ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
        ("text_encoder_2/model.safetensors", "text_projection.weight"),
    ],
)
def test_a_folder_that_lacks_a_tensor_or_has_another_shape_is_told(model: Path, file: str, name: str) -> None:
    name = name if name in load_file(model / file) else name.removeprefix("text_model.")
    whole = shutil.copy(model / file, model / "whole")
    change_tensors(model / file, lambda tensors: tensors.pop(name))
    sentence = complaint(model_id=str(model))
    assert sentence.startswith(f"{model / file} lacks ")
    assert name.removeprefix("text_model.") in sentence
    shutil.copy(whole, model / file)
    change_tensors(model / file, lambda tensors: with_more_rows(tensors, name))
    sentence = complaint(model_id=str(model))
    assert sentence.startswith(f"{model / file} has ")
    assert name.removeprefix("text_model.") in sentence
    assert "in the shape [" in sentence


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.bias",
        "model.diffusion_model.label_emb.0.2.weight",
        "model.diffusion_model.output_blocks.1.0.in_layers.0.weight",
        "first_stage_model.decoder.mid.attn_1.q.bias",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.bias",
    ],
)
def test_a_single_file_that_lacks_a_tensor_or_has_another_shape_is_told(
    folders: Path, tmp_path: Path, name: str
) -> None:
    file = Path(shutil.copy(folders / "base.safetensors", tmp_path))
    change_tensors(file, lambda tensors: tensors.pop(name))
    missing = complaint(single_file_model=file, config_dir=DEMO)
    assert missing.startswith(str(file))
    assert "lacks " in missing or "is missing" in missing
    shutil.copy(folders / "base.safetensors", tmp_path)
    change_tensors(file, lambda tensors: with_more_rows(tensors, name))
    assert complaint(single_file_model=file, config_dir=DEMO).startswith(f"{file} has ")


def change_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_scheduler_that_the_library_lacks_is_told(model: Path) -> None:
    change_json(model / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    sentence = complaint(model_id=str(model))
    assert sentence.startswith(f"{model / 'model_index.json'} names diffusers.NoSuchScheduler as scheduler, which ")
    assert " does not have; download it again" in sentence


@pytest.mark.parametrize("single_file", [False, True])
def test_a_tokenizer_that_says_more_than_its_text_encoder_reads_is_told(
    model: Path, folders: Path, single_file: bool
) -> None:
    file = {"single_file_model": folders / "base.safetensors", "config_dir": model}
    settings: dict[str, Any] = file if single_file else {"model_id": str(model)}
    change_json(model / "tokenizer_2/tokenizer_config.json", model_max_length=10**30)
    assert complaint(**settings).startswith(
        f"{model / 'tokenizer_2/tokenizer_config.json'} must have a model_max_length of at most 77 tokens"
    )
    vocabulary = json.loads((model / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    (model / "tokenizer/tokenizer.json").unlink()
    moved = {token: number + 1 for token, number in vocabulary.items()}
    (model / "tokenizer/vocab.json").write_text(json.dumps(moved), encoding="utf-8")
    assert complaint(**settings).startswith(
        f"{model / 'tokenizer'} has a token with the number 623, but its text encoder knows those up to 622"
    )


def test_a_single_file_with_a_part_of_a_vocabulary_is_told(model: Path, folders: Path) -> None:
    (model / "tokenizer_2/tokenizer.json").unlink()
    (model / "tokenizer_2/merges.txt").write_text("")
    sentence = complaint(single_file_model=folders / "base.safetensors", config_dir=model)
    assert sentence.startswith(f"{model / 'tokenizer_2/merges.txt'} is cut off, or another vocabulary's")


def test_a_single_file_with_another_models_configuration_is_told(folders: Path, model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    wider = [2 * width for width in config["block_out_channels"]]
    (model / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": wider}))
    sentence = complaint(single_file_model=folders / "base.safetensors", config_dir=model)
    assert sentence.startswith(f"{folders / 'base.safetensors'} has ")
    assert sentence.endswith("take the configuration that belongs to these weights.")


def test_a_type_that_is_not_the_models_is_told(folders: Path) -> None:
    for settings in ({"model_id": str(DEMO)}, single(folders)):
        assert complaint(**settings, model_type="flux").endswith(
            " holds an SDXL base model, but --model_type is flux; leave --model_type out, or name another model."
        )


# --- CLIP's vocabulary -----------------------------------------------------------------------------------------


@pytest.fixture
def without_tokenizers(model: Path) -> Path:
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("tokenizer.json", "vocab.json", "merges.txt"):
            (model / name / file).unlink(missing_ok=True)
    return model


def test_a_file_without_any_vocabulary_says_how_to_provide_one(
    folders: Path, without_tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.clip_vocabulary.PACKAGES", ("a_package_that_nobody_has",))
    file = folders / "base.safetensors"
    assert complaint(single_file_model=file, config_dir=without_tokenizers) == (
        f"{file} comes without CLIP's vocabulary, as every checkpoint does: install the extra 'single-file' (the "
        "package open_clip_torch has it), or name a folder with tokenizers in diffusers' layout with --config_dir."
    )


# --- How loading tells -----------------------------------------------------------------------------------------


def test_loading_tells_what_it_does_and_how_much_is_read(folders: Path) -> None:
    phases: list[str] = []
    load(phases.append, model_id=str(folders / "base"))
    assert phases == [
        "checking files",
        "importing torch",
        "reading text_encoder (0.0 of 16.4 MB)",
        "reading text_encoder_2 (0.8 of 16.4 MB)",
        "reading unet (1.6 of 16.4 MB)",
        "reading vae (12.9 of 16.4 MB)",
    ]


def test_the_picture_of_an_image_to_image_request_is_the_same_from_a_single_file(
    family: SdxlFamily, folders: Path
) -> None:
    asked = {**COMMON, "seed": 3, "image": picture(), "strength": 0.6}
    assert np.array_equal(ours(load(**single(folders)), **asked), ours(family, **asked))
