"""Turns checked files into the components of a pipeline: diffusers and transformers do the reading.

Both would fill a tensor that is missing with noise and say so in a log; here that is an error. Nothing here knows
settings.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from app.engine import clip_vocabulary
from app.engine.checkpoints import AGAIN
from app.engine.folders import INDEX, Component, ModelFolder, check_clip_tokenizer, read_json, read_options
from app.errors import ModelLoadFailed, first_line
from app.sentences import amount

logger = logging.getLogger(__name__)

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
ALIGNMENT = 64
"""Bytes; what torch gives its own tensors on a CPU."""
BIG = ("unet", "transformer")
"""The components that quantization is for."""
ORIGINS = (
    "_name_or_path",
    "_diffusers_version",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)
"""Entries of a configuration that say where a component comes from and not how it works."""


@dataclass(frozen=True, slots=True)
class Format:
    """In which numbers weights are held, and where they are read to.

    Attributes:
        dtype: of all computation but the VAE's.
        quantization: configuration for the UNet or transformer, as diffusers takes it; ``None`` for none.
        aligned: on the boundaries that a CPU computes along, see `settle`.
        device: where weights go straight from the file; ``None`` for the CPU, where something else takes them up.
        shrinks: the UNet or transformer is made smaller before it goes to the device.
    """

    dtype: torch.dtype
    quantization: Any = None
    aligned: bool = False
    device: torch.device | None = None
    shrinks: bool = False

    def of(self, name: str, config: Mapping[str, Any]) -> torch.dtype:
        """The dtype of one component: a VAE that overflows in float16 is float32 from the start."""
        overflows = name == "vae" and self.dtype == torch.float16 and config.get("force_upcast")
        return torch.float32 if overflows else self.dtype

    def device_of(self, name: str) -> torch.device | None:
        """Where one component is read to; what is quantized while it is read, quantization puts where it belongs."""
        later = name in BIG and (self.shrinks or self.quantization is not None)
        return None if later else self.device


class Progress:
    """Says which component is being read, and how much of all is read before it.

    Args:
        report: hears one phrase after the other.
        total: bytes of everything that will be read.
    """

    def __init__(self, report: Callable[[str], None], total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    @contextlib.contextmanager
    def reading(self, name: str, size: int) -> Iterator[None]:
        if size:
            self._report(f"reading {name} ({amount(self._done, self._total)})")
        yield
        self._done += size


# --- Folders ---------------------------------------------------------------------------------------------------


def load_folder(
    folder: ModelFolder,
    numbers: Format,
    progress: Progress,
    *,
    without: Iterable[str] = (),
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every component of a model folder, by name.

    Args:
        folder: checked.
        numbers: in which numbers.
        progress: hears of each.
        without: names of components that come from elsewhere.
        known: components that are taken instead of reading them.

    Raises:
        ModelLoadFailed: naming the file and what to do.
    """
    loaded = dict(known or {})
    for name, component in folder.components.items():
        if name in without or name in loaded:
            continue
        with progress.reading(name, component.size):
            loaded[name] = _load_component(component, numbers)
    return loaded


def component_class(component: Component) -> Any:
    """The class that a component is of; its library imports it by this.

    Raises:
        ModelLoadFailed: it has no such class.
    """
    library = LIBRARIES[component.library]
    cls = getattr(library, component.class_name, None)
    if cls is None:
        raise ModelLoadFailed(
            f"{component.folder.parent / INDEX} names {component.library}.{component.class_name} as {component.name}, "
            f"which {component.library} {library.__version__} does not have; {AGAIN}, or take another model."
        )
    return cls


def _load_component(component: Component, numbers: Format) -> Any:
    cls = component_class(component)
    if component.name == "scheduler" or component.name.startswith("tokenizer"):
        with told(str(component.folder)):
            return cls.from_pretrained(component.folder, local_files_only=True)
    config = read_json(component.folder / "config.json")
    options: dict[str, Any] = {"dtype": numbers.of(component.name, config), "variant": component.variant}
    if component.name in BIG and numbers.quantization is not None:
        options["quantization_config"] = numbers.quantization
    where = str(component.weights[0] if len(component.weights) == 1 else component.folder)
    read = functools.partial(
        cls.from_pretrained,
        component.folder,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    with told(where):
        try:
            module, info = read(device_map=numbers.device_of(component.name))
        except NotImplementedError:
            # diffusers cannot bring what the files lack to a device, and does not say what that is: on the CPU it does.
            module, info = read()
    for name, in_file, expected in sorted(info["mismatched_keys"]):
        raise _wrong_shape(where, name, in_file, expected)
    check_names(where, info["missing_keys"], info["unexpected_keys"])
    return settle(module, numbers)


def settle(module: torch.nn.Module, numbers: Format) -> torch.nn.Module:
    """Ready to compute: as it does wherever the weights came from.

    diffusers uses weights where they lie in the file. A CPU rounds differently where that is no multiple of 64 bytes,
    so that the same model would paint pictures that differ in a few pixels, depending on the length of the file's
    header; and a file that somebody truncates would take the server along.
    """
    if numbers.aligned:
        for parameter in module.parameters():
            if parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
    return module.eval()


def check_names(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Missing tensors would be noise, and those that nothing reads say that the configuration is another model's.

    Raises:
        ModelLoadFailed: tensors are missing.
    """
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        raise ModelLoadFailed(
            f"{where} lacks {names[0]}{more} of what its configuration describes; {AGAIN}, with its configuration."
        )
    names = sorted(name for name in unexpected if not name.endswith(("position_ids", "logit_scale")))
    if names:
        logger.warning("%s: %d tensors such as %s are not used", where, len(names), names[0])


def _wrong_shape(where: str, name: str, in_file: Sequence[int], expected: Sequence[int]) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"{where} has {name} in the shape {list(in_file)}, but its configuration describes {list(expected)}; take the "
        "configuration that belongs to these weights."
    )


def check_shapes(where: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Hold tensors against those of a module, which may be on the meta device.

    Raises:
        ModelLoadFailed: one is missing or has another shape.
    """
    for name, tensor in expected.items():
        if name in found and found[name].shape != tensor.shape:
            raise _wrong_shape(where, name, found[name].shape, tensor.shape)
    check_names(where, expected.keys() - found.keys(), found.keys() - expected.keys())


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes one sentence about `where`."""
    try:
        yield
    except ModelLoadFailed:
        raise
    except torch.OutOfMemoryError:
        raise ModelLoadFailed(
            f"The device has too little memory for {where}; take --device enable_model_cpu_offload, another --dtype or "
            "--quantization fp8."
        ) from None
    except MemoryError:
        raise ModelLoadFailed(
            f"There is too little memory for {where}; free some, or take --dtype, --quantization or another --device."
        ) from None
    except Exception as error:
        said = f"tensor {error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ModelLoadFailed(f"{where} cannot be loaded: {said}.") from error


def check_tokenizers(folder: Path, components: Mapping[str, Any]) -> None:
    """Whether the text encoders know all tokens and lengths that their tokenizers give.

    Else some text is a place outside a table; on a GPU that ends every request after it too.

    Args:
        folder: whose tokenizers they are, for the sentence.
        components: by name.

    Raises:
        ModelLoadFailed: they do not.
    """
    for name, tokenizer in components.items():
        if not name.startswith("tokenizer"):
            continue
        encoder = components[name.replace("tokenizer", "text_encoder")].config
        last = max(tokenizer.get_vocab().values(), default=0)
        if last >= encoder.vocab_size:
            raise ModelLoadFailed(
                f"{folder / name} has a token with the number {last}, but its text encoder knows those up to "
                f"{encoder.vocab_size - 1}; {AGAIN}, or take the tokenizer that belongs to these weights."
            )
        longest = getattr(encoder, "max_position_embeddings", None)  # T5 has none
        if longest is not None and tokenizer.model_max_length > longest:
            raise ModelLoadFailed(
                f"{folder / name / 'tokenizer_config.json'} must have a model_max_length of at most {longest} tokens, "
                f"which is as far as its text encoder reads; {AGAIN}, or correct it."
            )


# --- What is shared --------------------------------------------------------------------------------------------


def shared_components(folder: ModelFolder, other: ModelFolder, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `loaded`, which came from `other`, whose files are the same in `folder`.

    Nothing is read twice that a look at the sizes can tell apart.
    """
    return {
        name: loaded[name]
        for name, component in folder.components.items()
        if component.weights and name in other.components and _same_files(component, other.components[name])
    }


def _same_files(one: Component, two: Component) -> bool:
    if len(one.weights) != len(two.weights) or one.class_name != two.class_name:
        return False
    if not _same_configuration(read_json(one.folder / "config.json"), read_json(two.folder / "config.json")):
        return False
    return all(a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a, b in zip(one.weights, two.weights, strict=True))


def share(components: dict[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Replace components that equal those of the same name in `others`.

    Returns:
        The names of what is shared now.
    """
    names = []
    for name, component in components.items():
        other = others.get(name)
        if other is not None and name != "scheduler" and (component is other or _equal(component, other)):
            components[name] = other
            names.append(name)
    return names


def _equal(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if not isinstance(one, torch.nn.Module):
        return bool(one.get_vocab() == two.get_vocab() and one.special_tokens_map == two.special_tokens_map)
    if not _same_configuration(_configuration(one), _configuration(two)):
        return False
    mine, theirs = one.state_dict(), two.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _configuration(module: Any) -> dict[str, Any]:
    return dict(module.config.to_dict() if hasattr(module.config, "to_dict") else module.config)


def _same_configuration(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return _without_origin(one) == _without_origin(two)


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ORIGINS and value is not None}


# --- Tokenizers without a folder of their own ------------------------------------------------------------------


def make_clip_tokenizer(config: Path, name: str, flag: str, file: Path) -> Any:
    """CLIP's tokenizer `name` as `config` sets it up, its vocabulary taken from where it can be found.

    Args:
        config: a folder in diffusers' layout that may lack the vocabulary.
        name: ``tokenizer`` or ``tokenizer_2``, which pad differently.
        flag: the setting that names a folder with a vocabulary, for the sentence.
        file: the single file it is for, for the sentence.

    Raises:
        ModelLoadFailed: there is no vocabulary; the sentence says how to provide it.
    """
    folder = config / name
    if any((folder / each).is_file() for each in ("tokenizer.json", "vocab.json")):
        with told(str(folder)):
            check_clip_tokenizer(folder)
            return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    vocabulary = clip_vocabulary.find()
    if vocabulary is None:
        raise ModelLoadFailed(
            f"{file} comes without CLIP's vocabulary, as every checkpoint does: install the extra 'single-file' (the "
            f"package open_clip_torch has it), or name a folder with tokenizers in diffusers' layout with --{flag}."
        )
    logger.info("%s: taking CLIP's vocabulary from %s", name, vocabulary)
    with tempfile.TemporaryDirectory() as made, told(str(vocabulary)):
        if (folder / "tokenizer_config.json").is_file():
            shutil.copy(folder / "tokenizer_config.json", made)
        clip_vocabulary.write_tokenizer(vocabulary, Path(made))
        return transformers.CLIPTokenizer.from_pretrained(made, local_files_only=True)


def pipeline_options(config: Path) -> dict[str, bool]:
    """Settings of the pipeline that its index holds."""
    return read_options(read_json(config / INDEX))
