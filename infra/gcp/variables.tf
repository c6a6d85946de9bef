variable "project_id" {
  description = "Id of the Google Cloud project; it must exist and have billing."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id is the project's id (lower-case letters, digits, dashes), not its name or number."
  }
}

variable "billing_account" {
  description = "Id of the billing account, XXXXXX-XXXXXX-XXXXXX, for the budget alert; empty: no alert."
  type        = string
  default     = ""
}

variable "budget_usd" {
  description = "Monthly budget in US$; mails at 50, 90 and 100 % of it. An alert, not a limit."
  type        = number
  default     = 50
}

variable "region" {
  description = "Region of cluster, bucket and images; it must have L4 GPUs."
  type        = string
  default     = "europe-west4"
}

variable "zone" {
  description = "Zone of the cluster, in the region. A zonal cluster's management fee is covered by the free tier."
  type        = string
  default     = "europe-west4-a"
}

variable "gpu_zones" {
  description = "Zones of the region in which GPU nodes may come up: where L4 are offered, see gcloud compute accelerator-types list."
  type        = list(string)
  default     = ["europe-west4-a", "europe-west4-b", "europe-west4-c"]
  validation {
    condition     = alltrue([for zone in var.gpu_zones : startswith(zone, "${var.region}-")])
    error_message = "gpu_zones are zones of another region than region: a node pool's zones are in its cluster's region."
  }
}

variable "name" {
  description = "Name of cluster and network, and prefix of the rest."
  type        = string
  default     = "preflow"
}

variable "namespace" {
  description = "Kubernetes namespace that infra/k8s installs into."
  type        = string
  default     = "preflow"
}

variable "admin_cidrs" {
  description = "Address ranges from which kubectl may reach the cluster, e.g. [\"203.0.113.7/32\"]; empty: from anywhere, with credentials."
  type        = list(string)
  default     = []
}

variable "cpu_machine_type" {
  description = "Machine of the one node that always runs: server, database, workers."
  type        = string
  default     = "e2-standard-4"
}

variable "gpu_machine_type" {
  description = "Machine with one L4; g2-standard-8 has 8 cores and 32 GB, which the job template's defaults fit."
  type        = string
  default     = "g2-standard-8"
}

variable "max_gpu_nodes" {
  description = "GPU nodes at once in each of the two pools, at most: one trains, one serves."
  type        = number
  default     = 2
}

variable "extended_grace" {
  description = "Give pods 100 s and not 15 s before a spot node goes. Needs a control plane of 1.35.0-gke.1171000 or later."
  type        = bool
  default     = false
}

variable "base_model" {
  description = "Base model that vLLM serves: a hub name, or /workspace/models/NAME for a copy of it in the bucket."
  type        = string
  default     = "meta-llama/Llama-3.2-3B"
}

variable "image_tag" {
  description = "Tag of the three images; name a commit, so that a node never keeps an old one."
  type        = string
  default     = "latest"
}

variable "keep_days" {
  description = "Days for which replaced and deleted objects of the bucket can be got back."
  type        = number
  default     = 14
}
