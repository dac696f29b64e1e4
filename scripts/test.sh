#!/usr/bin/env bash
# Makes the environment (.venv, a ComfyUI in .cache/comfyui) and runs all tests; arguments go to pytest.
#   PYTHON=...       the Python 3.10 - 3.12 to make .venv from
#   COMFYUI_DIR=...  test against this ComfyUI instead
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/python.sh
"$PYTHON" scripts/lib/comfyui.py
exec .venv/bin/python -m pytest -rs "$@"
