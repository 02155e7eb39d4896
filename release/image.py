"""What is in an image, as a CycloneDX document: Debian's packages, and Python's, beside the service's own code."""

import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Run by the image's own Python, so that it tells what is there and not what the Dockerfile asks for.
LISTING = """
import importlib.metadata, json, subprocess
asked = ["dpkg-query", "--show", "--showformat", "${Package}\\t${Version}\\t${Architecture}\\n"]
debian = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
found = {each.metadata["Name"]: each for each in importlib.metadata.distributions()}
python = [
    [name, each.version, each.metadata.get("License-Expression") or ""] for name, each in found.items()
]
print(json.dumps({"debian": [line.split("\\t") for line in debian], "python": python}))
"""


def described(name: str, version: str, *command: str | Path) -> str:
    """Return the document of an image; `command` runs a Python in it. Raises: CalledProcessError."""
    said = subprocess.run([*command, "-c", LISTING], stdout=subprocess.PIPE, text=True, check=True).stdout
    listing = json.loads(said)
    components = [
        *(_component(f"deb/debian/{quote(package)}", package, number, f"?arch={arch}")
          for package, number, arch in listing["debian"]),
        *(_component(f"pypi/{quote(package.lower().replace('_', '-'))}", package, number, license_=license_)
          for package, number, license_ in listing["python"]),
    ]  # fmt: skip
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "bom-ref": name, "name": name, "version": version}},
        "components": sorted(components, key=lambda component: str(component["purl"])),
    }
    return json.dumps(document, indent=2) + "\n"


def _component(path: str, name: str, version: str, rest: str = "", license_: str = "") -> dict[str, Any]:
    purl = f"pkg:{path}@{quote(version)}{rest}"
    licenses = {"licenses": [{"expression": license_}]} if license_ else {}
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, **licenses}
