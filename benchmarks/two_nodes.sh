#!/usr/bin/env bash
# Two Ray nodes on this machine, a study submitted to them, one of them killed, and the study finishing all the same.
#
#   bash benchmarks/two_nodes.sh [STUDY] [OUT]       # the quickstart, into a fresh folder, when left out; with the project's .venv active
#
# The second node's raylet gets a kill -9 once some trials are scored. Ends with the study's status and what Ray says of the nodes.
set -euo pipefail
study="${1:-studies/quickstart.yaml}"
place="$(mktemp -d /tmp/u2XXXX)"
out="${2:-$place/out}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(16))')"
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR="$place"
read -r gcs server client agent1 agent2 < <(python -c '
import socket
sockets = [socket.socket() for _ in range(5)]
for entry in sockets:
    entry.bind(("127.0.0.1", 0))
print(*(entry.getsockname()[1] for entry in sockets))')
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$server"
common=(--node-ip-address=127.0.0.1 --object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0)

raylets() { pgrep -f "raylet/raylet .*$place" | sort; }
end() { for pid in $(pgrep -f "$place"); do test "$pid" = $$ || kill -9 "$pid" 2> /dev/null || true; done; }
trap 'test $? = 0 || cat "$place"/*.txt; end' EXIT   # where a node did not start, Ray says why
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
field() { uipe status "$job" --json | python -c "import json, sys; status = json.load(sys.stdin); print($1)"; }

ray start --head --port="$gcs" --dashboard-host=127.0.0.1 --dashboard-port="$server" --ray-client-server-port="$client" \
  --dashboard-agent-listen-port="$agent1" --temp-dir="$place" --num-cpus=1 "${common[@]}" > "$place/head.txt" 2>&1
first="$(raylets)"
ray start --address="127.0.0.1:$gcs" --num-cpus=2 --dashboard-agent-listen-port="$agent2" "${common[@]}" > "$place/second.txt" 2>&1
second="$(comm -13 <(echo "$first") <(raylets))"
echo "head: raylet $first, 1 CPU; second node: raylet $second, 2 CPUs"

say uipe submit "$study" --out "$out"
job="$(uipe studies --json | python -c 'import json, sys; print(json.load(sys.stdin)["studies"][0]["job"])')"
say uipe submit "$study" --out "$out"
until test "$(field 'status.get("trials", {}).get("done", 0) >= 4 or status["state"] not in ("pending", "running")')" = True; do sleep 1; done
say kill -9 "$second"
say uipe status "$job"
say uipe logs "$job" --follow
say uipe status "$job"
say uipe studies
ray status --address "127.0.0.1:$gcs" 2> /dev/null | sed -n '/Node status/,/^Resources/p' | head -n -1
