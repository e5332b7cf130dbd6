#!/usr/bin/env bash
# Set-up, then one whole training run: target, store, producer, consumer, evaluation, archive.
# Without a run document it is the demo; the other arguments are passed on:
#   bash infra/run.sh --set training.max_steps=50
#   bash infra/run.sh infra/runs/compare.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
document=infra/runs/demo.yaml
if [[ "${1:-}" == *.yaml ]]; then
  document=$1
  shift
fi
bash infra/setup.sh
exec .venv/bin/draftline run "$document" "$@"
