"""`python -m app`."""

try:
    from app.cli import cli
except ImportError as error:
    if error.name != "fcntl":
        raise
    raise SystemExit(str(error)) from None  # Windows: the sentence is enough.

cli(prog_name="python -m app")
