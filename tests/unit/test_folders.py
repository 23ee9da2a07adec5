"""Model folders: which files are taken, and the sentence for each way in which a folder is broken. No torch needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.engine.folders import Kind, read_folder
from app.engine.weights import DEMO_WEIGHTS
from app.errors import ModelLoadFailed

DEMO = DEMO_WEIGHTS / "sdxl"
MODULES = {"text_encoder": "model", "text_encoder_2": "model", "unet": "", "vae": ""}
UNET = "unet/diffusion_pytorch_model.safetensors"


def weights(component: str, variant: str = "") -> str:
    stem = MODULES[component] or "diffusion_pytorch_model"
    return f"{component}/{stem}{variant}.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def change_index(model: Path, **entries: Any) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def complaint(model: Path, **options: Any) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        read_folder(model, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# --- What is taken ---------------------------------------------------------------------------------------------


def test_the_demo_is_an_sdxl_base_model_with_all_its_components() -> None:
    folder = read_folder(DEMO)
    assert folder.kind is Kind.SDXL
    assert folder.options == {"force_zeros_for_empty_prompt": True}
    assert folder.size == sum(path.stat().st_size for path in DEMO.rglob("*.safetensors"))
    assert list(folder.components) == [
        "scheduler",
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
        "unet",
        "vae",
    ]


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_other_pipelines_of_the_same_components_are_base_models_too(model: Path, name: str) -> None:
    change_index(model, _class_name=name)
    assert read_folder(model).kind is Kind.SDXL


def test_a_model_without_its_first_text_encoder_is_a_refiner(model: Path) -> None:
    change_index(
        model,
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )
    shutil.rmtree(model / "text_encoder")
    folder = read_folder(model)
    assert folder.kind is Kind.REFINER
    assert folder.options["requires_aesthetics_score"] is True
    assert "text_encoder" not in folder.components


def test_fp16_files_are_taken_where_every_component_has_them(model: Path) -> None:
    for component in MODULES:
        shutil.copy(model / weights(component), model / weights(component, ".fp16"))
    assert {component.variant for component in read_folder(model).components.values() if component.weights} == {"fp16"}
    full = read_folder(model, full_precision=True)
    assert {component.variant for component in full.components.values()} == {None}


def test_a_mixed_folder_is_read_in_full_precision_but_for_what_has_only_fp16(model: Path) -> None:
    shutil.copy(model / weights("unet"), model / weights("unet", ".fp16"))
    (model / weights("vae")).rename(model / weights("vae", ".fp16"))
    components = read_folder(model).components
    assert [components[name].variant for name in MODULES] == [None, None, None, "fp16"]
    assert components["vae"].weights == (model / weights("vae", ".fp16"),)


def test_shards_are_found_through_their_index(model: Path) -> None:
    shard = model / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    (model / UNET).rename(shard)
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": shard.name, "b": shard.name}})
    )
    assert read_folder(model).components["unet"].weights == (shard,)


def write_weights(path: Path, name: str = "conv_in.weight", dtype: str = "F32") -> None:
    size = {"F32": 4, "I32": 4, "I8": 1, "I64": 8}[dtype]
    header = json.dumps({name: {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_of_shards_beside_a_whole_file_those_are_checked_that_are_read(
    model: Path, component: str, variant: str
) -> None:
    """diffusers reads the shards, transformers the whole file."""
    whole = model / weights(component, variant)
    if variant:
        (model / weights(component)).rename(whole)
    shard = whole.with_name("shard.safetensors")
    index = whole.with_name(f"{Path(weights(component)).name}.index{variant}.json")
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}))
    read, other = (shard, whole) if component == "unet" else (whole, shard)
    write_weights(read)
    other.write_bytes(b"damaged, and read by nobody")
    assert read_folder(model).components[component].weights == (read,)
    cut(read)
    assert complaint(model).startswith(f"{read} is ")


def without_tokenizer_json(model: Path, lines: slice = slice(None)) -> Path:
    """The tokenizers as SDXL 1.0 has them, with so many lines of their merges; the folder of the first."""
    for folder in (model / "tokenizer", model / "tokenizer_2"):
        (folder / "tokenizer.json").unlink()
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        (folder / "merges.txt").write_text("\n".join(merges[lines]), encoding="utf-8")
    return model / "tokenizer"


def test_a_vocabulary_with_all_its_merges_is_whole(model: Path) -> None:
    without_tokenizer_json(model)
    # Neither a byte nor what only marks a place comes of a merge, and lines may end as on Windows.
    vocabulary = json.loads((model / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    vocabulary |= {"<|pad|>": len(vocabulary), "<s1>": len(vocabulary) + 1}
    (model / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    merges = (model / "tokenizer/merges.txt").read_bytes()
    (model / "tokenizer/merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert read_folder(model).kind is Kind.SDXL


@pytest.mark.parametrize(("kept", "lost"), [(0, 109), (1, 109), (5, 105), (109, 1)])
def test_a_vocabulary_that_lacks_merges_is_told(model: Path, kept: int, lost: int) -> None:
    without_tokenizer_json(model, slice(kept))
    assert complaint(model).startswith(
        f"{model / 'tokenizer/merges.txt'} is cut off, or another vocabulary's: it lacks the merges of {lost} tokens"
    )


def test_merges_that_nobody_reads_may_be_anything(model: Path) -> None:
    (model / "tokenizer/merges.txt").write_text("")
    assert read_folder(model).kind is Kind.SDXL


def test_whole_numbers_are_taken_where_the_configuration_knows_of_them_and_where_they_are_no_weights(
    model: Path,
) -> None:
    write_weights(model / weights("text_encoder"), "text_model.embeddings.position_ids", "I64")
    write_weights(model / UNET, dtype="I8")
    config = json.loads((model / "unet/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (model / "unet/config.json").write_text(json.dumps(config))
    assert read_folder(model).components["unet"].weights == (model / UNET,)


def test_weights_that_come_from_elsewhere_need_not_be_there(model: Path) -> None:
    (model / UNET).unlink()
    assert read_folder(model, without_weights={"unet"}).components["unet"].weights == ()


# --- What is broken --------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "cut-weights": (lambda m: cut(m / UNET), UNET, "is cut off: it has"),
    "empty-weights": (lambda m: (m / weights("vae")).write_bytes(b""), weights("vae"), "is empty; download it again"),
    "a-pointer": (lambda m: (m / UNET).write_text("version https://git-lfs.github.com/spec/v1\n"), UNET, "LFS pointer"),
    "a-web-page": (lambda m: (m / UNET).write_text("<!doctype html>"), UNET, "is a web page"),
    "no-weights": (lambda m: (m / UNET).unlink(), UNET, "does not exist; download the whole model"),
    "weights-are-a-folder": (lambda m: replace_by_folder(m / UNET), UNET, "is a folder, where one .safetensors file"),
    "pickled-weights": (
        lambda m: (m / UNET).rename(m / "unet" / "diffusion_pytorch_model.bin"),
        "unet/diffusion_pytorch_model.bin",
        "holds pickled weights, which can run programs when they are read",
    ),
    "no-component": (lambda m: shutil.rmtree(m / "vae"), "vae", "does not exist, but model_index.json names it"),
    "no-config": (lambda m: (m / "vae/config.json").unlink(), "vae/config.json", "does not exist; download the whole"),
    "cut-config": (lambda m: (m / "vae/config.json").write_text('{"a": '), "vae/config.json", "cannot be read: "),
    "config-is-a-list": (lambda m: (m / "vae/config.json").write_text("[]"), "vae/config.json", "it is no JSON object"),
    "no-scheduler": (lambda m: shutil.rmtree(m / "scheduler"), "scheduler", "does not exist, but model_index.json"),
    "no-vocabulary": (
        lambda m: remove(m / "tokenizer/vocab.json", m / "tokenizer/tokenizer.json"),
        "tokenizer",
        "has no vocabulary",
    ),
    "no-tokenizer-config": (
        lambda m: (m / "tokenizer/tokenizer_config.json").unlink(),
        "tokenizer/tokenizer_config.json",
        "does not exist; download the whole",
    ),
    "cut-vocabulary": (
        lambda m: cut(without_tokenizer_json(m) / "vocab.json"),
        "tokenizer/vocab.json",
        "cannot be read: ",
    ),
    "whole-numbers": (
        lambda m: write_weights(m / UNET, dtype="I32"),
        UNET,
        "has conv_in.weight in whole numbers, but its configuration says nothing of quantization",
    ),
    "a-scheduler-of-flux": (
        lambda m: change_index(m, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "model_index.json",
        "as scheduler; served are diffusers' schedulers, but for SDXL none of flow matching",
    ),
    "a-program": (lambda m: (m / "unet" / "attention.py").write_text(""), "unet/attention.py", "is a program"),
    "index-is-no-json": (lambda m: (m / "model_index.json").write_text("{]"), "model_index.json", "cannot be read: "),
    "index-without-vae": (
        lambda m: change_index(m, vae=[None, None]),
        "model_index.json",
        "names no vae, which an SDX",
    ),
    "another-class": (
        lambda m: change_index(m, vae=["diffusers", "AutoencoderTiny"]),
        "model_index.json",
        "names diffusers.AutoencoderTiny as vae; served are AutoencoderKL",
    ),
    "a-class-of-its-own": (
        lambda m: change_index(m, unet=["my_unet", "UNet2DConditionModel"]),
        "model_index.json",
        "names my_unet.UNet2DConditionModel as unet",
    ),
    "a-scheduler-that-is-none": (
        lambda m: change_index(m, scheduler=["diffusers", "AutoencoderKL"]),
        "model_index.json",
        "served are diffusers' schedulers",
    ),
    "stable-diffusion-1": (
        lambda m: change_index(m, _class_name="StableDiffusionPipeline"),
        "model_index.json",
        "names the pipeline StableDiffusionPipeline; served are StableDiffusionXLPipeline, ",
    ),
}


@pytest.mark.parametrize(("damage", "file", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_broken_is_named(model: Path, damage: Callable[[Path], Any], file: str, says: str) -> None:
    damage(model)
    sentence = complaint(model)
    assert sentence.startswith(str(model / file))
    assert says in sentence


@pytest.mark.parametrize(
    ("index", "file", "says"),
    [
        ({"weight_map": {"a": "x.safetensors"}}, "x.safetensors", "does not exist, but diffusion_pytorch_model.safete"),
        ({"weight_map": {"a": "../../x.safetensors"}}, "", "has no weight_map that names files beside it"),
        ({"weight_map": {"a": "x.bin"}}, "", "has no weight_map that names files beside it"),
        ({"weight_map": {}}, "", "has no weight_map that names files beside it"),
        ({"weight_map": [1]}, "", "has no weight_map that names files beside it"),
        ([], "", "cannot be read: it is no JSON object"),
    ],
    ids=["missing-shard", "shard-elsewhere", "pickled-shard", "no-shard", "no-map", "no-object"],
)
def test_a_broken_index_of_shards_is_named(model: Path, index: object, file: str, says: str) -> None:
    (model / UNET).unlink()
    path = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    sentence = complaint(model)
    assert sentence.startswith(str(model / "unet" / file if file else path))
    assert says in sentence


def test_a_folder_that_may_not_be_read_is_told_so(model: Path) -> None:
    (model / "vae").chmod(0)
    # The superuser reads everything: ask as somebody else, in a process that has imported what it needs.
    code = (
        "import os, sys\n"
        "from app.engine.weights import load_family; from app.settings import Settings\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: load_family(Settings(model_id=sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True).stdout
    (model / "vae").chmod(0o755)
    assert said.startswith(f"ModelLoadFailed {model}")
    assert said.endswith(" cannot be read (Permission denied); give the user of this server the right to read it.\n")
    assert said.count("\n") == 1
