output "registry" {
  description = "Where the images are."
  value       = local.registry
}

output "workspace" {
  description = "The `workspace` of every run."
  value       = "gs://${google_storage_bucket.workspace.name}/runs"
}

output "cluster_settings" {
  description = "Content of infra/k8s/overlays/gke/settings.env."
  value       = <<-EOT
    BUCKET=${google_storage_bucket.workspace.name}
    BASE_MODEL=${var.base_model}
    SFT_ADAPTER=/workspace/adapters/sft
    FLOW_IMAGE=${local.registry}/flow:${var.image_tag}
    TRAIN_IMAGE=${local.registry}/train:${var.image_tag}
    SERVE_IMAGE=${local.registry}/serve:${var.image_tag}
  EOT
}

output "next_1_kubectl" {
  description = "Point kubectl at the cluster."
  value       = "gcloud container clusters get-credentials ${google_container_cluster.this.name} --location ${var.zone} --project ${var.project_id}"
}

output "next_2_images" {
  description = "Build the images and push them; in the root of the repository."
  value       = "gcloud builds submit --project ${var.project_id} --service-account ${google_service_account.builder.name} --config infra/docker/cloudbuild.yaml --substitutions _REGISTRY=${local.registry},_TAG=${var.image_tag}"
}

output "next_3_secrets" {
  description = "Put the secrets into Secret Manager and the cluster; asks for the judge's key and the hub token."
  value       = "infra/k8s/secrets.sh ${var.project_id} ${var.name}"
}

output "next_4_adapter" {
  description = "Copy the SFT adapter to where vLLM and the flows find it."
  value       = "gcloud storage rsync --recursive YOUR-SFT-ADAPTER gs://${google_storage_bucket.workspace.name}/adapters/sft"
}

output "next_5_install" {
  description = "Install server, workers and vLLM; in the root of the repository."
  value       = "terraform -chdir=infra/gcp output -raw cluster_settings > infra/k8s/overlays/gke/settings.env && kubectl apply -k infra/k8s/overlays/gke"
}
