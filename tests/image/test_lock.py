"""What the image is made of is pinned, with hashes, to what the tests ran with."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.image.lock import CPU_REQUIREMENTS, CUDA_REQUIREMENTS, DATA_REQUIREMENTS, REQUIREMENTS, ROOT

HINT = "run: python -m deploy.image.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(*paths: object) -> dict[str, str]:
    """Versions by name."""
    text = "".join(path.read_text(encoding="utf-8") for path in paths)  # type: ignore[attr-defined]
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def needed() -> set[str]:
    """What the server needs on this machine, with all that this needs in turn, by what is installed here."""
    found: set[str] = set()
    ahead = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while ahead:
        requirement = Requirement(ahead.pop())
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        found.add(name)
        for text in importlib.metadata.requires(name) or []:
            marker = Requirement(text).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                ahead.append(text)
    return found


def test_all_that_the_server_needs_is_locked_and_nothing_else() -> None:
    ours, cpu = locked(REQUIREMENTS), locked(CPU_REQUIREMENTS)
    if "+cpu" in importlib.metadata.version("torch"):
        assert needed() == set(ours) | set(cpu), HINT
    assert set(cpu) == {"torch"}
    assert not set(ours) & {"torch", "triton", "bitsandbytes"}


def test_the_versions_are_those_of_the_tests() -> None:
    constraints = locked(ROOT / "constraints.txt")
    for name, version in locked(REQUIREMENTS, CUDA_REQUIREMENTS).items():
        assert constraints.get(name, version) == version, f"{name}; {HINT}"
    assert locked(CPU_REQUIREMENTS)["torch"] == f"{constraints['torch']}+cpu", HINT


def test_the_versions_are_those_that_the_package_wants() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    versions = locked(REQUIREMENTS, CUDA_REQUIREMENTS, DATA_REQUIREMENTS)
    for text in [*project["dependencies"], *extras["quantization"], *extras["single-file"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), f"{text}; {HINT}"


def test_every_requirement_has_hashes() -> None:
    for path in (REQUIREMENTS, CUDA_REQUIREMENTS, CPU_REQUIREMENTS, DATA_REQUIREMENTS):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if "==" in line:
                assert re.match(r"    --hash=sha256:[0-9a-f]{64}", following), line
