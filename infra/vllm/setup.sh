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
source "$here/../environment.sh"
if up_to_date; then
    echo "vLLM environment is up to date: $directory"
    exit 0
fi

begin "the vLLM environment"
# torch alone and first: nothing that follows may choose another build of it.
install "$(grep '^torch==' "$requirements")"
install --no-deps -r "$requirements"
check "$directory/bin/python" -c "import torch, vllm; assert torch.version.cuda is None, torch.__version__; vllm.LLM"
finish
