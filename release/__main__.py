"""`python -m release 0.2.0`: from a clean tree to a tag and what is published with it. It pushes nothing."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from release.changelog import UNRELEASED, complaints, entries, notes, numbers
from release.image import described

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
BIN = Path(sys.executable).parent
SBOM_TOOL = ROOT / ".venv-release" / "bin" / "cyclonedx-py"
console = Console(highlight=False, soft_wrap=True, markup=False)


class Refused(Exception):
    """This cannot be released as it is; the text says all that is wrong."""


def main(
    version: Annotated[str, typer.Argument(help="The version to release, as in 0.2.0.")],
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but the tag.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run `make check` first.")] = True,
) -> None:
    """Check the tree, build wheel, sdist, SBOM, notes and image into dist/, and tag the commit; nothing is pushed."""
    try:
        _release(version, dry_run=dry_run, check=check)
    except Refused as refused:
        console.print(f"{refused}\nNothing was tagged.")
        raise typer.Exit(1) from None


def _release(version: str, *, dry_run: bool, check: bool) -> None:
    if wrong := list(refusals(version)):
        raise Refused("\n".join(f"- {sentence}" for sentence in wrong))
    commit = _output("git", "rev-parse", "HEAD")
    if check:
        _step("make check", "make", "check")
        # It takes its time, and somebody may have gone on working meanwhile.
        if _output("git", "rev-parse", "HEAD") != commit or _output("git", "status", "--porcelain"):
            raise Refused("The tree has changed meanwhile.")
    shutil.rmtree(DIST, ignore_errors=True)
    _step("Wheel and sdist", BIN / "hatchling", "build", "--directory", DIST)
    with tempfile.TemporaryDirectory() as directory:
        _describe(version, Path(directory) / "environment")
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (DIST / "notes.md").write_text(notes(text, version), encoding="utf-8")
    _build_image(version)
    console.print("\n".join(["", "In dist/:", *(f"  {path.name}" for path in sorted(DIST.iterdir()))]))
    if dry_run:
        console.print(f"\nA dry run: v{version} was not tagged.")
        return
    _step(
        f"Tag v{version}",
        "git",
        "tag",
        "--annotate",
        "--cleanup=verbatim",
        "--file",
        DIST / "notes.md",
        f"v{version}",
        commit,
    )
    console.print(
        "\nNothing was pushed. To publish it:\n"
        f"  git push --atomic origin main v{version}\n"
        "  .venv/bin/uv publish dist/*.whl dist/*.tar.gz\n"
        f"To take it back before that: git tag --delete v{version}"
    )


def refusals(version: str) -> Iterator[str]:
    """Say all that is in the way of releasing this version from this tree."""
    try:
        numbers(version)
    except ValueError as error:
        yield str(error)
        return
    if (branch := _output("git", "branch", "--show-current")) != "main":
        yield f"The branch is {branch or 'none'}, and releases are made of main."
    if _output("git", "status", "--porcelain"):
        yield "The tree is not clean: commit or remove what `git status` shows."
    if _output("git", "tag", "--list", f"v{version}"):
        yield f"v{version} is tagged already."
    package = (ROOT / "pglifeguard" / "__init__.py").read_text(encoding="utf-8")
    if (written := re.findall(r'^__version__ = "(.*)"$', package, re.MULTILINE)) != [version]:
        yield f"__version__ in pglifeguard/__init__.py is {', '.join(written)}."
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    yield from (f"CHANGELOG.md: {sentence}" for sentence in complaints(text))
    found = {entry.version: entry.text for entry in entries(text)}
    if version not in found:
        yield f"CHANGELOG.md has no ## [{version}] with a date."
    if found.get(UNRELEASED):
        yield f"CHANGELOG.md has entries under [{UNRELEASED}], and this commit has them: move them into [{version}]."
    if not SBOM_TOOL.exists():
        yield "cyclonedx-py is not installed: `make release` installs it into .venv-release."


def _describe(version: str, environment: Path) -> None:
    """Install the wheel with what the lock pins, import it, and write down what is installed."""
    python = environment / "bin" / "python"
    (wheel,) = DIST.glob("*.whl")
    _step("An environment for it", BIN / "uv", "venv", "--quiet", "--python", sys.executable, environment)
    pip = (BIN / "uv", "pip", "install", "--quiet", "--python", python)
    _step("What requirements.txt pins", *pip, "--require-hashes", "--requirement", ROOT / "requirements.txt")
    _step("The wheel", *pip, "--no-deps", wheel)
    # Beside the tree the wheel would not be what is imported.
    if (
        told := _output(python, "-c", "import pglifeguard; print(pglifeguard.__version__)", cwd=environment)
    ) != version:
        raise Refused(f"The wheel says that it is {told}.")
    document = DIST / "sbom.cdx.json"
    _step("SBOM", SBOM_TOOL, "environment", "--output-reproducible", "--output-file", document, python)


def _build_image(version: str) -> None:
    """Build the image of the service, and write down what is in it, where a Docker engine answers."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode != 0:
        console.print("→ The image was not built: no Docker engine answers.")
    else:
        image = f"lifeguard-app:{version}"
        _step("Image", docker, "build", "--tag", image, ROOT)
        console.print("→ SBOM of the image")
        run = (docker, "run", "--rm", "--network", "none", "--entrypoint", "python", image)
        (DIST / "sbom-image.cdx.json").write_text(described("lifeguard-app", version, *run), encoding="utf-8")


def _step(what: str, *command: str | Path) -> None:
    console.print(f"→ {what}")
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status != 0:
        raise Refused(f"That failed with exit status {status}.")


def _output(*command: str | Path, cwd: Path = ROOT) -> str:
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
