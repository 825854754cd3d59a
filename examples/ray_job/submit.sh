#!/bin/sh
# Start run.toml as a Ray job and follow its output: submit.sh STORAGE OUT [more options of alphasmith run]
#     RAY_API_SERVER_ADDRESS=http://head:8265 sh submit.sh postgresql+psycopg://alphasmith@db/alphasmith /shared/run-1
# The command is shown in Ray's dashboard: keep passwords out of it, e.g. in ~/.pgpass or PGPASSWORD on the cluster.
set -eu
storage=${1:?usage: submit.sh STORAGE OUT [options]}
out=${2:?usage: submit.sh STORAGE OUT [options]}
shift 2
cd "$(dirname "$0")"
exec ray job submit --working-dir . -- alphasmith run run.toml --engine ray --storage "$storage" --out "$out" "$@"
