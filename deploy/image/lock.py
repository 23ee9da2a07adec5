"""Pins everything that goes into the image, with hashes: ``python -m deploy.image.lock`` (needs ``pip install uv``).

requirements.txt is what the server needs on any machine but torch, requirements-cuda.txt torch with CUDA and what only
serves with it, requirements-cpu.txt torch without, and requirements-data.txt packages of which the server reads a file
and runs nothing, so that they come without what they need themselves. All carry the versions of constraints.txt, where
it has one, and the hashes of every file of a release.

Each build of torch has a file of its own, not one line with the hashes of both: among files with allowed hashes pip
prefers those whose hash the index tells, so that with both allowed a folder's CPU build would always lose to PyPI's
CUDA build. The CPU build is not on PyPI; its hash is that of its file in the folder that PIP_FIND_LINKS names, or else
stays as it was.
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
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = HERE / "requirements.txt"
CUDA_REQUIREMENTS = HERE / "requirements-cuda.txt"
CPU_REQUIREMENTS = HERE / "requirements-cpu.txt"
PYTHON = "3.11"
PLATFORM = "x86_64-manylinux_2_28"
DATA_REQUIREMENTS = HERE / "requirements-data.txt"
CUDA = ("bitsandbytes==", "cuda-", "nvidia-", "torch==", "triton")
"""How those requirements begin that torch's CUDA build consists of, and what only serves with it."""

HEADER = "# Made by deploy/image/lock.py from pyproject.toml and constraints.txt.\n"


def resolve(requirements: Sequence[str], *options: str) -> list[str]:
    """One requirement with its hashes for each package, sorted by name."""
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("uv is missing: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text("\n".join(requirements), encoding="utf-8")
        result = subprocess.run(  # noqa: S603 (nothing here comes from outside)
            [
                uv,
                *("pip", "compile", str(wanted), "--constraint", "constraints.txt", *options),
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


def cpu_build(version: str) -> str:
    """The requirement of torch's CPU build.

    Raises:
        SystemExit: when neither PIP_FIND_LINKS nor the lock has it in this version.
    """
    folder = os.environ.get("PIP_FIND_LINKS", "")
    for path in sorted(Path(folder).glob(f"torch-{version}+cpu-*.whl")) if folder else []:
        return f"torch=={version}+cpu \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    known = CPU_REQUIREMENTS.read_text(encoding="utf-8").removeprefix(HEADER) if CPU_REQUIREMENTS.exists() else ""
    if not known.startswith(f"torch=={version}+cpu "):
        sys.exit(f"PIP_FIND_LINKS names no folder with the CPU build of torch {version}")
    return known


def main() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = document["project"]
    extras = project["optional-dependencies"]
    pinned = resolve([*project["dependencies"], *extras["quantization"], *document["build-system"]["requires"]])
    (torch,) = [each for each in pinned if each.startswith("torch==")]
    contents = {
        REQUIREMENTS: [each for each in pinned if not each.startswith(CUDA)],
        CUDA_REQUIREMENTS: [each for each in pinned if each.startswith(CUDA)],
        DATA_REQUIREMENTS: resolve(extras["single-file"], "--no-deps"),
        CPU_REQUIREMENTS: [cpu_build(torch.split()[0].removeprefix("torch=="))],
    }
    for path, requirements in contents.items():
        path.write_text(HEADER + "".join(requirements), encoding="utf-8")


if __name__ == "__main__":
    main()
