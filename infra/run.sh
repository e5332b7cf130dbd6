#!/usr/bin/env bash
# Set-up, then one whole training run: target, store, producer, consumer, evaluation, archive. The demo's, or that of a
# run document given first; what the documents in infra/runs/ need is fetched. Further arguments are passed on:
#   bash infra/run.sh --set training.max_steps=50
#   bash infra/run.sh infra/runs/smollm2.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
document=infra/runs/demo.yaml
case "${1:-}" in
    *.yaml | *.yml) document=$1; shift ;;
esac
bash infra/setup.sh
if [ "$(basename "$document")" = smollm2.yaml ]; then bash infra/smollm2/setup.sh; fi
exec .venv/bin/draftline run "$document" "$@"
