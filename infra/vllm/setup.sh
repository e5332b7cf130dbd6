#!/usr/bin/env bash
# Build the vLLM environment .venv-vllm/ beside the trainer's, for the tests that let a stock vLLM decode with exported
# drafts on a CPU. Idempotent: a finished environment whose pins have not changed is left alone. Nothing of this project
# is installed in it.
#
#   bash infra/vllm/setup.sh
#
# --force builds anew; --extra-index-url and the like go into pip's own configuration (PIP_* variables or pip.conf).
# The CPU build of torch must be among what pip finds.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
directory="$(cd "$here/../.." && pwd)/.venv-vllm"
requirements="$here/requirements-cpu.txt"

force=""
case "${1:-}" in
    "") ;;
    --force) force=yes ;;
    -h | --help) sed -n '2,9p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "setup.sh: unknown argument $1; see --help" >&2; exit 2 ;;
esac

pins="$(sha256sum "$requirements" | cut -d' ' -f1)"
stamp="$directory/.draftline-stamp"
if [ -z "$force" ] && [ -x "$directory/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$pins" ]; then
    echo "vLLM environment is up to date: $directory"
    exit 0
fi

python="$(command -v python3.11 || true)"
if [ -z "$python" ]; then
    echo "setup.sh: python3.11 is not on PATH; install it (for example: apt-get install python3.11 python3.11-venv)" >&2
    exit 1
fi

mkdir -p "$directory"
exec 9>"$directory/.setup.lock"
flock 9
log="$directory/setup.log"
rm -f "$stamp"
echo "building the vLLM environment in $directory; log: $log"
if [ -n "$force" ] || ! "$directory/bin/python" -c '' 2>/dev/null; then
    "$python" -m venv --clear "$directory"
    exec 9>"$directory/.setup.lock"
    flock 9
fi
: >"$log"

check() {
    if ! "$@" >>"$log" 2>&1; then
        echo "setup.sh: $* failed; the end of $log:" >&2
        tail -n 15 "$log" >&2
        exit 1
    fi
}

# torch alone and first: nothing that follows may choose another build of it.
check "$directory/bin/python" -m pip install -q "$(grep '^torch==' "$requirements")"
check "$directory/bin/python" -m pip install -q --no-deps -r "$requirements"
check "$directory/bin/python" -c "import torch, vllm; assert torch.version.cuda is None, torch.__version__; vllm.LLM"
echo "$pins" >"$stamp"
echo "done: $directory/bin/python"
