#!/usr/bin/env bash
# Build the SGLang environment .venv-sglang/ beside the trainer's. Idempotent: a finished environment whose pins have
# not changed is left alone. SGLang pins its own torch and transformers, so it never shares the trainer's environment.
#
#   bash infra/sglang/setup.sh --cuda    stock SGLang with its own torch and CUDA kernels
#   bash infra/sglang/setup.sh --cpu     no kernels, for tests and demonstrations on a machine without a GPU
#
# --force builds anew; --dir DIR builds elsewhere (then set DRAFTLINE_SGLANG_PYTHON=DIR/bin/python);
# --extra-index-url and the like go into pip's own configuration (PIP_* variables or pip.conf).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$(cd "$here/../.." && pwd)"
sglang_version=0.5.23
torchvision_version=0.28.0
cuda_mooncake="mooncake-transfer-engine==0.3.13.post1"
cpu_mooncake="mooncake-transfer-engine-non-cuda==0.3.13.post1"

variant=""
force=""
directory="$repo/.venv-sglang"
while [ $# -gt 0 ]; do
    case "$1" in
        --cpu | --cuda) variant="${1#--}" ;;
        --force) force=yes ;;
        --dir) shift; directory="${1:?--dir needs a directory}" ;;
        -h | --help) sed -n '2,10p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "setup.sh: unknown argument $1; see --help" >&2; exit 2 ;;
    esac
    shift
done
if [ -z "$variant" ]; then
    echo "setup.sh: say --cuda (a machine with GPUs) or --cpu (tests without one)" >&2
    exit 2
fi

pins="$(
    {
        echo "$variant $sglang_version $torchvision_version $cuda_mooncake $cpu_mooncake $repo"
        cat "$here"/requirements-*.txt "$here"/stand_ins/* "$repo/pyproject.toml"
    } | sha256sum | cut -d' ' -f1
)"
source "$here/../environment.sh"
if up_to_date; then
    echo "SGLang environment ($variant) is up to date: $directory"
    exit 0
fi

begin "the SGLang environment ($variant)"
if [ "$variant" = cuda ]; then
    install "sglang==$sglang_version"
    install -r "$here/requirements-draftline.txt" "$cuda_mooncake"
else
    # torch alone and first: nothing that follows may choose another build of it.
    install "$(grep '^torch==' "$here/requirements-cpu.txt")"
    install -r "$here/requirements-cpu.txt" -r "$here/requirements-draftline.txt" "$cpu_mooncake"
    install --no-deps "sglang==$sglang_version" "torchvision==$torchvision_version"
    site="$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp "$here"/stand_ins/*.py "$site/"
    echo "import torchvision_schemas" >"$site/torchvision_schemas.pth"
fi
install --no-deps --no-build-isolation -e "$repo"

check "$directory/bin/python" - <<'PYTHON'
from importlib.metadata import entry_points, version

import msgspec, pydantic_settings, torch, transformers  # noqa: E401

import sglang
from mooncake.store import MooncakeDistributedStore

names = [point.name for point in entry_points(group="sglang.srt.plugins")]
assert "draftline_capture" in names, f"the capture plugin is not among the entry points: {names}"
print("sglang", version("sglang"), "torch", torch.__version__, "transformers", transformers.__version__, names)
PYTHON
finish
