# Sourced after .venv.sh by commands that run benchmarks: the first run installs packages that only benchmarks need.
if ! "$venv/bin/python" -c 'import grpc, psutil' 2>/dev/null; then
    lock_venv "$venv.lock" "$venv/bin/python"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root[bench]" >&2
    unlock_venv
fi
