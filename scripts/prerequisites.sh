#!/bin/sh
# Checks by name what must be on the machine before `make demo` (Python, git, g++) or `make test` (also headers,
# libnuma1, chromium). Prints every missing one with the command that brings it, and fails if any is required.
set -u
python=${PYTHON:-python3}
missing=0

need() { # need NAME COMMAND-THAT-SUCCEEDS HINT
    if ! sh -c "$2" >/dev/null 2>&1; then
        echo "missing: $1 - $3" >&2
        missing=1
    fi
}

need "Python 3.11 or newer" "$python -c 'import sys; sys.exit(sys.version_info < (3, 11))'" "install it, or set PYTHON=/path/to/python3"
need "venv for Python" "$python -c 'import venv, ensurepip'" "apt-get install python3-venv"
need "git" "command -v git" "apt-get install git"
if [ "${1:-demo}" = test ]; then
    need "g++" "command -v g++" "apt-get install g++"
    need "Python headers" "test -f \"\$($python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')/Python.h\"" "apt-get install python3-dev"
    need "libnuma1" "ldconfig -p | grep -q libnuma.so.1" "apt-get install libnuma1"
    if ! command -v chromium >/dev/null 2>&1; then
        if [ "${CI:-}" = true ]; then
            echo "missing: chromium - apt-get install chromium" >&2
            missing=1
        else
            echo "note: chromium is missing, the browser tests will be skipped (apt-get install chromium)" >&2
        fi
    fi
fi
exit $missing
