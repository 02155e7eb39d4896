#!/usr/bin/env bash
# The project's own check, for any machine with Python 3.11 and make. Tests that need promtool are skipped without it.
set -euo pipefail
cd "$(dirname "$0")/.."

make check
make audit
make fuzz
