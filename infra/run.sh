#!/usr/bin/env bash
# Set-up, then one whole training run of the demo: target, store, producer, consumer, evaluation, archive.
# Arguments are passed on: bash infra/run.sh --set training.max_steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash infra/setup.sh
exec .venv/bin/draftline run infra/runs/demo.yaml "$@"
