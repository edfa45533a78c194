#!/usr/bin/env bash
# What an operator does on the server, as services of compose.yaml: prepare, register, run.
set -euo pipefail

export FLWR_HOME=/tmp/flwr
mkdir -p "$FLWR_HOME"
cat > "$FLWR_HOME/config.toml" << 'TOML'
[superlink.demo]
address = "127.0.0.1:8000"
root-certificates = "/certificates/ca.crt"
TOML

prepare() {
    [ -e /demo/certificates/ca/ca.crt ] ||
        fgl certificates /demo/certificates --host superlink --site site0 --site site1 --site site2
    cp /examples/gate.conf /demo/certificates/server/
    mkdir -p /demo/runs /demo/models /demo/certificates/operator
    cp /demo/certificates/server/ca.crt /demo/certificates/operator/
    for site in site0 site1 site2; do
        cp "/demo/certificates/$site/supernode.pub" "/demo/certificates/operator/$site.pub"
    done
    chown -R "$FGL_UID" /demo/certificates /demo/runs
    if [ -z "$(find /demo/sites -mindepth 2 -print -quit 2> /dev/null)" ]; then
        python3 /examples/write_sites.py /demo/sites
        chown -R "$FGL_UID" /demo/sites
    fi
}

# A second start finds the keys registered.
register() {
    for site in site0 site1 site2; do
        answer=$(flwr supernode register "/certificates/$site.pub" demo --name "$site" 2>&1) ||
            [[ "$answer" == *"already in use"* ]] || { echo "$answer" >&2; exit 1; }
    done
}

# `flwr run --stream` ends with 0 even when the run fails, so its status is asked for.
run() {
    config=${FGL_RUN_CONFIG:-'run-name="demo" dataset="folder" num-clients=3 num-server-rounds=2 image-size=8 model="cnn"
        images-per-class=64 num-inference-steps=8 server-epochs=8 local-epochs=1 server-finetune-epochs=1 batch-size=16'}
    run_id=$(flwr run /app demo --run-config "$(tr '\n' ' ' <<< "$config")" --format json |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["run-id"])')
    flwr log "$run_id" demo --stream
    for _ in $(seq 30); do
        status=$(flwr list demo --run-id "$run_id" --format json |
            python3 -c 'import json, sys; print(json.load(sys.stdin)["runs"][0]["status"])')
        [[ "$status" != finished* ]] || break
        sleep 1
    done
    echo "run $run_id: $status"
    [ "$status" = finished:completed ]
}

"$@"
