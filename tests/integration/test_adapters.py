"""LoRA adapters by name: per request, in company, without a trace in the requests after."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from app.engine.adapters import load_adapters, parse_reference
from app.engine.sdxl import SdxlFamily
from app.engine.weights import DEMO_WEIGHTS, load_family
from app.errors import InvalidRequest, ModelLoadFailed
from app.generation import GenerateRequest
from app.parameters import check_combinations
from app.settings import Settings
from tests.integration.stock import ours, theirs
from tests.small_models import make_refiner

PROMPT = "a red circle on a white background"
COMMON: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3}


def fresh() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(DEMO_WEIGHTS / "sdxl", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters with random weights, one of them with text encoder layers too."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        pipeline = fresh()
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        pipeline.unet.add_adapter(config)
        layers = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet)}
        if name == "second":
            text = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
            pipeline.text_encoder.add_adapter(text)
            layers["text_encoder_lora_layers"] = get_peft_model_state_dict(pipeline.text_encoder)
        pipeline.save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers)
    return folder


@pytest.fixture(scope="module")
def with_loras(folder: Path) -> SdxlFamily:
    pipeline = fresh()
    references = (f"first={folder / 'first.safetensors'}", f"second={folder / 'second.safetensors'}:0.5")
    return SdxlFamily(pipeline, adapters=load_adapters(pipeline, references))


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
    with_loras: SdxlFamily,
    folder: Path,
    loras: tuple[tuple[str, float], ...],
    names: list[str],
    scales: list[float],
) -> None:
    stock = fresh()
    for name in names:
        stock.load_lora_weights(folder, weight_name=f"{name}.safetensors", adapter_name=name)
    stock.set_adapters(names, scales)
    assert np.array_equal(ours(with_loras, seed=2, loras=loras, **COMMON), theirs(stock, 2, **COMMON))


def test_a_request_without_adapters_is_painted_as_if_none_were_loaded(
    with_loras: SdxlFamily, stock: StableDiffusionXLPipeline
) -> None:
    plain = theirs(stock, 2, **COMMON)
    assert np.array_equal(ours(with_loras, seed=2, **COMMON), plain)
    changed = ours(with_loras, seed=2, loras=(("second", 2.0),), **COMMON)
    assert np.abs(changed.astype(int) - plain).mean() > 1
    assert np.array_equal(ours(with_loras, seed=2, **COMMON), plain), "an adapter left a trace"
    assert np.array_equal(ours(with_loras, seed=2, loras=(("first", 0.0),), **COMMON), plain)


def test_only_jobs_with_the_same_adapters_share_a_pass_and_each_keeps_its_own(with_loras: SdxlFamily) -> None:
    choices = [None, (("first", 1.0),), (("first", 0.5),), (("second", 1.0), ("first", 0.5))]
    requests = [
        with_loras.resolve(GenerateRequest(seed=seed, loras=loras, **COMMON)) for seed, loras in enumerate(choices)
    ]
    jobs = [with_loras.begin(request, with_loras.encode(request)) for request in requests]
    assert len({with_loras.signature(job) for job in jobs}) == 4
    while not jobs[0].done:
        for job in jobs:
            with_loras.step([job])
    for seed, (loras, job) in enumerate(zip(choices, jobs, strict=True)):
        alone = ours(with_loras, seed=seed, loras=loras, **COMMON)
        assert np.abs(with_loras.decode([job])[0].astype(int) - alone).max() <= 2


@pytest.mark.parametrize(
    ("loras", "message"),
    [((("frist", 1.0),), "no adapter 'frist' .did you mean 'first'"), ((("magic", 1.0),), "there are first, second")],
)
def test_an_adapter_that_is_not_loaded_is_refused(
    with_loras: SdxlFamily, loras: tuple[tuple[str, float], ...], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        with_loras.resolve(GenerateRequest(prompt=PROMPT, loras=loras))


def test_where_none_is_loaded_the_setting_is_named(family: SdxlFamily) -> None:
    with pytest.raises(InvalidRequest, match=r"take loras; no adapter is loaded \(the server's setting lora\)\."):
        check_combinations(GenerateRequest(prompt=PROMPT, loras=(("first", 1.0),)), family.parameters)
    check_combinations(GenerateRequest(prompt=PROMPT, loras=()), family.parameters)  # none is what there is


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("a=/x/y.safetensors", ("a", Path("/x/y.safetensors"), 1.0)),
        ("a-b_c=y.safetensors:0.5", ("a-b_c", Path("y.safetensors"), 0.5)),
        ("a=y.safetensors:-1", ("a", Path("y.safetensors"), -1.0)),
        ("a=c:/odd.safetensors", ("a", Path("c:/odd.safetensors"), 1.0)),
    ],
)
def test_references_are_read(reference: str, parts: tuple[str, Path, float]) -> None:
    assert parse_reference(reference) == parts


@pytest.mark.parametrize("reference", ["", "path.safetensors", "=x", "a=", "a b=x.safetensors", "a,b=x", "v1.5=x"])
def test_other_references_are_refused(reference: str) -> None:
    with pytest.raises(ModelLoadFailed, match="must be NAME=PATH"):
        parse_reference(reference)


def test_a_folder_that_diffusers_saved_an_adapter_in_is_enough(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "style"
    saved.mkdir()
    with pytest.raises(ModelLoadFailed, match=r"style/pytorch_lora_weights\.safetensors does not exist"):
        load_adapters(fresh(), [f"style={saved}"])
    shutil.copy(folder / "first.safetensors", saved / "pytorch_lora_weights.safetensors")
    adapters = load_adapters(fresh(), [f"style={saved}:0.5"])
    assert adapters is not None
    assert adapters.scales == {"style": 0.5}


def test_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    pipeline = fresh()
    whole = (folder / "first.safetensors").read_bytes()
    cases = {
        "cut.safetensors": (whole[:-10], "is cut off"),
        "page.safetensors": (b"<!DOCTYPE html><html></html>", "is a web page"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        "empty.safetensors": (b"", "is empty"),
        "pickle.bin": (b"\x80\x02", "no .safetensors file"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelLoadFailed, match=message) as caught:
            load_adapters(pipeline, [f"x={tmp_path / name}"])
        assert name in str(caught.value)
    for ending in ("", ".safetensors"):
        with pytest.raises(ModelLoadFailed, match=rf"missing{ending} does not exist"):
            load_adapters(pipeline, [f"x={tmp_path}/missing{ending}"])
        with pytest.raises(ModelLoadFailed, match="cannot be read"):
            load_adapters(pipeline, [f"x={tmp_path}/{'long' * 100}{ending}"])
    vae = DEMO_WEIGHTS / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelLoadFailed, match=r"adapter in .*diffusion_pytorch_model"):
        load_adapters(pipeline, [f"x={vae}"])


def test_what_is_wrong_with_an_adapter_is_told_before_the_model_is_read(folder: Path, tmp_path: Path) -> None:
    good = f"x={folder / 'first.safetensors'}"
    for lora in ((f"x={tmp_path}/missing.safetensors",), (good, good)):
        said: list[str] = []
        with pytest.raises(ModelLoadFailed):
            load_family(Settings(model_id="demo", lora=lora), said.append)
        assert said == ["checking files"]


def add_kohya(pipeline: StableDiffusionXLPipeline, scales: Sequence[tuple[int, float]]) -> dict[str, torch.Tensor]:
    """An adapter as kohya's scripts and OneTrainer write it, for every layer that they know; `pipeline` has it added.

    Args:
        pipeline: whose weights are changed.
        scales: rank and alpha of the layers, in turn.
    """
    torch.manual_seed(4)
    parts = {"unet": pipeline.unet, "te1_text_model": pipeline.text_encoder, "te2_text_model": pipeline.text_encoder_2}
    layers = {
        f"lora_{part}_{path.removeprefix('text_model.').replace('.', '_')}": layer
        for part, module in parts.items()
        for path, layer in module.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and path != "text_projection"
    }
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, layer) in enumerate(layers.items()):
        rank, alpha = scales[number % len(scales)]
        shape = layer.weight.shape
        down = 0.05 * torch.randn(rank, *shape[1:])
        up = 0.05 * torch.randn(shape[0], rank, *([1] * (len(shape) - 2)))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        with torch.no_grad():
            layer.weight += (up.flatten(1) @ down.flatten(1)).reshape(shape) * alpha / rank
    return tensors


@pytest.mark.parametrize("scales", [[(4, 2.0)], [(4, 4.0), (2, 1.0), (8, 16.0)]])
def test_every_layer_counts_with_its_own_rank_and_alpha(
    tmp_path: Path, scales: list[tuple[int, float]], caplog: pytest.LogCaptureFixture
) -> None:
    """These differ in adapters that were extracted from a model or made smaller."""
    expected, pipeline = fresh(), fresh()
    save_file(add_kohya(expected, scales), tmp_path / "x.safetensors")
    family = SdxlFamily(pipeline, adapters=load_adapters(pipeline, [f"x={tmp_path}/x.safetensors"]))
    picture = ours(family, seed=2, loras=(("x", 1.0),), **COMMON)
    assert np.abs(picture.astype(int) - theirs(expected, 2, **COMMON)).max() <= 2
    assert not [record for record in caplog.records if "ignores" in record.message]


def test_layers_without_a_place_in_the_model_are_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_adapters(fresh(), [f"x={folder / 'second.safetensors'}"])
    assert "ignores" not in caplog.text
    tensors = load_file(folder / "second.safetensors")
    has = len(tensors) // 2
    stray = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors |= {f"{stray}.lora_A.weight": torch.ones(4, 64), f"{stray}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    load_adapters(fresh(), [f"x={tmp_path / 'x.safetensors'}"])
    said = f"the model takes {has} of the {has + 1} layers that the adapter x has, and ignores the others"
    assert said in caplog.text


def test_an_adapter_of_the_base_does_not_reach_the_refiner_through_an_encoder_that_both_have(tmp_path: Path) -> None:
    save_file(add_kohya(fresh(), [(4, 4.0)]), tmp_path / "x.safetensors")
    pictures = []
    for shares in (True, False):
        base = fresh()
        refiner = make_refiner(base)
        if not shares:
            refiner.register_modules(text_encoder_2=copy.deepcopy(base.text_encoder_2))
        family = SdxlFamily(base, refiner, load_adapters(base, [f"x={tmp_path}/x.safetensors"]))
        pictures.append(ours(family, seed=2, loras=(("x", 1.0),), denoising_limit=0.5, **COMMON))
    assert np.array_equal(pictures[0], pictures[1])


LAYER = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"], "is a DoRA in the layout of kohya's scripts"),
        (["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"], "is a LoHa of LyCORIS"),
        (["lokr_w1", "lokr_w2", "alpha"], "is a LoKr of LyCORIS"),
        (["oft_blocks", "alpha"], "is an OFT"),
        (["weight", "on_input"], "is an (IA)³ of LyCORIS"),
        (["lora_down.weight", "lora_mid.weight", "lora_up.weight", "alpha"], "is a Tucker decomposition of LyCORIS"),
        (["w_norm", "b_norm"], "is one of LyCORIS that changes norms"),
    ],
)
def test_adapters_that_diffusers_does_not_read_whole_are_refused(tmp_path: Path, parts: list[str], says: str) -> None:
    shapes = {"lora_down.weight": (4, 64), "lora_up.weight": (64, 4), "alpha": ()}
    path = tmp_path / "x.safetensors"
    save_file({f"{LAYER}.{part}": torch.ones(shapes.get(part, (4, 4))) for part in parts}, path)
    with pytest.raises(ModelLoadFailed) as caught:
        load_adapters(fresh(), [f"x={path}"])
    assert str(caught.value).startswith(f"The adapter {path} {says}")


def test_an_adapter_of_another_models_sizes_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    layers = {"lora_down.weight": torch.ones(4, 320), "lora_up.weight": torch.ones(320, 4), "alpha": torch.tensor(4.0)}
    save_file({f"{LAYER}.{part}": tensor for part, tensor in layers.items()}, path)
    with pytest.raises(ModelLoadFailed, match=r"does not fit the model: its layers are of other sizes\.$"):
        load_adapters(fresh(), [f"x={path}"])
