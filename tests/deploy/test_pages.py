"""What the pages in deploy/ say is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from app.settings import Settings
from clients.bench import Load
from deploy import replicas
from tests.deploy.manifests import DEPLOY, ROOT, examples, kustomize
from tests.deploy.test_monitoring import ALERTS, exported

README = (DEPLOY / "README.md").read_text(encoding="utf-8")
SCALING = (DEPLOY / "scaling.md").read_text(encoding="utf-8")


def rows(page: str, header: str) -> list[list[str]]:
    """The cells of the table under a header."""
    table = page.split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_alert_is_told_of() -> None:
    assert [row[0].strip("`") for row in rows(README, "alert | when")] == list(ALERTS)


def test_every_service_is_told_of() -> None:
    told = {name.strip(" `") for row in rows(README, "service | what | weights") for name in row[0].split(",")}
    assert told == {path.parent.name for path in DEPLOY.glob("services/*/kustomization.yaml")} - {"base"}


def test_every_component_is_told_of() -> None:
    (line,) = re.findall(r"^\| `components/` \|(.*)$", README, re.MULTILINE)
    assert re.findall(r"`(.*?)`", line) == sorted(
        path.parent.name for path in DEPLOY.glob("components/*/kustomization.yaml")
    )


def test_the_env_file_is_looked_for_where_the_image_works() -> None:
    """And where the older runtime's image had it, so that who comes from there finds the sentence."""
    *_, folder = re.findall(r"^WORKDIR (\S+)$", (ROOT / "Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(rf"`\.env` in `/opt/app-root/src`;\s+this\s+one reads it in `{folder}`", README)
    for name in ("start.sh", "env.example"):
        assert f"{folder}/.env" in (DEPLOY / name).read_text(encoding="utf-8"), name
    assert "has mode 640" in (DEPLOY / "env.example").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [README, SCALING], ids=["README", "scaling"])
def test_every_path_that_is_named_exists(page: str) -> None:
    for path in re.findall(r"(?<![\w./-])deploy/[\w./-]+", page):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:runtime|services|components|monitoring|storage|image)/[\w./-]*)`", page):
        assert (DEPLOY / path).exists(), path


@pytest.mark.parametrize(
    "text", [README, (DEPLOY / "start.sh").read_text(encoding="utf-8")], ids=["README", "start.sh"]
)
def test_podman_stops_no_server_before_its_grace_period_is_over(text: str) -> None:
    commands = re.findall(r"podman run .*", text)
    assert commands
    for command in commands:
        seconds = re.search(r"--stop-timeout (\d+)", command)
        assert seconds and int(seconds[1]) > Settings().grace_period, command


def test_every_metric_that_is_named_exists() -> None:
    names = set(re.findall(r"\b(?:sdxl_[a-z]+_[a-z_]+|request_[a-z]+_seconds_[a-z]+)\b", README + SCALING))
    assert names and names <= exported()


def test_a_kustomization_of_ones_own_works(tmp_path: Path) -> None:
    (own,) = [each for each in examples(DEPLOY / "README.md") if each["kind"] == "Kustomization"]
    (tmp_path / "deploy").symlink_to(DEPLOY)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    kinds = {each["kind"]: each for each in kustomize(tmp_path / "own")}
    assert kinds["ServingRuntime"]["spec"]["containers"][0]["image"] == "registry.example.com/sdxl-runtime:0.1.0"
    assert {"InferenceService", "PodMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy"} <= set(kinds)
    assert all(each["metadata"]["namespace"] == "pictures" for each in kinds.values())
    for metric in kinds["InferenceService"]["spec"]["predictor"]["autoScaling"]["metrics"]:
        assert 'namespace=~"pictures"' in metric["external"]["metric"]["query"]


IMAGED = [
    re.sub(r"\s*\\\n\s*", " ", each)
    for each in re.findall(r"^(?:kubectl kustomize|sed) (?:.*\\\n)*.*$", README, re.MULTILINE)
]


def test_the_commands_that_name_the_image_are_all_that_need_it() -> None:
    assert all(re.search(r" \| (?:kubectl|oc) apply .*-f -$", each) for each in IMAGED)
    read = " ".join(IMAGED)
    for path in ("runtime/base", "runtime/openshift-ai", "runtime/openshift-ai/template.yaml", "storage"):
        assert re.search(rf"deploy/{path} ", read), path


@pytest.mark.parametrize("command", IMAGED)
def test_a_command_of_the_page_gives_the_cluster_the_image_that_was_pushed(command: str) -> None:
    if "kubectl kustomize" in command and not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    (pushed,) = re.findall(r"^podman push (\S+)$", README, re.MULTILINE)
    pipeline = re.sub(r" \| (?:kubectl|oc) apply .*$", "", command)
    applied = subprocess.run(["sh", "-c", pipeline], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"image: (\S+)", applied) == [pushed]


def test_the_count_of_replicas_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    ((arguments, output),) = re.findall(r"<!-- replicas (.*?) -->\n\n```\n(.*?)```", SCALING, re.DOTALL)
    assert replicas.main(shlex.split(arguments)) == 0
    assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (replicas.Plan(demand=0.1, per_replica=1.0), 1),
        (replicas.Plan(demand=0.7, per_replica=1.0), 1),
        (replicas.Plan(demand=0.71, per_replica=1.0), 2),
        (replicas.Plan(demand=2.1, per_replica=1.0, busy=0.7), 3),
        (replicas.Plan(demand=0.1, per_replica=1.0, burst=61, within=60.0), 2),
        (replicas.Plan(demand=2.1, per_replica=1.0, burst=600, within=60.0, spare=1), 11),
    ],
)
def test_replicas(plan: replicas.Plan, expected: int) -> None:
    assert plan.replicas == expected


def test_what_was_measured_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = Load(seconds=10.0, latencies=[1.0] * 9).summary(slo=10.0)
    (tmp_path / "one.json").write_text(json.dumps({"summary": summary}), encoding="utf-8")
    assert replicas.main(["--demand", "1.5", "--bench", str(tmp_path / "one.json")]) == 0
    assert "at 0.9 per replica" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--demand 0 --per_replica 1", "must be more than 0"),
        ("--demand 1 --per_replica 0", "must be more than 0"),
        ("--demand 1 --per_replica 1 --burst -5", "must be 0 or more"),
        ("--demand 1 --per_replica 1 --spare -3", "must be 0 or more"),
        ("--demand nan --per_replica 1", "must be finite"),
        ("--demand inf --per_replica 1", "must be finite"),
        ("--demand 1 --bench nowhere.json", "--bench nowhere.json"),
        ("--demand 1 --bench empty.json", "--bench empty.json"),
        ("--demand 1 --bench list.json", "--bench list.json"),
        ("--demand 1 --bench other.json", "--bench other.json"),
        ("--demand 1 --bench none.json", "--bench none.json"),
        ("--demand 1 --bench .", "--bench ."),
    ],
)
def test_what_cannot_be_counted_with_is_refused_in_a_sentence(
    arguments: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"empty": "", "list": "[]", "other": "{}", "none": '{"summary": {"images_per_second": null}}'}
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        replicas.main(arguments.split())
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
