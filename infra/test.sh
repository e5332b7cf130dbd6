#!/usr/bin/env bash
# Set-up, then the tests. Without flags: the quick tiers (unit, integration, end to end).
#   --slow            the heavy ones: kill storms, soak, full fuzzing
#   --sglang          the SGLang tier: real SGLang servers on the CPU, in an environment of their own
#   --sglang --slow   the heavy ones of that tier: lost and hung servers, tensor parallelism
# Anything else is passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

slow="not slow"
sglang="not sglang"
arguments=()
for argument in "$@"; do
    case "$argument" in
        --slow) slow="slow" ;;
        --sglang) sglang="sglang" ;;
        *) arguments+=("$argument") ;;
    esac
done

bash infra/setup.sh
bash infra/test_services.sh
if [ "$sglang" = sglang ]; then bash infra/sglang/setup.sh --cpu; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -m "$slow and $sglang and not gpu" "${arguments[@]}"
