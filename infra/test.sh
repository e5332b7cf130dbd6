#!/usr/bin/env bash
# Set-up, then the tests. Without flags: the quick tiers (unit, integration, one end-to-end run).
#   --slow     the heavy ones: kill storms, soak, full fuzzing
#   --sglang   the SGLang tier: real SGLang servers on the CPU, in an environment of their own
# Anything else is passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier="not slow and not sglang and not gpu"
arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) tier="slow and not sglang" ;;
        --sglang) tier="sglang and not slow" ;;
        *) arguments+=("$argument") ;;
    esac
done

bash infra/setup.sh
bash infra/test_services.sh
if [ "$tier" = "sglang and not slow" ]; then bash infra/sglang/setup.sh --cpu; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -m "$tier" "${arguments[@]}"
