# Sourced by commands that create a virtual environment: one at a time creates it, the others wait.

# Lock FILE until unlock_venv, or until this command and its child processes have ended. PYTHON is any interpreter.
lock_venv() { # FILE PYTHON
    exec 9>"$1"
    # Python's flock, because macOS has no flock command. The lock belongs to the open file behind 9, not to a process.
    "$2" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    echo "Another command is installing (it holds $1): waiting until it is done" >&2
    "$2" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

unlock_venv() {
    exec 9>&-
}
