#!/bin/sh
# Make what is missing on the Prefect server that PREFECT_API_URL names. Run it in the root of a checkout or of the image.
#   register.sh pools   the work pools; one that exists keeps its settings
#   register.sh         the work pools, every deployment as prefect.yaml has it, and the automations
# PREFLOW_TRAIN_IMAGE: the train image that the pool l4-spot starts from.
# PREFLOW_COMPUTE_CLASS: GKE's ComputeClass that its Jobs ask for.
# PREFLOW_NOTIFY_BLOCK: type/name of the notification block that tells of crashed and silent runs.
# PREFLOW_GCP_CREDENTIALS, PREFLOW_GCP_SECRETS: blocks of prefect-gcp to make as well; see deployments/gcp_blocks.py.
set -eu
template=deployments/l4-spot.job-template.json

make_pool() {
    prefect work-pool create "$@" || prefect work-pool inspect "$1" >/dev/null
}

named=$(mktemp)
trap 'rm -f "$named"' EXIT
sed -e "s|preflow-train:latest|${PREFLOW_TRAIN_IMAGE:-preflow-train:latest}|" \
    -e "s|\"title\": \"Compute class\",|&${PREFLOW_COMPUTE_CLASS:+ \"default\": \"$PREFLOW_COMPUTE_CLASS\",}|" "$template" >"$named"
make_pool local --type process
make_pool l4-spot --type kubernetes --base-job-template "$named"
[ "${1:-all}" != pools ] || exit 0
prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
python deployments/automations.py
[ -z "${PREFLOW_GCP_CREDENTIALS:-}${PREFLOW_GCP_SECRETS:-}" ] || python deployments/gcp_blocks.py
