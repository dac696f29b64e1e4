#!/usr/bin/env bash
# Makes a video with the embedded model in a real ComfyUI; `bash scripts/demo.sh --help` lists the options.
set -euo pipefail
scripts=$(dirname "${BASH_SOURCE[0]}")
. "$scripts/lib/python.sh"
exec "$PYTHON" "$scripts/lib" demo "$@"
