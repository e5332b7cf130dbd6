# Sourced by the set-ups of the environments beside the trainer's, which say `directory`, `pins` and `force`.
#
# `up_to_date` tells whether the environment was finished with these pins. `begin` makes an empty one under a lock, or
# goes on with one that was cut off; then `check` runs what builds it, and `finish` says that it is whole.

stamp="$directory/.draftline-stamp"
log="$directory/setup.log"

up_to_date() {
    [ -z "$force" ] && [ -x "$directory/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$pins" ]
}

lock() {
    exec 9>"$directory/.setup.lock"
    flock 9
}

begin() {
    local python
    python="$(command -v python3.11 || true)"
    if [ -z "$python" ]; then
        echo "setup.sh: python3.11 is not on PATH; install it (apt-get install python3.11 python3.11-venv)" >&2
        exit 1
    fi
    mkdir -p "$directory"
    lock
    rm -f "$stamp"
    echo "building $1 in $directory; log: $log"
    if [ -n "$force" ] || ! "$directory/bin/python" -c '' 2>/dev/null; then
        "$python" -m venv --clear "$directory"
        lock  # the file that was held is gone
    fi
    : >"$log"
}

check() {
    if ! "$@" >>"$log" 2>&1; then
        echo "setup.sh: $* failed; the end of $log:" >&2
        tail -n 15 "$log" >&2
        exit 1
    fi
}

install() {
    check "$directory/bin/python" -m pip install -q "$@"
}

finish() {
    echo "$pins" >"$stamp"
    echo "done: $directory/bin/python"
}
