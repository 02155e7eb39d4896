"""Reading the environment: the process's over `.env`, secrets from files, and DATABASE_* sorted by database."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, cast

from dotenv.parser import parse_stream
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource

from pglifeguard.variables import PREFIX

NOT_FROM_HERE = (
    "Where something else in this process exports by these variables, "
    "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=pglifeguard leaves this library out."
)

# In place of Pydantic's, which tell how a value is read.
_WORDS = {
    "int_parsing": "has to be a whole number",
    "float_parsing": "has to be a number",
    "bool_parsing": "has to be true or false",
}

# The shortest prefix comes last, so that DATABASE_REPLICA_URL is the replica's and not the primary's REPLICA_URL.
PREFIXES = {"replicas": f"{PREFIX}replica_", "analytics": f"{PREFIX}analytics_", "primary": PREFIX}


class SettingsError(ValueError):
    """A setting is missing, unknown, out of bounds or at odds with another; the text says which and what to do."""


@contextmanager
def reading(file: object) -> Iterator[None]:
    """Say of this `.env`, which is read within, that it is no text in UTF-8, where it is none.

    Raises: SettingsError.
    """
    # It would write of the lines that `Variables.read` refuses.
    parser = logging.getLogger("dotenv.main")
    parser.addFilter(_silent)
    try:
        yield
    except UnicodeDecodeError:
        raise _no_text(file) from None
    finally:
        parser.removeFilter(_silent)


def _silent(_line: logging.LogRecord) -> bool:
    return False


def _no_text(file: object) -> SettingsError:
    return SettingsError(f"{file} is not UTF-8 text; save it as UTF-8.")


class Variables(PydanticBaseSettingsSource):
    """The environment over `.env`, by lower-case name; NAME_FILE is read from its file for every known NAME."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        environment: PydanticBaseSettingsSource | None = None,
        dotenv: PydanticBaseSettingsSource | None = None,
    ) -> None:
        super().__init__(settings_cls)
        file = cast("DotEnvSettingsSource", dotenv or DotEnvSettingsSource(settings_cls))
        sources = (file, environment or EnvSettingsSource(settings_cls))
        self._file = None if file.env_file is None else Path(str(file.env_file))
        self.variables: dict[str, str] = {}
        for source in cast("tuple[EnvSettingsSource, ...]", sources):
            self.variables |= {name.lower(): value for name, value in source.env_vars.items() if value}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not called: the fields are not looked up one by one."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Return what the environment says of the fields."""
        names = self.settings_cls.model_fields
        variables = self.read(lambda name: name in names)
        return {name: variables[name] for name in names if name in variables}

    def read(self, is_known: Callable[[str], bool]) -> dict[str, str]:
        """Return all variables, those of known settings from their files too.

        Raises: SettingsError when a known one is set twice, or its file cannot be read, and when a line of `.env` is
        none that sets something: what it was meant to set would be left at its default.
        """
        for where, values in self._written(is_known):
            for name, said in values.items():
                if is_known(name.removesuffix("_file")) and len(set(filter(None, said))) > 1:
                    raise SettingsError(f"{name.upper()} is set {len(said)} times in {where}, and differs; keep one.")
        return with_secret_files(self.variables, is_known)

    def _written(self, is_known: Callable[[str], bool]) -> Iterator[tuple[str, Mapping[str, list[str]]]]:
        """List what is written where, by lower-case name; the sources above keep the last of two in silence."""
        in_process: defaultdict[str, list[str]] = defaultdict(list)
        for name, value in os.environ.items():
            in_process[name.lower()].append(value)
        yield "the environment, in capitals and not", in_process
        if self._file is None or not self._file.is_file():
            return
        in_file: defaultdict[str, list[str]] = defaultdict(list)
        text = self._file.read_text(encoding="utf-8")
        # UTF-16 without its mark is UTF-8 by chance, of names that nobody knows.
        if "\0" in text:
            raise _no_text(self._file)
        for line in parse_stream(StringIO(text)):
            name = (line.key or "").lower()
            # The line itself is not repeated: there may be a password in it.
            if line.error or (line.value is None and is_known(name.removesuffix("_file"))):
                raise SettingsError(
                    f"Line {line.original.line} of {self._file} sets nothing: it is no NAME=value, or its quotes "
                    "are not closed."
                )
            if name:
                in_file[name].append(line.value or "")
        yield str(self._file), in_file


def with_secret_files(variables: Mapping[str, str], is_known: Callable[[str], bool]) -> dict[str, str]:
    """Read NAME_FILE from its file, for each known NAME.

    Raises: SettingsError when both are set, or the file cannot be read.
    """
    resolved = dict(variables)
    for name, value in variables.items():
        target = name.removesuffix("_file")
        if target == name or not is_known(target):
            continue
        if target in variables:
            raise SettingsError(f"Both {target.upper()} and {name.upper()} are set; keep one.")
        # The path is not repeated: it is a password where somebody wrote the secret itself.
        try:
            resolved[target] = Path(value).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise SettingsError(f"{name.upper()} names a file that cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise SettingsError(f"{name.upper()} names a file that is no text in UTF-8.") from None
        if not resolved[target]:
            raise SettingsError(f"{name.upper()} names a file that is empty.")
        del resolved[name]
    return resolved


def grouped(variables: Mapping[str, str], fields: Collection[str]) -> dict[str, dict[str, str]]:
    """Sort DATABASE_* by database; the prefixes are taken off."""
    groups: dict[str, dict[str, str]] = {group: {} for group in PREFIXES}
    for name in variables.keys() & names_by_database(fields):
        group = next(g for g, prefix in PREFIXES.items() if name.startswith(prefix))
        groups[group][name.removeprefix(PREFIXES[group])] = variables[name]
    return groups


def names_by_database(fields: Collection[str]) -> set[str]:
    """List the variables of all databases, each of which may set these fields."""
    return {f"{prefix}{name}" for prefix in PREFIXES.values() for name in fields}


def exported_signals() -> frozenset[str]:
    """Return which of "traces" and "metrics" the environment has an OTLP endpoint for, by OpenTelemetry's variables.

    Those of the process count, and not `.env`, because OpenTelemetry's SDK reads its other variables itself.

    Raises: SettingsError when they ask for a protocol that is not exported by.
    """

    def said(name: str) -> str:
        return os.environ.get(f"OTEL_{name}", "").strip()

    left_out = said("PYTHON_DISABLED_INSTRUMENTATIONS").split(",")
    if said("SDK_DISABLED").lower() == "true" or "pglifeguard" in map(str.strip, left_out):
        return frozenset()
    signals = set[str]()
    for signal in ("TRACES", "METRICS"):
        endpoint = said(f"EXPORTER_OTLP_{signal}_ENDPOINT") or said("EXPORTER_OTLP_ENDPOINT")
        if endpoint and said(f"{signal}_EXPORTER") != "none":
            protocol = said(f"EXPORTER_OTLP_{signal}_PROTOCOL") or said("EXPORTER_OTLP_PROTOCOL")
            if protocol not in {"", "http/protobuf"}:
                raise SettingsError(
                    f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}: {signal.lower()} are exported by http/protobuf alone. "
                    f"Unset it, and name the endpoint of that protocol, which usually is on port 4318. {NOT_FROM_HERE}"
                )
            signals.add(signal.lower())
    return frozenset(signals)


def split_urls(text: str) -> list[str]:
    """Split "postgresql://a/x, postgresql://b/x" without splitting a comma inside one URL's query."""
    return [url for url in re.split(r"\s*,\s*(?=[\w+.-]+://|$)", text.strip()) if url]


def sentences(error: ValidationError, *, hint: str = "") -> str:
    """Write one sentence for each mistake, with the name of its variable."""
    lines: dict[tuple[str, str], str] = {}
    for mistake in error.errors(include_url=False, include_input=False, include_context=False):
        group, *path = [part for part in mistake["loc"] if isinstance(part, str)] or [""]
        field = path[-1] if path else "url" if group in PREFIXES else group
        name = f"{PREFIXES.get(group, '')}{field}".upper()
        said = mistake["msg"].removeprefix("Value error, ").replace("Input should be", "has to be", 1)
        text = _WORDS.get(mistake["type"], said)
        if mistake["type"] == "missing":
            name = "DATABASE_URL"
            text = (
                "is not set: the service needs its primary database. Set it to "
                f"postgresql://user:password@host:5432/database{hint}"
            )
        # What the others inherit is wrong once, under the name by which it was set.
        end = "" if text.endswith("?") else "."
        lines.setdefault((field, text), f"{name}: {text}{end}".removeprefix(": "))
    return "\n".join(lines.values())
