#!/usr/bin/env bash
# Makes the environments (.venv, .venv-contract, a ComfyUI in .cache/comfyui) and runs all tests.
#   --comfyui DIR    test with this ComfyUI instead, which is only read; so does COMFYUI_DIR=DIR. What it requires is
#                    installed into .venv, where the next run without it has the pinned one's again
#   --transformers VERSION   run what depends on transformers with this one, such as 4.57, in .venv-transformers, which
#                            lies over .venv; without it, all tests run with the newest
#   PYTHON=...       the Python 3.10 - 3.12 to make .venv from
# Other arguments go to pytest. The contract tests are one test of the others; `test.sh tests/contract ...` runs only
# them.
set -euo pipefail
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
    --comfyui)
        COMFYUI_DIR=$(realpath -- "${2:?--comfyui takes the folder of a ComfyUI}")
        shift 2
        ;;
    --transformers)
        transformers=${2:?--transformers takes a version, such as 4.57}
        shift 2
        ;;
    *)
        arguments+=("$1")
        shift
        ;;
    esac
done
set -- ${arguments[@]+"${arguments[@]}"} # an empty array counts as unset in older bash
[ -z "${COMFYUI_DIR:-}" ] || export COMFYUI_DIR
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/python.sh
"$PYTHON" scripts/lib comfyui
[ -z "${transformers:-}" ] || exec "$PYTHON" scripts/lib transformers_env "$transformers" "$@"
"$PYTHON" scripts/lib contract
case " $*" in
*" tests/contract"*) exec .venv/bin/python tests/contract/run.py "$@" ;;
esac
# Two workers, as tests/conftest.py shares the files out.
exec .venv/bin/python -m pytest -rs -n 2 --no-loadscope-reorder "$@"
