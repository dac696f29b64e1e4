#!/usr/bin/env bash
# Makes the environments (.venv, .venv-contract, a ComfyUI and some of its templates in .cache) and runs all tests.
#   --comfyui DIR    test with this ComfyUI instead, which is only read; same as COMFYUI_DIR=DIR. Its requirements are
#                    installed into .venv; the next run without the option restores those of the pinned ComfyUI
#   --transformers VERSION   run the tests that depend on transformers with this version, such as 4.57, in
#                            .venv-transformers on top of .venv; without it, all tests run with the newest
#   --torch-npu VERSION      run the contract tests with this torch_npu, such as 2.9.0.post6, and its torch, in
#                            .venv-contract-VERSION on top of .venv: a download of several GB on x86_64
#   PYTHON=...       the Python 3.10 - 3.12 to make .venv from
# Other arguments go to pytest. The contract tests count as two tests; `test.sh tests/contract ...` runs only them.
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
    --torch-npu)
        torch_npu=${2:?--torch-npu takes a version, such as 2.9.0.post6}
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
"$PYTHON" scripts/lib templates
[ -z "${transformers:-}" ] || exec "$PYTHON" scripts/lib transformers_env "$transformers" "$@"
[ -z "${torch_npu:-}" ] || exec "$PYTHON" scripts/lib contract "$torch_npu" "$@"
"$PYTHON" scripts/lib contract
case " $*" in
*" tests/contract"*) exec .venv/bin/python tests/contract/run.py "$@" ;;
esac
# Two workers, among which tests/conftest.py distributes the files.
exec .venv/bin/python -m pytest -rs -n 2 --no-loadscope-reorder "$@"
