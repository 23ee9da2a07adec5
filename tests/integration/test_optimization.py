"""Every level of ``--optimize`` paints the pictures of ``off``, in any company, and compiles nothing once it is warm.

Most of what is compiled here stops before machine code, which takes minutes: shapes, guards and graphs are those of a
GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FluxPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch._inductor.codecache import compiled_fx_graph_hash
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from app.engine.adapters import Adapters
from app.engine.compiled import Compiled, Compiler
from app.engine.family import Family
from app.engine.flux import FluxFamily
from app.engine.fp8 import Fp8Linear, has_fp8, use_fp8, works
from app.engine.merged_adapters import MergedAdapters
from app.engine.optimization import OFF, Optimization, choose_optimization
from app.engine.placement import Placement
from app.engine.sdxl import SdxlFamily
from app.engine.step_cache import plan
from app.engine.vae import Vae
from app.engine.weights import DEMO_WEIGHTS, load_family
from app.errors import InvalidRequest, ModelLoadFailed, OutOfMemory
from app.generation import GenerateRequest
from app.parameters import check_combinations
from app.settings import Settings
from tests.integration.stock import mask, ours, picture, psnr, resolved
from tests.small_models import load_demo, load_smaller, make_refiner
from tests.tiny_flux import make_flux

PROMPT = "a red circle on a white background"
SIZE = ((128, 128),)
LEVELS = {
    "safe": Optimization("safe", SIZE),
    "compile": Optimization("compile", SIZE, backend="eager"),
    "max": Optimization("max", SIZE, most_rows=4, backend="eager"),
}
SDXL_REQUESTS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"scheduler": "DPM++ 2M Karras", "denoising_limit": 0.5},
    {"scheduler": "DDIM", "guidance_rescale": 0.7},
    {"image": picture(), "strength": 0.7},
    {"image": picture(), "mask_image": mask(), "denoising_limit": 0.5},
    {"prompt": "a red circle on a white background and " * 12},
    {"prompt": "a (red:1.3) circle", "negative_prompt": "blue"},
]
FLUX_REQUESTS: list[dict[str, Any]] = [
    {},
    {"true_cfg_scale": 2.0, "negative_prompt": "blue"},
    {"image": picture(), "strength": 0.7},
    {"image": picture(), "mask_image": mask()},
]


def make_sdxl(optimization: Optimization) -> SdxlFamily:
    base = load_demo()
    return SdxlFamily(base, make_refiner(base), optimization=optimization)


def make_flux_family(optimization: Optimization) -> FluxFamily:
    torch.manual_seed(0)
    return FluxFamily(make_flux(guidance_embeds=True, use_dynamic_shifting=True), optimization=optimization)


MODELS: dict[str, tuple[Callable[[Optimization], Family[Any]], list[dict[str, Any]]]] = {
    "sdxl": (make_sdxl, SDXL_REQUESTS),
    "flux": (make_flux_family, FLUX_REQUESTS),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    """What one level had compiled the next one finds compiled, but has to warm all that it runs just the same."""
    torch.compiler.reset()
    name: str = request.param
    return name


def warmed(make: Callable[[Optimization], Family[Any]], optimization: Optimization) -> Family[Any]:
    family = make(optimization)
    family.warm(lambda _: None)
    return family


def graphs() -> int:
    """Compiled by this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


def together(family: Family[Any], requests: list[dict[str, Any]]) -> np.ndarray:
    """All in the same forward passes, as far as they may be: uint8 ``[n, h, w, 3]``."""
    jobs = []
    for each in requests:
        request = resolved(family, **each)
        jobs.append(family.begin(request, family.encode(request)))
    while waiting := [job for job in jobs if not job.done]:
        turn = family.signature(waiting[0])
        family.step([job for job in waiting if family.signature(job) == turn])
    return family.decode(jobs)


def painted(family: Family[Any], request: GenerateRequest) -> tuple[Any, list[int]]:
    """A job that is done, and the rows of each of its steps."""
    job = family.begin(request, family.encode(request))
    rows = []
    while not job.done:
        rows.append(family.rows(job))
        family.step([job])
    return job, rows


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_paints_the_pictures_of_off_and_compiles_nothing_after_warming_up(model: str, level: str) -> None:
    make, requests = MODELS[model]
    off, family = make(OFF), warmed(make, LEVELS[level])
    before = graphs()
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 5, "width": 128, "height": 128}
    for request in requests:
        asked = {**common, **request}
        assert distance(ours(family, **asked), ours(off, **asked)) <= 2, request
    scales = "guidance_scale" if model == "sdxl" else "true_cfg_scale"
    for count in (2, 3):
        many = [{**common, "seed": seed, "negative_prompt": "", scales: 1.0 + seed % 2} for seed in range(count)]
        if model == "sdxl":
            many = [{**each, "denoising_limit": 1.0} for each in many]
        for found, asked in zip(together(family, many), many, strict=True):
            assert distance(found, ours(off, **asked)) <= 2
    assert graphs() == before
    assert family.unexpected_shapes == 0
    # Another size is painted as it would be with nothing compiled, and counted.
    odd = {**common, "width": 96, "height": 64}
    assert distance(ours(family, **odd), ours(off, **odd)) <= 2
    assert (graphs(), family.unexpected_shapes > 0) == (before, level != "safe")


def test_sizes_that_are_declared_are_compiled_and_no_others() -> None:
    torch.compiler.reset()
    sizes = ((64, 64), (128, 64))
    family = warmed(make_flux_family, Optimization("compile", sizes=sizes, backend="eager"))
    before, common = graphs(), {"prompt": PROMPT, "num_inference_steps": 1, "seed": 1}
    for width, height in sizes:
        ours(family, **common, width=width, height=height)
    assert (graphs(), family.unexpected_shapes) == (before, 0)
    ours(family, **common, width=128, height=128)
    assert graphs() == before and family.unexpected_shapes > 0


def test_machine_code_takes_any_number_of_rows_without_compiling_again() -> None:
    torch.compiler.reset()
    compiler = Compiler()
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    run = compiler.compile(layer)
    with torch.inference_mode():
        with compiler.warm():
            for rows in (1, 2, 32):
                run(torch.randn(rows, 4, 16, 16))
        before = graphs()
        # Sixteen rows of sixteen pixels are where a compiler takes one for the other.
        for rows in (1, 2, 3, 16, 5, 32):
            given = torch.randn(rows, 4, 16, 16)
            torch.testing.assert_close(run(given), layer(given), rtol=1e-4, atol=1e-5)
        assert (graphs(), compiler.unexpected) == (before, 0)
        given = torch.randn(2, 4, 8, 8)
        torch.testing.assert_close(run(given), layer(given))
        assert (graphs(), compiler.unexpected) == (before, 1)


def test_a_cache_gives_no_cpu_what_was_compiled_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume may come to a node with narrower vectors, where such code writes beyond its memory."""
    graph = torch.fx.symbolic_trace(nn.Tanh())
    keys = []
    for capability in ("AVX512", "AVX2", "AVX512"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            Compiler()
        keys.append(compiled_fx_graph_hash(graph, [torch.ones(1)], {}, [])[0])
    Compiler()
    assert keys[0] == keys[2] != keys[1]


def test_what_was_compiled_and_asks_for_more_than_the_shape_runs_as_written_and_is_counted() -> None:
    torch.compiler.reset()
    compiler = Compiler("eager")
    run = compiler.compile(lambda rows: rows * 2 if rows.shape[0] < 10 else rows * 3)
    with torch.inference_mode():
        with compiler.warm():
            for rows in (1, 2):
                run(torch.ones(rows, 4))
        before = graphs()
        for count in (1, 2):
            assert torch.equal(run(torch.ones(12, 4)), torch.full((12, 4), 3.0))
            assert (graphs(), compiler.unexpected) == (before, count)
        # Others of that shape stay what they were.
        assert torch.equal(run(torch.ones(3, 4)), torch.full((3, 4), 2.0))
        assert (graphs(), compiler.unexpected) == (before, 2)


@pytest.mark.parametrize(
    ("failing", "factor", "recording", "unexpected"),
    [(1, 3.0, [None], 1), (2, 2.0, [None, None, ()], 0)],
    ids=["in its first run, which compiles", "in its second, which records"],
)
def test_what_memory_was_too_short_for_while_warming_is_not_left_for_a_request_to_record(
    failing: int, factor: float, recording: list[Any], unexpected: int
) -> None:
    compiler = Compiler("eager")
    sizes: list[Any] = []

    def compiled(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(torch._inductor.config.triton.cudagraph_capture_sizes)
        if len(sizes) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return rows * 2

    run = Compiled(compiler, lambda rows: rows * 3, compiled, {}, graphs=True)
    rows = torch.ones(3, 4)
    with torch.inference_mode():
        with compiler.warm(), pytest.raises(torch.OutOfMemoryError):
            for _ in range(failing):
                run(rows)
        assert torch.equal(run(rows), rows * factor)
    assert (sizes, compiler.unexpected) == (recording, unexpected)


@pytest.mark.parametrize(("misses", "counted"), [(1, 0), (2, 0), (1000, 1)])
def test_what_torch_takes_for_unfit_by_chance_is_tried_again(misses: int, counted: int) -> None:
    """As it does where two threads run what was compiled of one function."""
    compiler, calls = Compiler("eager"), 0

    def compiled(rows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if 1 < calls <= 1 + misses:
            raise RuntimeError("Detected recompile when torch.compile stance is 'fail_on_recompile'.")
        return rows * 2

    run = Compiled(compiler, lambda rows: rows * 2, compiled, {}, graphs=False)
    with torch.inference_mode():
        with compiler.warm():
            run(torch.ones(2, 4))
        assert torch.equal(run(torch.ones(2, 4)), torch.full((2, 4), 2.0))
    assert compiler.unexpected == counted


def test_as_many_rows_as_there_are_positions_are_no_other_shape() -> None:
    torch.compiler.reset()
    compiler = Compiler("eager")
    run = compiler.compile(lambda rows, img_ids: rows + img_ids.sum())
    with torch.inference_mode():
        with compiler.warm():
            for rows in (1, 2):
                run(torch.ones(rows, 4), img_ids=torch.ones(16, 3))
        before = graphs()
        for rows in (3, 16):
            assert torch.equal(run(torch.ones(rows, 4), img_ids=torch.ones(16, 3)), torch.full((rows, 4), 49.0))
    assert (graphs(), compiler.unexpected) == (before, 0)


def test_graphs_are_recorded_while_warming_and_for_no_length_that_comes_later() -> None:
    torch.compiler.reset()
    compiler, sizes = Compiler(), []

    @torch.compiler.disable
    def look(rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        sizes.append(torch._inductor.config.triton.cudagraph_capture_sizes)
        return rows + words.sum()

    run = Compiled(compiler, look, look, {"words": 1}, graphs=True)
    with torch.inference_mode():
        with compiler.warm():
            run(torch.ones(2, 4), words=torch.ones(2, 77))
        for length in (77, 154, 77):
            run(torch.ones(2, 4), words=torch.ones(2, length))
    assert compiler.unexpected == 0
    everything: tuple[int, ...] | None = None
    nothing: tuple[int, ...] = ()
    assert sizes == [everything, everything, nothing, everything]


def test_every_thread_has_graphs_of_its_own() -> None:
    def record() -> Any:
        compiler = Compiler("eager")
        compiler.compile(lambda rows: rows, graphs=True)
        with compiler.warm():
            return torch._inductor.cudagraph_trees.get_container(0)

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert one.submit(record).result() is not other.submit(record).result()


def test_attention_has_plans_in_what_is_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(optimization: Optimization, compiler: Compiler | None) -> SDPBackend | None:
        with optimization.attention(torch.device("cuda"), compiler):
            return _cur_sdpa_kernel_backends(with_priority=True)[0]

    gpu = Placement(torch.device("cuda"), torch.float16, None, "none")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    for capability, planned in (((9, 0), SDPBackend.CUDNN_ATTENTION), ((8, 9), SDPBackend.FLASH_ATTENTION)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        chosen = choose_optimization(Settings(optimize="compile", max_batch_size=4), gpu)
        compiler = Compiler("eager")
        assert first(chosen, None) is first(chosen, compiler) is SDPBackend.FLASH_ATTENTION
        with compiler.warm():
            assert first(chosen, compiler) is planned
        every = planned is SDPBackend.CUDNN_ATTENTION
        assert chosen.row_counts(64 * 64, graphs=False) == ((1, 2, 4, 3) if every else (1, 2, 4))
    assert first(choose_optimization(Settings(), gpu), None) is SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91400)
    assert not choose_optimization(Settings(optimize="compile"), gpu).plans, "wrong for some lengths"


def test_threads_do_not_disturb_each_others_order_of_attention() -> None:
    def order() -> list[SDPBackend]:
        return list(_cur_sdpa_kernel_backends(with_priority=True))

    before, seen, gpu = order(), [], torch.device("cuda")
    inside, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with Optimization("safe").attention(gpu):
            inside.set()
            go_on.wait(10)
            seen.append(order()[0])

    def second() -> None:
        with Optimization("safe").attention(gpu):
            go_on.set()
            one.join(0.2)
            seen.append(order()[0])

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    inside.wait(10)
    two.start()
    two.join(0.2)
    go_on.set()
    one.join()
    two.join()
    assert seen == [SDPBackend.FLASH_ATTENTION] * 2
    assert order() == before


def test_several_gpus_are_at_their_passes_at_the_same_time_and_what_is_compiled_has_its_own_order() -> None:
    gpu, both = torch.device("cuda"), threading.Barrier(2)
    compiler = Compiler("eager")

    def at_a_pass() -> None:
        with Optimization("safe").attention(gpu):
            both.wait(10)

    def compiling() -> SDPBackend:
        with Optimization("compile", plans=True).attention(gpu, compiler):
            return next(iter(_cur_sdpa_kernel_backends(with_priority=True)))

    with ThreadPoolExecutor(2) as pool:
        for passed in [pool.submit(at_a_pass) for _ in range(2)]:
            passed.result(20)
        with compiler.warm():
            with Optimization("safe").attention(gpu):
                waiting = pool.submit(compiling)
                with pytest.raises(TimeoutError):
                    waiting.result(0.2)
                assert next(iter(_cur_sdpa_kernel_backends(with_priority=True))) is SDPBackend.FLASH_ATTENTION
            assert waiting.result(10) is SDPBackend.CUDNN_ATTENTION


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("plans", [False, True])
def test_attention_that_makes_plans_has_met_long_prompts(plans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimization = Optimization("compile", ((64, 64),), most_rows=2, plans=plans, backend="eager")
    family = SdxlFamily(load_demo(), optimization=optimization)
    begin, met = family.begin, set()

    def noting(*given: Any) -> Any:
        job = begin(*given)
        met.add(job.leg.embeddings.shape[1])
        return job

    monkeypatch.setattr(family, "begin", noting)
    family.warm(lambda _: None)
    assert met == ({77, 154} if plans else {77})


LATENTS = torch.linspace(-1, 1, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


def compiled_vae(pipeline: StableDiffusionXLPipeline, encodes_in_full: bool = False) -> tuple[Vae, Compiler]:
    """Warmed for one picture and for several."""
    torch.compiler.reset()
    compiler = Compiler("eager")
    vae = Vae(pipeline.vae, pipeline.image_processor, compiler, encodes_in_full)
    with torch.inference_mode(), compiler.warm():
        for rows in (1, 2):
            vae.decode(LATENTS[:rows])
    return vae, compiler


def test_slices_of_the_vae_go_with_what_is_compiled() -> None:
    pipeline = load_demo()
    vae, compiler = compiled_vae(pipeline)
    pipeline.vae.enable_slicing()
    found = vae.decode(LATENTS)
    assert compiler.unexpected == 0
    pipeline.vae.disable_slicing()
    assert distance(found, vae.decode(LATENTS)) <= 2


@pytest.mark.usefixtures("untraced")
def test_a_refiner_is_warmed_however_steps_are_spaced() -> None:
    optimization = Optimization("compile", ((64, 64),), most_rows=2)
    for spacing in ("leading", "trailing", "linspace"):
        base = load_smaller()
        refiner = make_refiner(base)
        for pipeline in (base, refiner):
            pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        family = SdxlFamily(base, refiner, optimization=optimization)
        family.warm(lambda _: None)
        ours(family, prompt=PROMPT, num_inference_steps=10, seed=5, width=64, height=64)
        assert family.unexpected_shapes == 0, spacing


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_picture_that_is_encoded_in_full_leaves_what_was_compiled_fit() -> None:
    vae, compiler = compiled_vae(load_demo().to(torch.bfloat16), encodes_in_full=True)
    before, generator = graphs(), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(2):
            latents = vae.encode(torch.zeros(1, 3, 64, 64), generator, torch.device("cpu"), torch.bfloat16)
            vae.decode(latents)
    assert (graphs(), compiler.unexpected) == (before, 0)


def test_errors_of_what_was_compiled_are_told_as_they_are() -> None:
    torch.compiler.reset()
    compiler, full = Compiler(), False

    @torch.compiler.disable
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if full:
            raise torch.OutOfMemoryError("out of memory")
        return tensor

    run = Compiled(compiler, fill, fill, {}, graphs=False)
    with compiler.warm():
        run(torch.ones(1))
    full = True
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(1))
    assert compiler.unexpected == 0


def test_replicas_that_start_at_once_compile_one_after_the_other_and_nothing_later() -> None:
    torch.compiler.reset()
    optimization = Optimization("compile", sizes=((64, 64),), most_rows=2, backend="eager")
    families = [make_flux_family(optimization) for _ in range(2)]
    failures: list[BaseException] = []
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 5, "width": 64, "height": 64}

    def start(family: FluxFamily) -> None:
        try:
            family.warm(lambda _: None)
            for width in (64, 128):
                ours(family, **{**asked, "width": width})
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=start, args=(family,)) for family in families]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counted, before = [family.unexpected_shapes for family in families], graphs()
    assert counted[0] == counted[1] > 0, "the larger size, and no other"
    for family in families:
        assert distance(ours(family, **asked), ours(make_flux_family(OFF), **asked)) <= 2
    assert ([family.unexpected_shapes for family in families], graphs()) == (counted, before)


@pytest.mark.parametrize(
    ("fit", "plans", "refused"),
    [(0, False, ()), (1, True, (2,)), (2, False, (4,)), (2, True, (4, 3)), (3, True, (4,))],
)
def test_as_many_rows_are_warmed_as_the_device_holds(
    fit: int, plans: bool, refused: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    # Not compiled anew for each: what a family was warmed for is its own, whoever had it compiled.
    family = make_flux_family(Optimization("compile", ((64, 64),), most_rows=4, plans=plans, backend="eager"))
    step, warmed_for = family.step, set()

    def full(jobs: Sequence[Any]) -> None:
        if len(jobs) > fit:
            raise OutOfMemory("The device has too little memory for this request.")
        warmed_for.add(len(jobs))
        step(jobs)

    family.step = full  # type: ignore[method-assign]
    if not fit:
        with pytest.raises(OutOfMemory):
            family.warm(lambda _: None)
        return
    with caplog.at_level(logging.WARNING):
        family.warm(lambda _: None)
    assert caplog.messages == [
        f"the device has too little memory for 64 x 64 pixels, {rows} rows: passes will have fewer" for rows in refused
    ]
    assert warmed_for == set(range(1, fit + 1))
    ours(family, prompt=PROMPT, num_inference_steps=2, seed=5, width=64, height=64)
    assert family.unexpected_shapes == 0


def test_what_cannot_be_compiled_is_told_in_one_sentence() -> None:
    torch.compiler.reset()
    compiler = Compiler()
    run = compiler.compile(lambda tensor: tensor * tensor.sum().item().as_integer_ratio()[0])
    sentence = r"^The model cannot be compiled here \(.+\); take --optimize safe or off\.$"
    with pytest.raises(ModelLoadFailed, match=sentence), torch.inference_mode(), compiler.warm():
        run(torch.ones(2))


# --- Adapters --------------------------------------------------------------------------------------------------


def with_adapters(kind: type[Adapters], optimization: Optimization) -> SdxlFamily:
    pipeline: Any = load_smaller()
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        layers = ["to_q", "to_v", "conv1"] if name == "first" else ["to_q", "to_out.0"]
        pipeline.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=layers), adapter_name=name)
    pipeline.text_encoder.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]), adapter_name="second"
    )
    pipeline.disable_lora()
    return SdxlFamily(pipeline, adapters=kind(pipeline, {"first": 1.0, "second": 0.5}), optimization=optimization)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_are_swapped_under_what_is_compiled_and_leave_no_trace() -> None:
    beside, plain = with_adapters(Adapters, OFF), SdxlFamily(load_smaller())
    torch.compiler.reset()
    family = with_adapters(MergedAdapters, Optimization("compile", ((64, 64),), most_rows=2, backend="eager"))
    family.warm(lambda _: None)
    before = graphs()
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 5, "width": 64, "height": 64}
    sets = [(("first", 0.7),), (("first", 1.0), ("second", 0.6)), (), (("second", 1.0),), ()]
    for loras in sets:
        found = ours(family, **asked, loras=loras or None)
        expected = ours(beside, **asked, loras=loras) if loras else ours(plain, **asked)
        assert distance(found, expected) <= 2, loras
    assert (graphs(), family.unexpected_shapes) == (before, 0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_where_memory_ends_while_an_adapter_is_added_nobody_else_is_painted_with_it() -> None:
    family = with_adapters(MergedAdapters, OFF)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 5}
    before = ours(family, **asked)
    request = family.resolve(GenerateRequest(**asked, loras=(("first", 1.0),)))
    with pytest.MonkeyPatch.context() as patch:
        real, added = LoraLinear.get_delta_weight, itertools.count(1)

        def short_of_memory(layer: Any, adapter: str) -> torch.Tensor:
            if next(added) % 4 == 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(layer, adapter)

        patch.setattr(LoraLinear, "get_delta_weight", short_of_memory)
        for _ in range(2):
            with pytest.raises(OutOfMemory):
                family.encode(request)
    assert np.array_equal(ours(family, **asked), before)


def test_an_adapter_of_another_kind_is_told_in_one_sentence() -> None:
    pipeline: Any = load_demo()
    pipeline.unet.add_adapter(LoraConfig(r=2, use_dora=True, target_modules=["to_q"]), adapter_name="dora")
    with pytest.raises(ModelLoadFailed, match="is a DoRA"):
        MergedAdapters(pipeline, {"dora": 1.0})
    pipeline = load_demo()
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_bias=True, target_modules=["to_out.0"]), adapter_name="biased")
    with pytest.raises(ModelLoadFailed, match="has biases"):
        MergedAdapters(pipeline, {"biased": 1.0})


# --- What costs a little of the picture ------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "least"), [("sdxl", 28.0), ("flux", 28.0)])
def test_eight_bit_products_change_pictures_a_little_and_are_named(model: str, least: float) -> None:
    demo: Any = DEMO_WEIGHTS / model
    kind: Any = StableDiffusionXLPipeline if model == "sdxl" else FluxPipeline
    family_kind: Any = SdxlFamily if model == "sdxl" else FluxFamily
    off = family_kind(kind.from_pretrained(demo, dtype=torch.float32))
    family = family_kind(kind.from_pretrained(demo, dtype=torch.float32), optimization=Optimization("safe", fp8=True))
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 8, "seed": 5}
    found = psnr(ours(family, **asked), ours(off, **asked))
    assert least <= found < 60
    assert family.lossy(family.resolve(GenerateRequest(**asked))) == ("fp8",)
    assert off.lossy(off.resolve(GenerateRequest(**asked))) == ()


def test_eight_bit_layers_are_near_those_in_full_and_take_what_is_large() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    given = torch.randn(2, 7, 64) * torch.logspace(-3, 3, 7)[None, :, None]
    found, expected = Fp8Linear(linear)(given), linear(given)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.06, "each row has a scale of its own"
    unet = load_demo().unet
    count = use_fp8(unet)
    layers = dict(unet.named_modules())
    assert count == sum(isinstance(layer, Fp8Linear) for layer in layers.values()) > 20
    assert isinstance(layers["time_embedding.linear_1"], nn.Linear)
    kinds = {name.partition("attn")[2]: type(layer) for name, layer in layers.items() if "attn" in name}
    assert kinds["2.to_q"] is kinds["1.to_k"] is Fp8Linear and kinds["2.to_k"] is kinds["2.to_v"] is nn.Linear


def test_eight_bit_products_get_rows_as_a_gpu_wants_them_however_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch._scaled_mm

    def strict(rows: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        # Source: torch's meta_scaled_mm, which asks this of every device but a CPU.
        assert rows.stride(0) > rows.stride(1) == 1 and weight.stride(1) > weight.stride(0) == 1
        return product(rows, weight, **options)

    monkeypatch.setattr(torch, "_scaled_mm", strict)
    layer = Fp8Linear(nn.Linear(64, 32))
    # As a GPU's norm gives it to UNets, which take the channels for features: a view where it is one picture.
    for pictures in (1, 2):
        pixels = torch.randn(pictures, 64, 8, 8).permute(0, 2, 3, 1).reshape(pictures, 64, 64)
        assert torch.equal(layer(pixels), layer(pixels.contiguous()))


def test_eight_bit_products_are_tried_before_they_are_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    assert works(cpu) and not has_fp8(cpu)
    product = torch._scaled_mm

    def missing(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("Rowwise scaling is not currently supported on your device.\nException raised from ...")

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return product(*arguments, **options) * float("nan")

    for broken, complaint in ((missing, "(Rowwise scaling is not currently supported on your device)"), (wrong, "nan")):
        monkeypatch.setattr(torch, "_scaled_mm", broken)
        with caplog.at_level(logging.WARNING):
            assert not works(cpu)
        assert complaint in caplog.messages.pop()


def test_guidance_of_sdxl_ends_early_only_where_the_server_allows_it() -> None:
    base = load_demo()
    off, family = SdxlFamily(base), SdxlFamily(base, optimization=LEVELS["max"])
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "seed": 5}
    with pytest.raises(InvalidRequest, match="does not take guidance_end; it does where"):
        check_combinations(GenerateRequest(**asked, guidance_end=0.5), off.parameters)
    check_combinations(GenerateRequest(**asked, guidance_end=0.5), family.parameters)
    request = family.resolve(GenerateRequest(**asked, guidance_end=0.5))
    assert family.lossy(request) == ("guidance_end",)
    job, rows = painted(family, request)
    assert rows == [2] * 5 + [1] * 5
    full = ours(off, **asked)
    assert np.array_equal(ours(off, **asked, guidance_end=1.0), full)
    assert np.array_equal(ours(off, **asked, guidance_end=0.0), ours(off, **asked, guidance_scale=1.0))
    assert 20 < psnr(family.decode([job])[0], full) < 60


def test_guidance_of_sdxl_ends_early_in_company_too() -> None:
    family = SdxlFamily(load_demo(), optimization=Optimization("max", backend="eager"))
    many = [
        {"prompt": PROMPT, "num_inference_steps": 4, "seed": seed, "guidance_end": end}
        for seed, end in enumerate((0.25, None, 0.5, 0.0))
    ]
    for found, asked in zip(together(family, many), many, strict=True):
        assert distance(found, ours(family, **asked)) <= 2


def flux_demo(**options: Any) -> FluxFamily:
    return FluxFamily(
        FluxPipeline.from_pretrained(DEMO_WEIGHTS / "flux", dtype=torch.float32), optimization=Optimization(**options)
    )


def test_guidance_of_flux_ends_early_only_where_the_server_allows_it() -> None:
    off, family = flux_demo(), flux_demo(level="max", backend="eager")
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "seed": 5}
    asked = {**common, "true_cfg_scale": 2.0, "negative_prompt": "blue"}
    with pytest.raises(InvalidRequest, match="does not take guidance_end; it does where"):
        check_combinations(GenerateRequest(**asked, guidance_end=0.5), off.parameters)
    check_combinations(GenerateRequest(**asked, guidance_end=0.5), family.parameters)
    request = family.resolve(GenerateRequest(**asked, guidance_end=0.5))
    assert family.lossy(request) == ("guidance_end",) and family.warnings(request) == ()
    job, rows = painted(family, request)
    assert rows == [2] * 5 + [1] * 5
    full = ours(off, **asked)
    assert np.array_equal(ours(off, **asked, guidance_end=1.0), full)
    for whole in (0.96, 1.0):
        assert family.lossy(family.resolve(GenerateRequest(**asked, guidance_end=whole))) == ()
    assert np.array_equal(ours(off, **asked, guidance_end=0.0), ours(off, **common))
    assert 20 < psnr(family.decode([job])[0], full) < 60


@pytest.mark.parametrize("model", MODELS)
def test_where_nothing_guides_there_is_no_guidance_to_end(model: str) -> None:
    make, _ = MODELS[model]
    family = make(LEVELS["max"])
    # What FLUX's guidance_scale does is an input of the model, and does not end.
    scales: dict[str, Any] = (
        {"guidance_scale": 1.0} if model == "sdxl" else {"guidance_scale": 4.0, "true_cfg_scale": 2.0}
    )
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 5, "width": 128, "height": 128}
    request = family.resolve(GenerateRequest(**asked, **scales, guidance_end=0.5))
    assert family.lossy(request) == ()
    sentences = family.warnings(dataclasses.replace(request, guidance_end=None))
    assert family.warnings(dataclasses.replace(request, guidance_end=1.0)) == sentences
    assert [each[:40] for each in family.warnings(request) if each not in sentences] == [
        "guidance_end has no effect without " + ("guida" if model == "sdxl" else "a tru")
    ]
    assert np.array_equal(ours(family, **asked, **scales, guidance_end=0.5), ours(family, **asked, **scales))


@pytest.mark.parametrize("step_cache", [1, 3])
def test_guidance_of_flux_ends_early_in_company_too(step_cache: int) -> None:
    family = flux_demo(level="max", backend="eager", step_cache=step_cache)
    guided = {"num_inference_steps": 9, "true_cfg_scale": 2.0, "negative_prompt": "blue"}
    many: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1, **guided, "guidance_end": 0.25},
        {"prompt": PROMPT, "seed": 2, **guided},
        {"prompt": "blue", "seed": 3, **guided, "guidance_end": 0.5, "negative_prompt": ""},
        {"prompt": PROMPT, "seed": 4, **guided, "guidance_end": 0.0},
        {"prompt": PROMPT, "seed": 5, "num_inference_steps": 9, "guidance_end": 0.5},
    ]
    for found, asked in zip(together(family, many), many, strict=True):
        assert distance(found, ours(family, **asked)) <= 2


@pytest.mark.parametrize(
    ("every", "steps", "whole", "least"), [(2, 12, 8, 40.0), (2, 20, 13, 45.0), (3, 20, 10, 36.0), (4, 28, 13, 34.0)]
)
def test_steps_without_blocks_change_pictures_a_little_and_are_named(
    every: int, steps: int, whole: int, least: float
) -> None:
    off, family = flux_demo(), flux_demo(step_cache=every)
    passes = []
    family._transformer.transformer_blocks[0].register_forward_hook(lambda *_: passes.append(1))
    asked: dict[str, Any] = {"prompt": "a small blue star on a yellow background", "num_inference_steps": steps}
    found, expected = ours(family, **asked, seed=5), ours(off, **asked, seed=5)
    assert len(passes) == whole
    assert least <= psnr(found, expected) < 80
    assert family.lossy(family.resolve(GenerateRequest(**asked))) == (f"step_cache {every}",)
    assert off.lossy(off.resolve(GenerateRequest(**asked))) == ()


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_short_runs_leave_no_step_out(steps: int) -> None:
    off, family = flux_demo(), flux_demo(step_cache=4)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": steps, "seed": 5}
    assert np.array_equal(ours(family, **asked), ours(off, **asked))
    assert family.lossy(family.resolve(GenerateRequest(**asked))) == ()


def test_steps_without_blocks_are_planned_where_a_timestep_comes_twice() -> None:
    twice = [1000, 900, 900, 800, 800, 700, 700, 600, 600, 500, 500, 400]
    reach = plan(twice, 3)
    assert reach == (None, None, None, 0.0, 0.0, None, 0.0, 0.5, None, 1.0, 1.0, None)


def test_steps_without_blocks_do_not_depend_on_company() -> None:
    torch.manual_seed(0)
    pipeline = make_flux(guidance_embeds=True, use_dynamic_shifting=True)
    family = FluxFamily(pipeline, optimization=Optimization(step_cache=3))
    many: list[dict[str, Any]] = [
        {"prompt": PROMPT, "num_inference_steps": 8, "seed": 1},
        {"prompt": "blue", "num_inference_steps": 13, "seed": 2, "guidance_scale": 1.5},
        {"prompt": PROMPT, "num_inference_steps": 4, "seed": 3},
        {"prompt": PROMPT, "num_inference_steps": 9, "seed": 4, "true_cfg_scale": 2.0, "negative_prompt": "blue"},
        {"prompt": PROMPT, "num_inference_steps": 8, "seed": 5, "scheduler": "Heun"},
        {"prompt": PROMPT, "num_inference_steps": 12, "seed": 6, "image": picture(), "strength": 0.7},
        {"prompt": PROMPT, "num_inference_steps": 10, "seed": 7, "image": picture(), "mask_image": mask()},
    ]
    many = [{"height": 128, "width": 128, **asked} for asked in many]
    for found, asked in zip(together(family, many), many, strict=True):
        assert distance(found, ours(family, **asked)) <= 2


def test_a_step_that_is_tried_again_remembers_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    family = flux_demo(step_cache=2)
    asked: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 9, "seed": 5}
    request = family.resolve(GenerateRequest(**asked))
    job, failures = family.begin(request, family.encode(request)), 0
    advance = FluxFamily._advance
    while not job.done:
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory):
            patch.setattr(FluxFamily, "_advance", staticmethod(full))
            family.step([job])
        failures += 1
        assert FluxFamily._advance is advance
        family.step([job])
    assert failures == 9
    assert np.array_equal(family.decode([job])[0], ours(family, **asked))


def full(*_: Any) -> None:
    raise OutOfMemory("There is no room.")


# --- Settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "offload", "complaint"),
    [
        ({"optimize": "compile"}, "enable_model_cpu_offload", "needs all weights on the device"),
        ({"optimize": "max", "quantization": "fp8"}, None, "does not go with --quantization fp8"),
        ({"step_cache": 2}, "enable_sequential_cpu_offload", "needs all weights on the device"),
    ],
)
def test_levels_that_contradict_other_settings_are_told(
    flags: dict[str, Any], offload: str | None, complaint: str
) -> None:
    settings = Settings(**flags)
    placement = Placement(torch.device("cpu"), torch.float32, offload, settings.quantization)
    with pytest.raises(ModelLoadFailed, match=complaint):
        choose_optimization(settings, placement)


def test_leaving_blocks_out_is_for_flux() -> None:
    with pytest.raises(ModelLoadFailed, match="step_cache is for FLUX alone"):
        load_family(Settings(model_id="demo", step_cache=2))


@pytest.mark.parametrize("setting", ["vae_tiling", "vae_slicing"])
def test_a_decoder_that_is_not_compiled_is_told_at_the_start(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    cpu = Placement(torch.device("cpu"), torch.float32, None, "none")
    for level, count in (("safe", 0), ("compile", 1)):
        choose_optimization(Settings(optimize=level, **{setting: True}), cpu)
        assert caplog.text.count("the VAE's decoder is not compiled") == count


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    cpu = Placement(torch.device("cpu"), torch.float32, None, "none")
    gpu = dataclasses.replace(cpu, device=torch.device("cuda"))
    assert choose_optimization(Settings(), cpu).level == "off"
    assert choose_optimization(Settings(), gpu).level == "safe"
    chosen = choose_optimization(Settings(optimize="max", warm_sizes=("64x128",), max_batch_size=3), cpu)
    assert (chosen.sizes, chosen.most_rows, chosen.fp8) == (((64, 128),), 3, False)
    assert chosen.row_counts(64 * 128, graphs=True) == (1, 2, 3)
    many = dataclasses.replace(chosen, most_rows=32)
    assert many.row_counts(64 * 128, graphs=False) == (1, 2, 32)
    assert many.row_counts(2048 * 2048, graphs=False) == (1, 2, 4)
    assert many.row_counts(4096 * 2048, graphs=False) == (1, 2)
    assert many.row_counts(2048 * 2048, graphs=True) == (1, 2, 4, 3), "smaller ones fit where the largest did"


@pytest.mark.parametrize(("offload", "quantization"), [("enable_sequential_cpu_offload", "none"), (None, "nf4")])
def test_weights_that_wait_elsewhere_or_are_quantized_are_left_as_they_lie(
    offload: str | None, quantization: str
) -> None:
    placement = Placement(torch.device("cpu"), torch.float32, offload, quantization)
    chosen = choose_optimization(Settings(optimize="safe"), placement)
    layer = nn.Conv2d(4, 8, 3)
    chosen.arrange(layer)
    assert layer.weight.is_contiguous()
    Optimization("safe").arrange(layer)
    assert not layer.weight.is_contiguous()


def test_what_was_quantized_is_named() -> None:
    quantized = Placement(torch.device("cpu"), torch.float32, None, "fp8")
    chosen = choose_optimization(Settings(quantization="fp8"), quantized)
    assert chosen.losses(GenerateRequest(prompt=""), steps=1) == ("quantization fp8",)
