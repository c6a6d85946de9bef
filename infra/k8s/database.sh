#!/usr/bin/env bash
# Back up the Prefect server's database (runs, logs, artifacts, blocks, automations), or put a backup in its place.
#   database.sh backup FILE    while everything runs; the file appears whole or not at all
#   database.sh restore FILE   it is read in first, next to the other; then server and workers stop for the exchange of
#                              the two, and start again. Trainings on the GPU nodes go on
# The workspace holds what runs have made; without the database the same settings find it again.
set -euo pipefail
action=${1:?backup or restore} file=${2:?name the file}
namespace=preflow
users=(deploy/prefect-server deploy/prefect-worker deploy/flow-worker)

in_database() { kubectl --namespace "$namespace" exec --stdin statefulset/postgres -- "$@"; }

scale() { kubectl --namespace "$namespace" scale "${users[@]}" --replicas "$1"; }

case "$action" in
    backup)
        trap 'rm -f "$file.partial"' EXIT
        in_database pg_dump --username=prefect --format=custom prefect </dev/null >"$file.partial"
        mv "$file.partial" "$file"
        ;;
    restore)
        for name in restored replaced; do in_database dropdb --username=prefect --if-exists "$name" </dev/null; done
        in_database createdb --username=prefect restored </dev/null
        # Into an empty database: tables of a newer server must not stay where an older one's are put back.
        in_database pg_restore --username=prefect --dbname=restored --single-transaction <"$file"
        trap 'scale 1' EXIT
        scale 0
        kubectl --namespace "$namespace" wait --for=delete pod --selector preflow.dev/component=prefect-server --timeout=120s
        in_database psql --username=prefect --dbname=postgres --single-transaction --set=ON_ERROR_STOP=1 \
            --command='ALTER DATABASE prefect RENAME TO replaced' --command='ALTER DATABASE restored RENAME TO prefect' </dev/null
        in_database dropdb --username=prefect replaced </dev/null
        ;;
    *)
        echo "database.sh: $action is neither backup nor restore" >&2
        exit 2
        ;;
esac
