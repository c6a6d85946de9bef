terraform {
  required_version = ">= 1.9"
  required_providers {
    google = {
      source = "hashicorp/google"
      # 7.39 brought the shutdown_grace_period fields of kubelet_config.
      version = ">= 7.39, < 8.0"
    }
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
  # A budget is billed to a project; this one.
  billing_project       = var.project_id
  user_project_override = true
}
