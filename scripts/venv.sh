# Sourced by the other scripts.

# make_venv [EXTRA]: make .venv with the project and one extra in it. Installs again only when
# pyproject.toml changed or the extra is asked for the first time. PYTHON of another version than
# that of .venv makes it anew.
make_venv() {
    python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
    then
        echo "$0: needs Python 3.11 to 3.13 as $python; set PYTHON to its path" >&2
        exit 2
    fi
    version='import sys; print(*sys.version_info[:2], sep=".")'
    if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] &&
        [ "$("$python" -c "$version")" != "$(.venv/bin/python -c "$version")" ]; then
        echo "$0: making .venv anew, with Python $("$python" -c "$version")" >&2
        "$python" -m venv --clear .venv
    fi
    stamp=".venv/.installed-${1:-base}"
    if ! cmp -s pyproject.toml "$stamp"; then
        echo "$0: installing into .venv, which takes minutes once" >&2
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}"
        cp pyproject.toml "$stamp"
    fi
}

set -eu
cd "$(dirname "$0")/.."
