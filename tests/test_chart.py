"""The chart goes with the rest of the tree. tests/deploy renders it; these need no helm."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pglifeguard import __version__

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy/helm/lifeguard"


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_chart_has_the_projects_version() -> None:
    """Chart and image are released under the one version of the project."""
    chart = _read(CHART / "Chart.yaml")

    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_page_pushes_the_image_that_the_chart_asks_for() -> None:
    """Who does as docs/kubernetes.md says has built the version that the chart names; the upgrade is to a later one."""
    page = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")

    assert set(re.findall(r"-app:([\d.]+)", page)) == {__version__}
    (upgrade,) = re.findall(r"image\.tag=([\d.]+)", page)
    assert upgrade.rpartition(".")[0] == __version__.rpartition(".")[0]
    assert int(upgrade.rpartition(".")[2]) > int(__version__.rpartition(".")[2])


def test_chart_starts_the_images_of_the_compose_stack() -> None:
    """The chart's images are those that docker-compose.yml builds and pulls."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    images = set(re.findall(r"^ +image: (\S+)$", text, re.MULTILINE))
    values = _read(CHART / "values.yaml")

    assert {values["image"]["repository"], values["cluster"]["psqlImage"]} <= images


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("alerts.yml", "prometheus/alerts.yml"),
        ("dashboards", "grafana/image/dashboards"),
        ("recording.yml", "prometheus/recording.yml"),
        ("roles.sql", "postgres/roles.sql"),
    ],
)
def test_chart_has_no_copies(name: str, source: str) -> None:
    """Helm reads only files of the chart, and follows links: rules, dashboards and roles are written once."""
    assert (CHART / "files" / name).resolve() == ROOT / source
