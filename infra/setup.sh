#!/usr/bin/env bash
# Makes .venv ready: Python packages as pinned in infra/constraints.txt, and Mooncake's system libraries.
# Idempotent: a second call compares a stamp and returns. DRAFTLINE_ACCELERATOR=cpu|cuda12|cuda13 overrides the
# detection, PYTHON names the interpreter to build the environment with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }

accelerator() {
    case "${DRAFTLINE_ACCELERATOR:-}" in
        "") ;;
        cpu | cuda12 | cuda13) echo "$DRAFTLINE_ACCELERATOR"; return ;;
        *) fail "DRAFTLINE_ACCELERATOR: expected cpu, cuda12 or cuda13, found $DRAFTLINE_ACCELERATOR" ;;
    esac
    local major
    major=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\)\..*/\1/p' | head -n 1)
    case "$major" in
        "") echo cpu ;;
        12) echo cuda12 ;;
        *) echo cuda13 ;;
    esac
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "expected Python 3.11, found none on the PATH; install it or set PYTHON=/path/to/python3.11"
}

# The libraries that Mooncake's wheel takes from the system, with the Debian package of each.
declare -A LIBRARIES=(
    [libibverbs.so.1]=libibverbs1 [libnuma.so.1]=libnuma1 [libcurl.so.4]=libcurl4
)

missing_packages() {
    local library
    for library in "${!LIBRARIES[@]}"; do
        .venv/bin/python - "$library" <<'PY' || echo "${LIBRARIES[$library]}"
import ctypes, glob, sys, sysconfig
beside = glob.glob(f"{sysconfig.get_path('purelib')}/mooncake_transfer_engine*.libs/{sys.argv[1]}")
try:
    ctypes.CDLL(sys.argv[1])
except OSError:
    sys.exit(0 if beside else 1)
PY
    done
}

install_libraries() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "installing system libraries: ${missing[*]}"
    if ! command -v apt-get >/dev/null; then
        fail "these libraries are needed: ${missing[*]} (Debian's names), and this system has no apt-get; install them and call again"
    fi
    if [ "$(id -u)" = 0 ]; then
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } \
            >.venv/apt.log 2>&1 || fail "apt-get could not install ${missing[*]}; its output is in .venv/apt.log"
    else
        unpack_libraries "${missing[@]}"
    fi
}

# Without root: unpack the packages, and what they need, where Mooncake's own run path looks.
unpack_libraries() {
    local target scratch needed
    target=$(echo .venv/lib/python3.11/site-packages/mooncake_transfer_engine*.libs)
    [ -d "$target" ] || fail "found no library folder of the Mooncake wheel in .venv; remove .venv and call again"
    mapfile -t needed < <(apt-get --print-uris -qq -y --no-install-recommends install "$@" 2>/dev/null |
        awk '{ split($2, part, "_"); print part[1] }')
    [ "${#needed[@]}" -gt 0 ] || needed=("$@")
    scratch=$(mktemp -d)
    if ! (cd "$scratch" && apt-get download "${needed[@]}" >download.log 2>&1 &&
        for package in *.deb; do dpkg -x "$package" root; done); then
        rm -rf "$scratch"
        fail "could not fetch $* without root; ask an administrator for: apt-get install $*"
    fi
    find "$scratch/root" -name '*.so*' -path '*lib*' -exec cp -a {} "$target/" \;
    rm -rf "$scratch"
    say "unpacked ${needed[*]} beside the environment"
}

install_packages() {
    local python=$1 extras=$2
    if [ ! -x .venv/bin/python ]; then
        say "creating .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    say "installing packages (a few minutes the first time; log in .venv/setup.log)"
    if ! .venv/bin/pip install --disable-pip-version-check --no-input -c infra/constraints.txt -e ".[$extras]" \
        >.venv/setup.log 2>&1; then
        tail -n 15 .venv/setup.log >&2
        fail "pip failed; the whole output is in .venv/setup.log"
    fi
}

main() {
    local variant stamp python
    variant=$(accelerator)
    stamp=$({ cat pyproject.toml infra/constraints.txt infra/setup.sh; echo "$variant $PWD"; } | sha256sum)
    if [ "$(cat .venv/draftline.stamp 2>/dev/null)" = "$stamp" ]; then return; fi
    mkdir -p .venv
    exec 9>.venv/setup.lock
    flock 9
    if [ "$(cat .venv/draftline.stamp 2>/dev/null)" = "$stamp" ]; then return; fi
    python=$(find_python)  # by itself: a failure inside an argument would not end the script
    install_packages "$python" "$variant,wandb,mlflow,dev"
    install_libraries
    .venv/bin/python -c 'import mooncake.store' 2>.venv/mooncake.log ||
        fail "Mooncake does not load: $(tail -n 1 .venv/mooncake.log)"
    echo "$stamp" >.venv/draftline.stamp
    say "ready"
}

main "$@"
