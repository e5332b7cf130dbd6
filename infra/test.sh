#!/usr/bin/env bash
# Set-up, then the tests. Without flags: the quick tiers (unit, integration, end to end), in parallel.
#   --lint            no tests: ruff and mypy
#   --slow            the heavy ones: kill storms, soak, full fuzzing
#   --sglang          the SGLang tier: real SGLang servers on the CPU, in an environment of their own
#   --sglang --slow   the heavy ones of that tier: lost and hung servers, tensor parallelism
#   --chaos           whole runs that are disturbed, one at a time, measured into docs/reliability.md; -k redis picks some
# Anything else is passed to pytest; -n 0 runs the quick tiers in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lint=""
slow="not slow"
sglang="not sglang"
chaos=""
arguments=()
for argument in "$@"; do
    case "$argument" in
        --lint) lint=yes ;;
        --slow) slow="slow" ;;
        --sglang) sglang="sglang" ;;
        --chaos) chaos=yes ;;
        *) arguments+=("$argument") ;;
    esac
done

bash infra/setup.sh
if [ "$lint" ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    exec .venv/bin/mypy
fi
bash infra/test_services.sh
if [ "$sglang" = sglang ]; then bash infra/sglang/setup.sh --cpu; fi
if [ "$chaos" ]; then bash infra/sglang/setup.sh --cpu; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$chaos" ]; then exec .venv/bin/python -m pytest -m chaos "${arguments[@]}"; fi
# The quick tiers wait as much as they compute, so there are more workers than cores of a small machine. Each takes
# neighbouring tests, which share a store or a server; the heavy tiers load the whole machine and run alone.
parallel=()
if [ "$slow $sglang" = "not slow not sglang" ]; then parallel=(-n 4 --dist worksteal); fi
exec .venv/bin/python -m pytest -m "$slow and $sglang and not gpu and not chaos" "${parallel[@]}" "${arguments[@]}"
