"""Pins everything that goes into the image, with hashes: ``python -m deploy.image.lock`` (needs ``pip install uv``).

requirements.txt is what the server needs on any machine, requirements-cuda.txt what torch's CUDA build needs besides.
Both carry the versions of constraints.txt where it has one, and the hashes of every file of a release.

torch is there once, with two kinds of hashes: those of its CUDA builds, which are what PyPI has, and that of its CPU
build, which is not on PyPI. pip takes the CPU build where it is offered one (PIP_FIND_LINKS, or PyTorch's CPU index as
PIP_EXTRA_INDEX_URL), since 2.13.0+cpu counts as newer than 2.13.0, and the CUDA build elsewhere. The CPU build's hash
is that of its file in the folder that PIP_FIND_LINKS names, or else stays as it was.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
CUDA_REQUIREMENTS = HERE / "requirements-cuda.txt"
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
CUDA = ("cuda-", "nvidia-", "triton")
"""How the names of those packages begin that only torch's CUDA build needs."""

HEADER = "# Made by deploy/image/lock.py from pyproject.toml and constraints.txt.\n"
CPU_BUILD = re.compile(r"^# torch's CPU build: (\S+) sha256:(\w{64})$", re.MULTILINE)


def resolve() -> list[str]:
    """One requirement with its hashes for each package, sorted by name."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv is missing: pip install uv")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder) / "build.txt"
        build.write_text("\n".join(project["build-system"]["requires"]), encoding="utf-8")
        result = subprocess.run(  # noqa: S603 (nothing here comes from outside)
            [
                uv,
                *("pip", "compile", "pyproject.toml", str(build), "--constraint", "constraints.txt"),
                *("--python-version", PYTHON, "--python-platform", PLATFORM),
                *("--generate-hashes", "--no-header", "--no-annotate", "--no-config", "--quiet"),
            ],
            cwd=ROOT,
            # Only what the index has; the CPU build is added below.
            env={name: text for name, text in os.environ.items() if name not in ("UV_FIND_LINKS", "PIP_FIND_LINKS")},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return re.findall(r"^\S+==.*?(?:[^\\]\n|\Z)", result.stdout, re.MULTILINE | re.DOTALL)


def cpu_build(version: str) -> tuple[str, str]:
    """Name and hash of torch's CPU build.

    Raises:
        SystemExit: when neither PIP_FIND_LINKS nor the lock has it in this version.
    """
    folder = os.environ.get("PIP_FIND_LINKS", "")
    for path in sorted(Path(folder).glob(f"torch-{version}+cpu-*.whl")) if folder else []:
        return path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    known = CPU_BUILD.search(REQUIREMENTS.read_text(encoding="utf-8")) if REQUIREMENTS.exists() else None
    if known is None or not known[1].startswith(f"torch-{version}+cpu-"):
        sys.exit(f"PIP_FIND_LINKS names no folder with the CPU build of torch {version}")
    return known[1], known[2]


def main() -> None:
    common, cuda = [], []
    note = ""
    for pinned in resolve():
        name, version = pinned.split()[0].split("==")
        requirement = pinned
        if name == "torch":
            file, digest = cpu_build(version)
            note = f"# torch's CPU build: {file} sha256:{digest}\n"
            requirement = f"{pinned.rstrip()} \\\n    --hash=sha256:{digest}\n"
        (cuda if name.startswith(CUDA) else common).append(requirement)
    REQUIREMENTS.write_text(HEADER + note + "".join(common), encoding="utf-8")
    CUDA_REQUIREMENTS.write_text(HEADER + "".join(cuda), encoding="utf-8")


if __name__ == "__main__":
    main()
