#!/usr/bin/env bash
# Installs what only the tests of the Prefect UI need: Debian's Chromium, and what drives it in .venv. Idempotent.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

hint="the tests of the UI need chromium: apt-get install chromium fonts-dejavu-core"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! command -v chromium >/dev/null; then
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "$hint" >&2; exit 2; }
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        echo "$hint" >&2
        exit 2
    fi
fi
if ! .venv/bin/python -c 'import playwright' 2>/dev/null; then
    .venv/bin/pip install --disable-pip-version-check --no-input -c infra/constraints.txt -e ".[ui]" >"$log" 2>&1 ||
        { tail -n 5 "$log" >&2; exit 2; }
fi
