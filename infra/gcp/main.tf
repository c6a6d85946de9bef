locals {
  services = toset([
    "artifactregistry.googleapis.com", "billingbudgets.googleapis.com", "cloudbuild.googleapis.com",
    "cloudresourcemanager.googleapis.com", "compute.googleapis.com", "container.googleapis.com", "iam.googleapis.com",
    "secretmanager.googleapis.com",
  ])
  registry = "${var.region}-docker.pkg.dev/${var.project_id}/${google_artifact_registry_repository.images.repository_id}"
  pool     = "projects/${data.google_project.this.number}/locations/global/workloadIdentityPools/${var.project_id}.svc.id.goog"
  # The Kubernetes service accounts of infra/k8s/base/accounts.yaml that use the bucket.
  bucket_accounts = toset(["preflow-flow", "preflow-train"])
  # Read by infra/k8s/secrets.sh; the values never pass through terraform, whose state would keep them.
  secrets = toset(["prefect-auth", "postgres-password", "vllm-api-key", "judge-api-key", "hf-token"])
}

data "google_project" "this" {
  project_id = var.project_id
}

resource "google_project_service" "this" {
  for_each           = local.services
  service            = each.value
  disable_on_destroy = false
}

resource "google_artifact_registry_repository" "images" {
  repository_id = "preflow"
  location      = var.region
  format        = "DOCKER"
  description   = "Images of preflow: flow, train, serve."

  cleanup_policies {
    id     = "keep-recent"
    action = "KEEP"
    most_recent_versions {
      keep_count = 5
    }
  }
  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition {
      older_than = "2592000s"
    }
  }
  depends_on = [google_project_service.this]
}

# Builds the images: the account that Cloud Build takes by itself has no rights in many new projects.
resource "google_service_account" "builder" {
  account_id   = "${var.name}-builder"
  display_name = "Builds of the images of ${var.name}"
  depends_on   = [google_project_service.this]
}

resource "google_project_iam_member" "builder" {
  project = var.project_id
  role    = "roles/cloudbuild.builds.builder"
  member  = google_service_account.builder.member
}

resource "google_storage_bucket" "workspace" {
  name                        = "${var.project_id}-${var.name}"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  versioning {
    enabled = true
  }
  # What was replaced or deleted can be got back for a while, then costs nothing.
  lifecycle_rule {
    condition {
      days_since_noncurrent_time = var.keep_days
    }
    action {
      type = "Delete"
    }
  }
  lifecycle_rule {
    condition {
      age = 1
    }
    action {
      type = "AbortIncompleteMultipartUpload"
    }
  }
}

# The flows write completions, checkpoints and adapters, and delete old checkpoints.
resource "google_storage_bucket_iam_member" "flows" {
  for_each = local.bucket_accounts
  bucket   = google_storage_bucket.workspace.name
  role     = "roles/storage.objectUser"
  member   = "principal://iam.googleapis.com/${local.pool}/subject/ns/${var.namespace}/sa/${each.value}"
  # The identity pool comes into being with the first cluster that uses it.
  depends_on = [google_container_cluster.this]
}

resource "google_secret_manager_secret" "this" {
  for_each  = local.secrets
  secret_id = "${var.name}-${each.value}"
  replication {
    auto {}
  }
  depends_on = [google_project_service.this]
}

resource "google_billing_budget" "this" {
  count           = var.billing_account == "" ? 0 : 1
  billing_account = var.billing_account
  display_name    = var.name

  budget_filter {
    projects = ["projects/${data.google_project.this.number}"]
  }
  amount {
    specified_amount {
      currency_code = "USD"
      units         = tostring(floor(var.budget_usd))
    }
  }
  dynamic "threshold_rules" {
    for_each = [0.5, 0.9, 1.0]
    content {
      threshold_percent = threshold_rules.value
    }
  }
  depends_on = [google_project_service.this]
}
