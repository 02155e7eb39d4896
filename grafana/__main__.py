"""`python -m grafana`: write each dashboard's JSON."""

import argparse

from grafana.files import FOLDER, rendered

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m grafana", description=__doc__).parse_args()
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
