"""Who may import what: the walls of the house, read from the import statements."""

import ast
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "app"
PURE = ("app.protocol", "app.generation", "app.parameters", "app.sentences", "app.errors")
MODULES = sorted(APP.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def area(path: Path) -> str:
    return path.relative_to(APP).parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(APP)))
def test_every_module_stays_behind_its_wall(path: Path) -> None:
    if area(path) not in ("engine", "demo"):
        assert not roots(path) & {"torch", "diffusers", "transformers"}
    if area(path) not in ("api", "main.py"):
        assert not roots(path) & {"fastapi", "starlette", "uvicorn", "grpc"}
    if area(path) == "protocol":
        inside = {name for name in imports(path) if name.startswith("app.")}
        assert all(name.startswith(PURE) for name in inside)
        assert not roots(path) & {"os", "time", "asyncio", "threading", "random", "secrets"}
    if path.name in ("errors.py", "generation.py", "parameters.py", "sentences.py") and path.parent == APP:
        assert roots(path) <= {
            "__future__",
            "app",
            "collections",
            "ctypes",
            "dataclasses",
            "difflib",
            "enum",
            "itertools",
            "math",
            "re",
            "reprlib",
            "types",
            "typing",
        }
    if area(path) == "engine":
        assert not any(name.startswith(("app.api", "app.protocol", "app.main")) for name in imports(path))


def test_the_server_starts_without_importing_torch(tmp_path: Path) -> None:
    """HTTP answers before the seconds that torch takes."""
    import subprocess
    import sys

    code = "import sys, app.main; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=APP.parent)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("model_type", ["sdxl", "flux"])
def test_all_is_imported_before_weights_are_read_and_nothing_that_the_model_does_not_take(model_type: str) -> None:
    """Importing is most of a start; later it would be a request's time, with the search for garbage."""
    import json
    import subprocess
    import sys

    code = (
        "import json, sys\n"
        "from app.engine.weights import load_family\n"
        "from app.engine.worker import Worker\n"
        "from app.generation import GenerateRequest\n"
        "from app.settings import Settings\n"
        "first = []\n"
        "def report(phase):\n"
        "    if phase.startswith('reading') and not first: first.extend(sys.modules)\n"
        "family = load_family(Settings(model_id='demo', model_type=sys.argv[1]), report)\n"
        "request = family.resolve(GenerateRequest(prompt='', seed=0, num_inference_steps=1))\n"
        "job = family.begin(request, family.encode(request))\n"
        "family.step([job])\n"
        "family.decode([job])\n"
        "from diffusers.utils.constants import HF_ENABLE_PARALLEL_LOADING\n"
        "print(json.dumps([first, sorted(set(sys.modules) - set(first)), HF_ENABLE_PARALLEL_LOADING]))"
    )
    command = [sys.executable, "-c", code, model_type]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=APP.parent)
    first, later, parallel = json.loads(result.stdout)
    assert parallel and later == []
    other = "app.engine.flux" if model_type == "sdxl" else "app.engine.sdxl"
    needless = {"compel", "torchvision", "pandas", "sklearn", "matplotlib", "open_clip", "bitsandbytes", "fastapi"}
    assert not {*needless, other, "app.engine.converting", "app.engine.hub"} & set(first)


def test_libraries_are_read_once_and_what_few_requests_want_is_imported_for_them() -> None:
    import json
    import subprocess
    import sys

    code = (
        "import collections, json, sys\n"
        "read = collections.Counter()\n"
        "def audit(event, arguments):\n"
        "    if event == 'open' and 'site-packages' in str(arguments[0]) and str(arguments[0]).endswith('.py'):\n"
        "        read[str(arguments[0])] += 1\n"
        "sys.addaudithook(audit)\n"
        "from app.engine.weights import load_family\n"
        "from app.generation import GenerateRequest\n"
        "from app.settings import Settings\n"
        "family = load_family(Settings(model_id='demo'))\n"
        "first = list(sys.modules)\n"
        "def begin(**ask):\n"
        "    request = GenerateRequest(prompt='', seed=0, num_inference_steps=3, scheduler='LMS', **ask)\n"
        "    request = family.resolve(request)\n"
        "    return family.begin(request, family.encode(request))\n"
        "begin()\n"
        "lms = list(sys.modules)\n"
        "job = begin(use_beta_sigmas=True)\n"
        "levels = job.legs[0].scheduler.sigmas.tolist()\n"
        "beta = list(sys.modules)\n"
        "while not job.done:\n"
        "    family.step([job])\n"
        "print(json.dumps([sum(times > 1 for times in read.values()), first, lms, beta, levels]))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=APP.parent)
    twice, first, lms, beta, levels = json.loads(result.stdout)
    assert twice < 100  # of transformers' fifteen hundred, those of the models that are loaded
    integrate, stats = "scipy.integrate._quadrature", "scipy.stats._distn_infrastructure"
    assert not {integrate, stats, "scipy.optimize"} & set(first)
    assert integrate in lms and stats in beta, "when they begin: what steps take is measured"
    assert levels == sorted(levels, reverse=True) and levels[-1] == 0
