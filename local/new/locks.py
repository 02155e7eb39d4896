"""The copy's locks: ours without what only left-out parts need, and with pglifeguard from `vendor/`."""

import re
from collections.abc import Collection
from operator import itemgetter

# A lock as uv writes it: a requirement, its hashes, and who asks for it.
_PACKAGE = re.compile(r"^(?P<name>[\w.-]+)(?:\[[\w,]+\])?==.*(?:\n .*)*\n", re.MULTILINE)
_ASKED_BY = re.compile(r"^    # +(?:via +)?(?P<by>[\w.-]+(?: \(pyproject\.toml(?::\w+)?\))?)$", re.MULTILINE)
# The requirements of pyproject.toml: the library's own, its extras', and those of groups.
_OURS = re.compile(r"pglifeguard \(pyproject\.toml(:\w+)?\)")


def pruned(lock: str, dropped: Collection[str], *, name: str, library: str | None) -> str:
    """Return a lock without the packages named and what only they ask for.

    `library` is pglifeguard's own entry, with its hash; None in a lock that does not have it.
    """
    # Of one package there may be several versions, each for other Pythons.
    packages = [(found["name"], found.group()) for found in _PACKAGE.finditer(lock)]
    askers = [(package, set(_ASKED_BY.findall(entry))) for package, entry in packages]
    kept = {package for package, by in askers if any(map(_OURS.match, by))} - {*dropped}
    while more := {package for package, by in askers if by & kept} - kept - {*dropped}:
        kept |= more
    gone = {package for package, _ in packages} - kept
    entries = [(package, _credited(entry, gone, name)) for package, entry in packages if package in kept]
    if library is None:
        return "".join(entry for _, entry in entries)
    own = f"    # via {name} (pyproject.toml)\n"
    if "-c requirements.txt" in lock:
        asked = ("-c requirements.txt", f"{name} (pyproject.toml)", f"{name} (pyproject.toml:dev)")
        own = "    # via\n" + "".join(f"    #   {by}\n" for by in asked)
    entries.append(("pglifeguard", f"{library}\n{own}"))
    # uv repeats what the lock says that it is resolved under.
    links = "--find-links vendor\n" * (1 + ("-c requirements.txt" in lock))
    return f"{links}\n" + "".join(entry for _, entry in sorted(entries, key=itemgetter(0)))


def _credited(entry: str, gone: Collection[str], name: str) -> str:
    """Take those out of an entry's askers that are gone, and name the others as in the copy's pyproject.toml.

    There what the service asks for is the project's own, and what the library does comes from the library.
    """

    def asker(found: re.Match[str]) -> str:
        group = found[1]
        if group is None:
            return "pglifeguard"
        return f"{name} (pyproject.toml)" if group == ":service" else f"{name} (pyproject.toml{group})"

    head, _, via = entry.partition("    # via")
    said = [_OURS.sub(asker, line.strip(" #")) for line in via.splitlines() if line.strip(" #")]
    left = sorted({by for by in said if by not in gone})
    if len(left) == 1:
        return f"{head}    # via {left[0]}\n"
    return f"{head}    # via\n" + "".join(f"    #   {by}\n" for by in left)
