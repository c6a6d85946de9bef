"""Make blocks of prefect-gcp on the Prefect server that PREFECT_API_URL names; register.sh calls it where asked to.

PREFLOW_GCP_CREDENTIALS   name of the GcpCredentials block: for a workspace gs://NAME@bucket/prefix, and for the secrets
PREFLOW_GCP_KEY_FILE      a service account's JSON key, kept in the block; without one the block stands for the
                          credentials of the machine that uses it (workload identity)
PREFLOW_GCP_PROJECT       the project that the secrets are in; without it that of the key
PREFLOW_GCP_SECRETS       names of secrets in Secret Manager, with blanks between them: each gets a GcpSecret block of
                          its name, for api_key: gcp-secret:NAME
"""

import json
import os
import sys
from pathlib import Path

from prefect_gcp import GcpCredentials, GcpSecret


def make_credentials(name: str) -> GcpCredentials:
    """Save the GcpCredentials block, in the place of one that exists."""
    file, project = os.environ.get("PREFLOW_GCP_KEY_FILE"), os.environ.get("PREFLOW_GCP_PROJECT")
    try:
        info = json.loads(Path(file).expanduser().read_text()) if file else None
    except (OSError, ValueError) as error:
        sys.exit(f"PREFLOW_GCP_KEY_FILE={file}: no service account's key can be read there: {error}")
    block = GcpCredentials(service_account_info=info, project=project or (info or {}).get("project_id"))
    block.save(name, overwrite=True)
    return block


def main() -> None:
    """Make all blocks that the environment asks for."""
    name, secrets = os.environ.get("PREFLOW_GCP_CREDENTIALS", "preflow"), os.environ.get("PREFLOW_GCP_SECRETS", "")
    credentials = make_credentials(name)
    print(f"GcpCredentials block {name}: a workspace gs://{name}@bucket/prefix is read and written with it")
    if secrets and not credentials.project:
        sys.exit("PREFLOW_GCP_SECRETS: set PREFLOW_GCP_PROJECT to the project that the secrets are in")
    for secret in secrets.split():
        GcpSecret(gcp_credentials=credentials, secret_name=secret).save(secret, overwrite=True)
        print(f"GcpSecret block {secret}: give it as api_key, gcp-secret:{secret}")


if __name__ == "__main__":
    main()
