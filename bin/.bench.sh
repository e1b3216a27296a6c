# Sourced after .venv.sh by what runs benchmarks: installs on the first use what only they need.
if ! "$venv/bin/python" -c 'import grpc, psutil' 2>/dev/null; then
    lock_venv "$venv.lock" "$venv/bin/python"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root[bench]" >&2
    unlock_venv
fi
