# Sets PYTHON to a Python 3.10 - 3.12: the one in $PYTHON, else the first that is found. Source this file.

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

if [ -n "${PYTHON:-}" ]; then
    supported "$PYTHON" || { echo "PYTHON=$PYTHON is not a Python 3.10 - 3.12" >&2; exit 1; }
else
    for PYTHON in python3 python3.12 python3.11 python3.10 none; do
        if supported "$PYTHON"; then break; fi
    done
    if [ "$PYTHON" = none ]; then
        echo "No Python 3.10 - 3.12 found. Install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
        exit 1
    fi
fi
