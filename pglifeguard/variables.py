"""Sorting the variables of the environment: settings, typing errors of settings, and those of a platform.

A typing error that is ignored leaves the default in place in silence, so it ends the start. But other programs write
into the environment too. Kubernetes adds seven variables for each service in the namespace (`DATABASE_SERVICE_HOST` for
one that is called "database"), and providers describe a database by names that begin with DATABASE_. These are reported
and ignored.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import NamedTuple

PREFIX = "database_"
# What platforms say of a database, word by word. In the names of settings are URL, NAME, and PASSWORD with
# FILE, but none of the others.
_OF_PLATFORMS = frozenset(
    """
    addr address admin arn branch ca cert certificate cluster connection db dialect direct domain driver dsn
    endpoint engine external file fqdn host hostname hosts id instance internal ip jdbc key master name no non
    owner pass passwd password pooled pooler pooling port prisma private project proto protocol proxy public pwd
    read reader readonly region ro root rw schema secret server service shadow socket ssl sslmode string tcp tls
    type udp unix unpooled uri url urls user username uuid version write writer zone
    """.split()  # noqa: SIM905  # A list of quoted words is four times as long.
)
_GROUPS = frozenset({"replica", "analytics"})
# A letter from a setting each, and yet names that providers and other libraries use.
_NO_TYPING_ERRORS = frozenset({"database_uri", "oauth_secret"})
# Names shorter than these are other words when one letter is different, or two.
_LETTERS_FOR_ONE_MISTAKE = 3
_LETTERS_FOR_TWO_MISTAKES = 8
# As much of a name that begins with DATABASE_ has to be that of a setting to be taken for it.
_ALIKE = 0.8
_IS_NO_SETTING = "is not a setting of this service."
_ALL = "All are in docs/settings.md of pglifeguard."


class Findings(NamedTuple):
    """What is in the environment and not read: sentences, by what becomes of them."""

    refused: tuple[str, ...]
    ignored: tuple[str, ...]


def inspect(names: Iterable[str], known: Iterable[str], *, guarding: AbstractSet[str]) -> Findings:
    """Sort the variables that are no setting; all names are in lower case.

    `known` are the settings, each of which may end in _FILE too. What begins with DATABASE_ is ours to be strict about.
    Of the others it is only told what looks like a typing error, and refused if it looks like one of `guarding`, whose
    defaults leave the service open.
    """
    return _inspect(frozenset(names), frozenset(known), frozenset(guarding))


# Of everything that settings do this takes longest, and a process reads them from the same names each time.
@lru_cache(16)
def _inspect(found: frozenset[str], known: frozenset[str], guarding: frozenset[str]) -> Findings:
    settings = _Settings(known)
    refused: list[str] = []
    ignored: list[str] = []
    for name in sorted(found - settings.names):
        shown, near = name.upper(), settings.mistyped(name)
        own = name.removeprefix(PREFIX)
        if own == name:
            if near is not None and near not in found:
                strict = near.removesuffix("_file") in guarding or (near.startswith(PREFIX) and _begins_like_ours(name))
                (refused if strict else ignored).append(f"{shown} {_IS_NO_SETTING} Did you mean {near.upper()}? {_ALL}")
            continue
        if near is None and not (_OF_PLATFORMS | _GROUPS).issuperset(_words(own)):
            near = settings.resembled(name)
        if near is not None:
            refused.append(f"{shown} {_IS_NO_SETTING} Did you mean {near.upper()}? {_ALL}")
        elif _OF_PLATFORMS.isdisjoint(_words(own)):
            refused.append(f"{shown} {_IS_NO_SETTING} {_ALL}")
        else:
            ignored.append(f"{shown} {_IS_NO_SETTING} It looks like a platform's, and is ignored.")
    return Findings(tuple(refused), tuple(ignored))


class _Settings:
    """The names of the settings, prepared to be compared with many others."""

    def __init__(self, known: Iterable[str]) -> None:
        self.names = frozenset(form for name in known for form in (name, f"{name}_file"))
        ordered = sorted(self.names)
        self._by_words = {tuple(sorted(_singular(name))): name for name in reversed(ordered)}
        self._letters = [(name.replace("_", ""), name, _allowed_mistakes(_own_part(name))) for name in ordered]

    def mistyped(self, name: str) -> str | None:
        """Find the setting of the same words in another order or number, or with a letter or two wrong."""
        if name in _NO_TYPING_ERRORS:
            return None
        if (same_words := self._by_words.get(tuple(sorted(_singular(name))))) is not None:
            return same_words
        if any(letter.isdigit() for letter in name):  # DATABASE_2_URL is another database's, and AUTH0 is a company.
            return None
        return min(self._distances(name.replace("_", "")), default=(0, None))[1]

    def resembled(self, name: str) -> str | None:
        """Find the setting that has one word more or less, or most letters in common."""
        words, own = set(_words(name)), _own_part(name)
        for _, other, _ in self._letters:
            # Of one word there is only URL and ECHO, and DATABASE_BACKUP_URL is neither.
            if "_" in _without_groups(other) and len(words ^ set(_words(other))) == 1:
                return other
        from difflib import SequenceMatcher  # noqa: PLC0415  # Only for who has misspelt something.

        ratio, best = max((SequenceMatcher(None, own, _own_part(other)).ratio(), other) for other in self.names)
        return best if ratio >= _ALIKE else None

    def _distances(self, letters: str) -> Iterator[tuple[int, str]]:
        mine = frozenset(letters)
        for other, name, allowed in self._letters:
            # Most names are told apart by their lengths and letters: the distance takes a hundred times longer.
            if abs(len(letters) - len(other)) <= allowed and len(mine.symmetric_difference(other)) <= 2 * allowed:
                mistakes = _mistakes(letters, other, allowed)
                if mistakes <= allowed:
                    yield mistakes, name


def _words(name: str) -> list[str]:
    return [word for word in name.split("_") if word and not word.isdecimal()]


def _singular(name: str) -> list[str]:
    words = filter(None, name.split("_"))
    return [word.removesuffix("ies") + "y" if word.endswith("ies") else word.rstrip("s") for word in words]


def _without_groups(name: str) -> str:
    """Cut off what settings have in common: else a short one would be like every other."""
    own = name.removeprefix(PREFIX)
    if own != name:
        own = own.removeprefix("replica_").removeprefix("analytics_")
    return own.removesuffix("_file")


def _own_part(name: str) -> str:
    return _without_groups(name).replace("_", "")


def _begins_like_ours(name: str) -> bool:
    return _mistakes(name.partition("_")[0], PREFIX.removesuffix("_"), 2) <= 2  # noqa: PLR2004


def _allowed_mistakes(letters: str) -> int:
    return (len(letters) >= _LETTERS_FOR_ONE_MISTAKE) + (len(letters) >= _LETTERS_FOR_TWO_MISTAKES)


def _mistakes(one: str, other: str, allowed: int) -> int:
    """Count the letters that are wrong, missing, too many or swapped (Damerau and Levenshtein's distance).

    Stops counting as soon as there are more than `allowed`.
    """
    older: list[int] = []
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        older, before, row = before, row, [i]
        for j, other_letter in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other_letter))
            if i > 1 and j > 1 and (letter, one[i - 2]) == (other[j - 2], other_letter):
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        # A swap looks back two rows, and no row has less than the least of the two before it.
        if min(*before, *row) > allowed:
            break
    return row[-1]
