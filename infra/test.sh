#!/usr/bin/env bash
# Set-up, then the tests. Without flags: the quick tiers (unit, integration, end to end), in parallel.
#   --lint            no tests: ruff and mypy
#   --slow            the heavy ones: kill storms, soak, full fuzzing
#   --sglang          the SGLang tier: real SGLang servers on the CPU, in an environment of their own
#   --sglang --slow   the heavy ones of that tier: lost and hung servers, tensor parallelism
#   --real            the tier with a real model, SmolLM2-135M, which is fetched from PyPI: about five minutes
#   --chaos           whole runs that are disturbed, one at a time, measured into docs/reliability.md; -k redis picks some
#   --ui              the Prefect UI in a browser: forms filled in, screenshots in pytest's folder
#   --vllm            the vLLM tier: a stock vLLM decodes with exported drafts on the CPU, in an environment of its own
# Anything else is passed to pytest; -n 0 runs the quick tiers in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lint=""
slow="not slow"
tier="quick"
arguments=()
for argument in "$@"; do
    case "$argument" in
        --lint) lint=yes ;;
        --slow) slow="slow" ;;
        --sglang | --vllm | --real | --ui | --chaos) tier="${argument#--}" ;;
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
case "$tier" in
    sglang | chaos) bash infra/sglang/setup.sh --cpu ;;
    vllm) bash infra/vllm/setup.sh ;;
    real) bash infra/smollm2/setup.sh ;;
    ui) bash infra/browser.sh ;;
esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE  # a hundred processes would each compile all of our modules, and each worker all tests
chosen="$slow and $tier and not chaos"
parallel=()
case "$tier" in
    chaos) chosen="chaos" ;;
    quick)
        chosen="$slow and not sglang and not vllm and not real and not ui and not chaos"
        # The quick tiers wait as much as they compute, so there are more workers than cores of a small machine. Each
        # takes neighbouring tests, which share a store or a server; the heavy tiers load the whole machine, and run
        # alone.
        if [ "$slow" = "not slow" ]; then parallel=(-n 4 --dist worksteal); fi
        ;;
esac
exec .venv/bin/python -m pytest -m "$chosen and not gpu" "${parallel[@]}" "${arguments[@]}"
