#!/usr/bin/env bash
# Put the secrets into the cluster that kubectl points at; a second run keeps what is there.
#   secrets.sh                 the judge's key and the model hub's token come from OPENAI_API_KEY and HF_TOKEN (may be unset)
#   secrets.sh PROJECT PREFIX  everything comes from Secret Manager; what is missing there is stored there first
# The passwords of server, database and vLLM are made here. No value is shown or stands in a command line.
set -euo pipefail
project=${1:-} prefix=${2:-}
namespace=preflow
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# stored COMMAND...: print what the command prints, if it succeeds. Nothing if what it asks for does not exist; any other
# failure ends the script, for a password that cannot be read now must not be replaced by a new one.
stored() {
    local answer status=0
    answer=$("$@" 2>"$scratch/complaint") || status=$?
    # An error text may stand on either stream: kubectl prints those of a template on stdout.
    if [ "$status" -eq 0 ]; then
        printf %s "$answer"
    elif ! printf '%s\n' "$answer" | cat - "$scratch/complaint" | grep -qiE 'not.?found|executing template'; then
        printf 'secrets.sh: %s failed (exit %s): %s\n' "$1 ${*: -1}" "$status" "$(cat "$scratch/complaint")" >&2
        return 1
    fi
}

# in_cluster SECRET KEY
in_cluster() {
    local encoded
    encoded=$(stored kubectl --namespace "$namespace" get secret "$1" --ignore-not-found --output "jsonpath={.data.$2}") ||
        return 1
    printf %s "$encoded" | base64 --decode
}

in_manager() { stored gcloud secrets versions access latest --project "$project" --secret "$prefix-$1"; }

# value NAME SECRET KEY [VALUE IF MISSING]
value() {
    local found
    if [ -n "$project" ]; then found=$(in_manager "$1") || return 1; else found=$(in_cluster "$2" "$3") || return 1; fi
    if [ -z "$found" ] && [ -n "${4:-}" ]; then
        found=$4
        [ -z "$project" ] || printf %s "$found" |
            gcloud secrets versions add "$prefix-$1" --project "$project" --data-file=- >&2 || return 1
    fi
    printf %s "$found"
}

# ask NAME TEXT: print the environment's value, or on a terminal what is typed in
ask() {
    local given=${!1:-}
    if [ -z "$given" ] && [ -t 0 ]; then read -rsp "$2 (empty: none): " given && echo >&2; fi
    printf %s "$given"
}

# put SECRET KEY VALUE [KEY VALUE ...]
put() {
    local name=$1 folder
    shift
    folder=$(mktemp -d "$scratch/XXXXXX")
    while [ $# -gt 0 ]; do
        [ -z "$2" ] || printf %s "$2" >"$folder/$1"
        shift 2
    done
    kubectl --namespace "$namespace" create secret generic "$name" --from-file="$folder" --dry-run=client --output yaml |
        kubectl apply --filename - >&2
}

kubectl apply --filename "$(dirname "$0")/base/namespace.yaml" >&2
# All are read before any is written: a failure leaves the cluster as it was.
server=$(value prefect-auth prefect-auth auth-string "admin:$(random)")
database=$(value postgres-password postgres-auth password "$(random)")
vllm=$(value vllm-api-key vllm-auth api-key "$(random)")
judge=$(value judge-api-key preflow-flow OPENAI_API_KEY "$(ask OPENAI_API_KEY "key of the judge")")
hub=$(value hf-token preflow-train HF_TOKEN "$(ask HF_TOKEN "token of the model hub, for a gated base model")")
put prefect-auth auth-string "$server"
put postgres-auth password "$database" connection-url "postgresql+asyncpg://prefect:$database@postgres:5432/prefect"
put vllm-auth api-key "$vllm"
put preflow-flow OPENAI_API_KEY "$judge"
put preflow-train HF_TOKEN "$hub"
