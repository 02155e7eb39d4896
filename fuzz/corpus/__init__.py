"""The hostile corpus: what is known to have broken services, each with what may come of it."""

from collections.abc import Iterator

from fuzz.corpus import bodies, framing, headers, leaving, targets
from fuzz.corpus.requests import Known
from fuzz.wire import Case


def corpus(known: Known) -> list[Case]:
    """Return every case, in the same order each time; names are unique."""
    cases = [*_all(known)]
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two cases of the corpus have the name {twice[0]!r}.")
    return cases


def _all(known: Known) -> Iterator[Case]:
    for part in (bodies, targets, headers, framing, leaving):
        yield from part.cases(known)
