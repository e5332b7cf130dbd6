#!/usr/bin/env bash
# Installs what only the tests need from the system: a Redis server for the channel's contract tests.
set -euo pipefail
command -v redis-server >/dev/null && exit 0
hint="the tests need redis-server: apt-get install redis-server"
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "$hint" >&2; exit 2; }
log=$(mktemp)
# The package would start a server of its own; the tests start theirs on a free port.
if ! { apt-get update && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends redis-server; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
    echo "$hint" >&2
    exit 2
fi
rm -f "$log"
