# Sourced where a virtual environment is made: one command at a time makes it, the others wait.

# Takes the lock FILE until unlock_venv, or until this command and what it started have ended. PYTHON is any interpreter.
lock_venv() { # FILE PYTHON
    exec 9>"$1"
    # Python's flock, because macOS has no command of that name. The lock belongs to what 9 stands for, not to a process.
    "$2" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && return
    echo "Another command is installing (it holds $1): waiting until it is done" >&2
    "$2" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
}

unlock_venv() {
    exec 9>&-
}
