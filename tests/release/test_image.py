"""release/image.py, on what this machine has in place of an image."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from release.image import described

TOOLS = Path(__file__).parent.parent.parent / ".venv-release"
VALID = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(str(wrong) if wrong else 0)
"""


@pytest.mark.skipif(
    not TOOLS.exists() or shutil.which("dpkg-query") is None, reason="needs Debian, and `make .venv-release/.installed`"
)
def test_document_is_cyclonedx_of_what_is_installed() -> None:
    """It is valid by CycloneDX' own schema, and names each package with its version, of Debian and of Python."""
    text = described("lifeguard-app", "9.8.7", sys.executable)

    valid = subprocess.run([TOOLS / "bin/python", "-c", VALID], input=text, capture_output=True, text=True, check=False)
    assert valid.returncode == 0, valid.stderr
    document = json.loads(text)
    assert document["metadata"]["component"]["version"] == "9.8.7"
    parts = {each["purl"].partition("@")[0]: each for each in document["components"]}
    assert parts["pkg:pypi/asyncpg"]["version"] == version("asyncpg")
    assert parts["pkg:pypi/ruff"]["licenses"] == [{"expression": "MIT"}]
    asked = ["dpkg-query", "--show", "--showformat", "${Version}", "libc-bin"]
    installed = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert parts["pkg:deb/debian/libc-bin"]["version"] == installed


def test_image_that_does_not_answer_is_an_error() -> None:
    """A document of nothing would say that nothing is in it."""
    with pytest.raises(subprocess.CalledProcessError):
        described("lifeguard-app", "9.8.7", "/bin/false")
