#!/usr/bin/env bash
# Put the secrets into the cluster that kubectl points at; a second run keeps what is there.
#   secrets.sh                 the judge's key and the model hub's token come from OPENAI_API_KEY and HF_TOKEN (may be unset)
#   secrets.sh PROJECT PREFIX  everything comes from Secret Manager; what is missing there is stored there first
# The passwords of server, database and vLLM are made here. No value is shown or stands in a command line.
set -euo pipefail
project=${1:-} prefix=${2:-}
namespace=preflow

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

# in_cluster SECRET KEY
in_cluster() {
    kubectl --namespace "$namespace" get secret "$1" --output "go-template={{index .data \"$2\" | base64decode}}" 2>/dev/null
}

# in_manager NAME [VALUE IF MISSING]
in_manager() {
    gcloud secrets versions access latest --project "$project" --secret "$prefix-$1" 2>/dev/null && return
    [ -n "${2:-}" ] || return 0
    printf %s "$2" | gcloud secrets versions add "$prefix-$1" --project "$project" --data-file=- >&2
    printf %s "$2"
}

# value NAME SECRET KEY [VALUE IF MISSING]
value() {
    if [ -n "$project" ]; then in_manager "$1" "${4:-}"; else in_cluster "$2" "$3" || printf %s "${4:-}"; fi
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
    folder=$(mktemp -d)
    while [ $# -gt 0 ]; do
        [ -z "$2" ] || printf %s "$2" >"$folder/$1"
        shift 2
    done
    kubectl --namespace "$namespace" create secret generic "$name" --from-file="$folder" --dry-run=client --output yaml |
        kubectl apply --filename - >&2
    rm -r "$folder"
}

kubectl apply --filename "$(dirname "$0")/base/namespace.yaml" >&2
password=$(value postgres-password postgres-auth password "$(random)")
hub_token=$(value hf-token preflow-train HF_TOKEN "$(ask HF_TOKEN "token of the model hub, for a gated base model")")
put prefect-auth auth-string "$(value prefect-auth prefect-auth auth-string "admin:$(random)")"
put postgres-auth password "$password" connection-url "postgresql+asyncpg://prefect:$password@postgres:5432/prefect"
put vllm-auth api-key "$(value vllm-api-key vllm-auth api-key "$(random)")"
put preflow-flow OPENAI_API_KEY "$(value judge-api-key preflow-flow OPENAI_API_KEY "$(ask OPENAI_API_KEY "key of the judge")")"
put preflow-train HF_TOKEN "$hub_token"
