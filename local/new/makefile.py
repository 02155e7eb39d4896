"""The copy's Makefile: ours without the targets of left-out parts."""

import re

# Each target is on one of the two lists; a test says so.
LEFT_OUT = (
    "bench", "chaos", "docs", "new", "outage", "poolers", "release", "scale", "soak", "test-backup", "test-compose",
    "test-ha", "test-new",
    ".venv-backup/.installed", ".venv-docs/.installed", ".venv-ha/.installed", ".venv-release/.installed",
)  # fmt: skip
KEPT = (
    "audit", "check", "clean", "dashboards", "dev", "format", "fuzz", "help", "install", "lint", "load", "lock", "run",
    "test", "test-deploy", "test-fast", "types", ".venv/.installed", ".venv/.installed-deploy",
    ".venv-audit/.installed", ".venv-fuzz/.installed",
)  # fmt: skip
DOCKER = ("test-deploy", ".venv/.installed-deploy")
UPDATE = """
update-pglifeguard: install  ## Take another pglifeguard into vendor/ (FROM=../pglifeguard, a checkout, or a wheel)
	$(BIN)/python -m local.library "$(FROM)"
"""
# Two checkouts of one version are two libraries, and pip would take the one that is there for the other.
FORGET = "\t$(BIN)/python -m pip uninstall -qq --yes pglifeguard\n"
_TARGET = re.compile(r"^([\w./-]+):(?!=)", re.MULTILINE)
_COMPILE = "uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header --emit-find-links"


def targets(text: str) -> set[str]:
    """Return the targets of a Makefile."""
    return {*_TARGET.findall(text)} - {".PHONY"}


def makefile(text: str, *, docker: bool) -> str:
    """Leave targets out, with the variables that only they read, and write `lock` for the copy's pyproject.toml."""
    left_out = {*LEFT_OUT, *(() if docker else DOCKER)}
    paragraphs = [part for part in text.split("\n\n") if not (left_out & targets(part))]
    text = "\n\n".join(paragraphs)
    text = re.sub(r"# The extras of the library .*\nSERVED.*\n", "", text)
    text = re.sub(r"# How long `make soak` takes.*\nSECONDS.*\n", "", text)
    phony = [*(target for target in KEPT if "/" not in target and target not in left_out), "update-pglifeguard"]
    text = re.sub(r"^\.PHONY:.*$", f".PHONY: {' '.join(phony)}", text, flags=re.MULTILINE)
    lines = [
        "lock: install  ## Resolve the dependencies anew into the hashed locks",
        f"\t$(BIN)/{_COMPILE} pyproject.toml -o requirements.txt",
        f"\t$(BIN)/{_COMPILE} pyproject.toml --group dev -c requirements.txt -o requirements-dev.txt",
    ]
    others = _COMPILE.replace(" --emit-find-links", "")
    lines += [
        f"\t$(BIN)/{others} --group {group} -c requirements-dev.txt -o requirements-{group}.txt"
        for group in ("audit", *(["deploy"] if docker else []))
    ]
    # It shares an environment with nothing, so no other lock bounds it.
    lines.append(f"\t$(BIN)/{others} --group fuzz -o requirements-fuzz.txt")
    recipe = "\n".join(lines)
    text = re.sub(r"^lock: .*\n(?:\t.*\n)+", lambda _: f"{recipe}\n{UPDATE}", text, flags=re.MULTILINE)
    installing = re.compile(r"^\t.*pip install .*--require-hashes -r requirements-dev\.txt\n", re.MULTILINE)
    text = installing.sub(lambda line: f"{FORGET}{line[0]}", text)
    return text.replace("ARGS=tests/pglifeguard", "ARGS=tests/app").replace("make %-14s", "make %-19s")
