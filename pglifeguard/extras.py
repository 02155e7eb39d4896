"""What to install, where a part of the library is used without the extra that it needs."""


def not_installed(error: ModuleNotFoundError, extra: str, part: str) -> ModuleNotFoundError:
    """Return an error that names the extra; the same one where what is missing is a module of the library itself."""
    if error.name is None or error.name.partition(".")[0] == "pglifeguard":
        return error
    cure = f"pip install 'pglifeguard[{extra}]'"
    text = f"{part} needs {error.name}, which is not installed. It comes with an extra: {cure}"
    return ModuleNotFoundError(text, name=error.name, path=error.path)
