"""Reads the settings from flags, environment and ``.env``, and says in one sentence what is wrong with them.

Nothing here knows what a setting does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from dotenv.parser import parse_stream
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from app.errors import InvalidSettings
from app.sentences import nearest
from app.settings import Settings

ALIASES = {
    "huggingface_token": "HF_TOKEN",
    "ssl_certfile": "KSERVE_TLS_CERT_FILE",
    "ssl_keyfile": "KSERVE_TLS_KEY_FILE",
}
"""Environment variables that are read where a setting's own is not there."""
HTTPS_PORT = 8443
"""Where KServe's model server listens once it has a certificate, unless told otherwise."""


def load_settings(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ, env_file: Path = Path(".env")
) -> Settings:
    """Read flags, environment and ``.env``, in that order of precedence.

    What the environment or ``.env`` leaves empty, as templates do, is not given there; ``none`` unsets.

    Raises:
        InvalidSettings: with one sentence that names the flag, variable or key and what it may be.
        SystemExit: after ``--help``.
    """
    flags = vars(_parser().parse_args(arguments))  # first: whoever asks for help may have a .env to mend
    sources: dict[str, str] = {}
    values: dict[str, Any] = {}

    def take(name: str, value: Any, source: str) -> None:
        values[name], sources[name] = value, source

    for origin, pairs in ((f" in {env_file}", _read_env_file(env_file)), (" in the environment", environment)):
        for name in Settings.model_fields:
            value = pairs.get(name.upper(), "").strip() or pairs.get(ALIASES.get(name, ""), "")
            # Kubernetes announces a Service called "http" as HTTP_PORT=tcp://10.0.0.1:80: not meant for us.
            if value.strip() and not value.startswith("tcp://"):
                take(name, value, f"{name.upper()}{origin}")
    for name, value in flags.items():
        take(name, value, f"--{name}")

    for name, value in values.items():
        values[name] = _from_text(value, Settings.model_fields[name])
    if values.get("ssl_certfile") is not None:
        values.setdefault("http_port", HTTPS_PORT)
    try:
        return Settings(**values)
    except ValidationError as error:
        raise InvalidSettings(_describe(error, sources)) from None


def read_other_keys(env_file: Path = Path(".env")) -> dict[str, str]:
    """What ``.env`` has besides settings: variables that libraries read, such as ``HF_HOME``, and misspelt settings.

    Raises:
        InvalidSettings: the file cannot be read.
    """
    known = {*(name.upper() for name in Settings.model_fields), *ALIASES.values()}
    return {name: value for name, value in _read_env_file(env_file).items() if name not in known}


def find_termination_log(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ, env_file: Path = Path(".env")
) -> Path | None:
    """The setting ``termination_log``, for last words about others that are wrong."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--termination_log", "--termination-log")
    found = environment.get("TERMINATION_LOG")
    with contextlib.suppress(InvalidSettings):
        found = found or _read_env_file(env_file).get("TERMINATION_LOG")
    with contextlib.suppress(InvalidSettings):
        given = parser.parse_known_args(arguments)[0].termination_log
        found = found if given is None else given or "none"
    return load_settings([], {"TERMINATION_LOG": found or ""}, Path(os.devnull)).termination_log


_MESSAGES = {
    "string_too_short": "it must not be empty",
    "string_pattern_mismatch": "it must be one of those named here",
    "bool_parsing": "it must be true or false",
}
"""What to say instead of pydantic's words."""


def _describe(error: ValidationError, sources: Mapping[str, str]) -> str:
    """The first of pydantic's complaints as one sentence.

    Args:
        error: what pydantic says.
        sources: the flag, variable or key that gave each setting.
    """
    detail = error.errors()[0]
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return f"{message}."
    name = str(detail["loc"][0])
    field = Settings.model_fields[name]
    words = _words(field)
    if typing.get_origin(field.annotation) is Literal:
        message, words = f"must be one of {', '.join(words)}", []
    message = _MESSAGES.get(detail["type"], message).replace("Input should", "it must")
    message = " or ".join([message.split(", unable to parse")[0], *words])
    given = detail["input"]
    text = ",".join(given) if isinstance(given, tuple) else str(given)
    shown = "" if _is_secret(field) else f" is {text[:80]!r}, but"
    return f"{sources.get(name, name)}{shown} {message} ({field.description})"


def _words(field: FieldInfo) -> list[str]:
    """What a setting may be, perhaps besides a value of another kind."""
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]


def _read_env_file(path: Path) -> Mapping[str, str]:
    try:
        # Some call a virtual environment so.
        if path.is_dir() and any(path.iterdir()):
            return {}
        with path.open(encoding="utf-8-sig") as file:
            lines = list(parse_stream(file))
    except FileNotFoundError:
        return {}
    except IsADirectoryError:
        raise InvalidSettings(
            f"{path} is an empty folder, as docker makes one where the file to mount does not exist; make that file or "
            "remove the folder."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path} cannot be read: {error}.") from None
    if any("\0" in line.original.string for line in lines):
        raise InvalidSettings(f"{path} cannot be read: it holds NUL characters, as UTF-16 does; save it as UTF-8.")
    # Whoever leaves out a line may leave out the key that callers need. It is not shown: it may be a secret.
    for line in lines:
        if line.error or (line.key is not None and line.value is None):
            # It begins with the blank lines before it.
            blank = len(line.original.string) - len(line.original.string.lstrip())
            number = line.original.line + line.original.string[:blank].count("\n")
            raise InvalidSettings(
                f"{path} cannot be read in line {number}: it must be NAME=value, with quotes around all of "
                "the value or none."
            )
    return {line.key: line.value for line in lines if line.key is not None and line.value is not None}


def _from_text(value: str | list[str], field: FieldInfo) -> object:
    """An empty value or ``none`` means "unset" where a setting may be unset; pydantic reads everything else.

    Words that a setting knows may be written in capitals.
    """
    if _repeatable(field):
        given = [value] if isinstance(value, str) else value
        parts = [_at_home(part.strip()) for text in given for part in text.split(",")]
        return () if [part.lower() for part in parts] == ["none"] else tuple(filter(None, parts))
    assert isinstance(value, str)
    optional = type(None) in typing.get_args(field.annotation)
    if optional and value.strip().lower() in ("", "none"):
        return None
    if value.strip().lower() in _words(field):
        return value.strip().lower()
    return value.strip() if _is_secret(field) else _at_home(value.strip())


def _at_home(text: str) -> str:
    """With the home's path for the ``~`` that a shell leaves alone behind the ``=`` of a flag, and ``.env`` has too."""
    return re.sub(r"^([\w-]+=)?~/", lambda found: f"{found[1] or ''}{Path.home()}/", text)


def _is_secret(field: FieldInfo) -> bool:
    return "SecretStr" in str(field.annotation)


def _repeatable(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is tuple


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidSettings(f"{message[:1].upper()}{message[1:]}.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            flags = [f"--{name}" for name in Settings.model_fields]
            raise InvalidSettings(f"{flag!r} is not a flag{nearest(flag.replace('-', '_'), flags)} (see --help).")
        return known


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sdxl-runtime",
        description="Serve Stable Diffusion XL and FLUX over the Open Inference Protocol v2.",
        epilog="Each flag is also an environment variable in capitals and a key of the .env file; hyphens may stand "
        "for underscores. 'sdxl-runtime health' asks a running server how it is.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        # A flag for a boolean may stand alone; one for several values takes them in a row, and may be repeated.
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
        if _repeatable(field):
            extra = {"action": "extend", "nargs": "+"}
        default = "unset" if field.default in (None, ()) else field.default
        text = f"{field.description} (default: {default})".replace("%", "%%")
        parser.add_argument(*flags, dest=name, metavar=_metavar(field), help=text, **extra)
    return parser


def _metavar(field: FieldInfo) -> str:
    annotation = field.annotation
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(typing.get_args(annotation)) + "}"
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    names: dict[Any, str] = {bool: "true|false", int: "N", float: "SECONDS", Path: "PATH", SecretStr: "KEY"}
    return names.get(annotation, "TEXT")
