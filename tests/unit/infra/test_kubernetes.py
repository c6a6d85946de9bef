"""The cluster's manifests as kustomize builds them: valid, locked down, and in step with what the software calls."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_asyncio.client import ApiClient, BatchV1Api
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_AUTH_STRING, Settings, temporary_settings
from prefect.settings.legacy import _get_valid_setting_names
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from tests.fakes.kubernetes.jobs import pod_security_problems
from tests.fakes.process import ROOT
from tests.unit.infra.test_job_template import render

K8S = ROOT / "infra" / "k8s"
KUBERNETES = "1.33"
OVERLAYS = ("gke", "local")
Object = dict[str, Any]
SECRET = re.compile(r"^(?!PREFECT_INTEGRATIONS).*(PASSWORD|TOKEN|_KEY$|AUTH_STRING$|CONNECTION_URL)")

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the manifests")


@cache
def build(folder: Path) -> str:
    return subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout


def objects(overlay: str) -> list[Object]:
    return list(yaml.safe_load_all(build(K8S / "overlays" / overlay)))


def find(overlay: str, kind: str, name: str) -> Object:
    (found,) = (item for item in objects(overlay) if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


def workloads(overlay: str) -> Iterator[tuple[str, Object, Object]]:
    """Yield name, pod labels and pod of everything that runs."""
    for item in objects(overlay):
        if item["kind"] in ("Deployment", "StatefulSet"):
            template = item["spec"]["template"]
            yield item["metadata"]["name"], template["metadata"]["labels"], template["spec"]


def containers(pod: Object) -> list[Object]:
    return [*pod["containers"], *pod.get("initContainers", [])]


def environment(overlay: str, name: str, container: str) -> dict[str, Any]:
    pod = find(overlay, "Deployment", name)["spec"]["template"]["spec"]
    (found,) = (item for item in containers(pod) if item["name"] == container)
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in found["env"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubernetes_knows_every_field(overlay: str) -> None:
    import kubernetes_validate

    for item in objects(overlay):
        if item["kind"] == "ComputeClass":  # GKE's own
            continue
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
        assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "preflow"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_locked_down(overlay: str) -> None:
    """The namespace enforces the restricted standard; beyond that file systems are read-only and tokens rare."""
    for name, _, pod in workloads(overlay):
        assert pod["automountServiceAccountToken"] is (name in ("prefect-worker", "flow-worker")), name
        for container in containers(pod):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            for kind in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][kind]), name
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container.get(kind, {"timeoutSeconds": 5}).get("timeoutSeconds", 1) >= 5, f"{name}: {kind}"
            for item in container.get("env", []):
                assert "value" not in item or not SECRET.search(item["name"]), f"{name}: {item['name']}"
        assert pod_security_problems(pod) == []
    assert not [item for item in objects(overlay) if item["kind"] == "Secret"]
    maps = [item for item in objects(overlay) if item["kind"] == "ConfigMap"]
    assert not [key for item in maps for key in item["data"] if SECRET.search(key)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_referred_to_is_there(overlay: str) -> None:
    names = {(item["kind"], item["metadata"]["name"]) for item in objects(overlay)}
    for name, _, pod in workloads(overlay):
        assert ("ServiceAccount", pod["serviceAccountName"]) in names
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names, name
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names, name
        volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def secret_references(pod: Object) -> Iterator[tuple[str, str | None, bool]]:
    for container in containers(pod):
        for item in container.get("env", []):
            if reference := item.get("valueFrom", {}).get("secretKeyRef"):
                yield reference["name"], reference["key"], reference.get("optional", False)
        for item in container.get("envFrom", []):
            if reference := item.get("secretRef"):
                yield reference["name"], None, reference.get("optional", False)


def test_the_images_and_settings_of_the_project_reach_every_container() -> None:
    settings = find("gke", "ConfigMap", "cluster-settings")["data"]
    images = {container["image"] for _, _, pod in workloads("gke") for container in containers(pod)}
    assert {settings["FLOW_IMAGE"], settings["SERVE_IMAGE"]} <= images
    for worker in ("flow-worker", "prefect-worker"):
        assert environment("gke", worker, "pools")["PREFLOW_TRAIN_IMAGE"] == settings["TRAIN_IMAGE"]
    assert environment("gke", "vllm", "vllm")["MODEL"] == settings["BASE_MODEL"]
    pod = find("gke", "Deployment", "vllm")["spec"]["template"]["spec"]
    (bucket,) = (volume["csi"] for volume in pod["volumes"] if volume["name"] == "workspace")
    assert bucket["volumeAttributes"]["bucketName"] == settings["BUCKET"]
    for worker in ("flow-worker", "prefect-worker"):
        compute_class = {"cloud.google.com/compute-class": environment("gke", worker, "pools")["PREFLOW_COMPUTE_CLASS"]}
        assert pod["nodeSelector"] == compute_class
    kinds = find("gke", "ComputeClass", *compute_class.values())["spec"]["priorities"]
    pools = re.findall(r'name += "(l4-\S+)"', (ROOT / "infra" / "gcp" / "cluster.tf").read_text())
    assert [name for kind in kinds for name in kind["nodepools"]] == pools == ["l4-spot", "l4-on-demand"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prefect_knows_every_setting(overlay: str) -> None:
    """A misspelt setting is ignored without a word."""
    known = _get_valid_setting_names(Settings)
    names = {key for item in objects(overlay) if item["kind"] == "ConfigMap" for key in item["data"]}
    for _, _, pod in workloads(overlay):
        names |= {item["name"] for container in containers(pod) for item in container.get("env", [])}
    own = {name for name in names if name.startswith("PREFECT_")}
    assert "PREFECT_SERVER_API_AUTH_STRING" in own
    assert not {name for name in own if name not in known and not name.startswith("PREFECT_INTEGRATIONS_KUBERNETES_")}


def test_the_server_can_read_its_settings_and_keeps_what_it_must_not_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that cannot be read keeps the server from starting; a lease that is lost ends the run that holds it."""
    for line in (K8S / "base" / "server.env").read_text().splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setenv("HOME", "/home/preflow")
    settings = Settings()
    assert settings.server.services.db_vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    leases = importlib.import_module(settings.server.concurrency.lease_storage).__name__
    assert leases == "prefect.server.concurrency.lease_storage.filesystem"
    pod = find("gke", "Deployment", "prefect-server")["spec"]["template"]["spec"]
    claimed = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts[str(settings.home)] in claimed
    assert str(Path(str(settings.server.ui.static_directory)).parent) in mounts


def test_on_a_cluster_a_model_is_waited_for_longer_than_a_node_takes_to_come() -> None:
    name = "PREFLOW_MAX_OUTAGE_SECONDS"
    environ = {**os.environ, name: environment("gke", "flow-worker", "worker")[name]}
    ask = "from tasks.config import EndpointConfig as E; print(E.model_fields['max_outage_seconds'].default)"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == 3600


def test_links_lead_to_where_people_open_the_ui() -> None:
    for worker in ("flow-worker", "prefect-worker"):
        reference = environment("gke", worker, "worker")["PREFECT_UI_URL"]["configMapKeyRef"]
        config = find("gke", "ConfigMap", reference["name"])["data"]
        assert config[reference["key"]] + "/api" == config["PREFECT_SERVER_UI_API_URL"] == "http://localhost:4200/api"


@pytest.fixture
def worker_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that the worker's container gives it."""
    for name, value in environment("gke", "prefect-worker", "worker").items():
        if name.startswith("PREFECT_INTEGRATIONS_KUBERNETES_"):
            monkeypatch.setenv(name, value if isinstance(value, str) else "preflow")


async def test_the_auth_string_gets_into_a_job_by_reference(
    worker_settings: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KubernetesSettings().observer.namespaces == {"preflow"}
    sent: list[Object] = []

    async def create(api: BatchV1Api, namespace: str, body: Object) -> None:
        sent.append(body)

    monkeypatch.setattr(BatchV1Api, "create_namespaced_job", create)
    template = json.loads((ROOT / "deployments" / "l4-spot.job-template.json").read_text())
    with temporary_settings({PREFECT_API_AUTH_STRING: "admin:planted-secret-value"}):
        configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(
            template, {}, client=PrefectClient("http://127.0.0.1:9/api")
        )
        configuration.prepare_for_flow_run(FlowRun(flow_id="00000000-0000-4000-8000-000000000000", name="run"))
        assert "planted-secret-value" in json.dumps(configuration.job_manifest)
        async with ApiClient() as client:
            await KubernetesWorker("l4-spot")._create_job(configuration, client)
    (job,) = sent
    assert "planted-secret-value" not in json.dumps(job)
    (reference,) = (
        item["valueFrom"] for item in job["spec"]["template"]["spec"]["containers"][0]["env"]
        if item["name"] == "PREFECT_API_AUTH_STRING"
    )  # fmt: skip
    assert reference == {"secretKeyRef": {"name": "prefect-auth", "key": "auth-string"}}


def selects(policy: Object, labels: Object) -> bool:
    selector = policy["spec"]["podSelector"]
    return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", [])
    )


def who_reaches(labels: Object, port: int) -> list[Object]:
    """Return the peers that the policies let reach a port of the pods with these labels."""
    policies = [item for item in objects("gke") if item["kind"] == "NetworkPolicy" and selects(item, labels)]
    assert any("Ingress" in policy["spec"]["policyTypes"] for policy in policies)
    return [
        peer
        for policy in policies
        for rule in policy["spec"].get("ingress", [])
        if port in [item["port"] for item in rule["ports"]]
        for peer in rule["from"]
    ]


def test_adapters_are_loaded_from_inside_only() -> None:
    vllm = {"preflow.dev/component": "vllm"}
    assert who_reaches(vllm, 8000) == [{"podSelector": {"matchLabels": {"preflow.dev/flow": "true"}}}]
    assert who_reaches(vllm, 8080) == [
        {"namespaceSelector": {}, "podSelector": {"matchLabels": {"preflow.dev/client": "true"}}}
    ]
    gateway = (K8S / "base" / "gateway.conf").read_text()
    passed = re.findall(r"location = (\S+) { proxy_pass http://127\.0\.0\.1:8000; }", gateway)
    assert set(passed) == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}
    assert len(re.findall("location", gateway)) == len(passed) + 1
    assert "location / { return 404; }" in gateway
    assert all(
        item["spec"].get("type", "ClusterIP") == "ClusterIP" for item in objects("gke") if item["kind"] == "Service"
    )


def test_the_database_is_the_servers_alone_and_the_server_reaches_whom_it_notifies() -> None:
    server = {"preflow.dev/component": "prefect-server"}
    assert who_reaches({"preflow.dev/component": "postgres"}, 5432) == [{"podSelector": {"matchLabels": server}}]
    assert leads_to(server) == {443}
    assert leads_to({"preflow.dev/component": "flow-worker"}) >= {443, 6443, 8443}, "the API of Kubernetes"


def policies_of(labels: Object) -> list[Object]:
    return [item for item in objects("gke") if item["kind"] == "NetworkPolicy" and selects(item, labels)]


def leads_to(labels: Object) -> set[int]:
    """Return the ports anywhere outside that the policies let these pods reach."""
    return {
        item["port"]
        for policy in policies_of(labels)
        for rule in policy["spec"].get("egress", [])
        if any(peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0" for peer in rule["to"])
        for item in rule["ports"]
    }


async def test_every_selector_selects_something_and_every_port_is_open_at_both_ends() -> None:
    """A policy, Service or budget whose labels nobody has, and a way that only one side permits, are silent faults."""
    training = (await render())["spec"]["template"]
    running = {name: (labels, pod) for name, labels, pod in workloads("gke")}
    running["training"] = training["metadata"]["labels"], training["spec"]
    running["client"] = {"preflow.dev/client": "true"}, {"containers": []}

    def chosen(selector: Object) -> set[str]:
        return {name for name, (labels, _) in running.items() if selects({"spec": {"podSelector": selector}}, labels)}

    def ports(name: str) -> dict[int | str, int]:
        found = [port for item in running[name][1]["containers"] for port in item.get("ports", [])]
        numbers = {port["containerPort"]: port["containerPort"] for port in found}
        return {port["name"]: port["containerPort"] for port in found} | numbers

    opened, wanted = set(), set()
    for item in objects("gke"):
        name, spec = item["metadata"]["name"], item.get("spec", {})
        if item["kind"] == "Service":
            (target,) = chosen({"matchLabels": spec["selector"]})
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports(target)), name
        elif item["kind"] == "PodDisruptionBudget":
            assert len(chosen(spec["selector"])) == 1, name
        elif item["kind"] == "NetworkPolicy":
            own = chosen(spec["podSelector"])
            assert own, name
            for direction, side in (("ingress", "from"), ("egress", "to")):
                for rule in spec.get(direction, []):
                    peers = [chosen(peer["podSelector"]) for peer in rule[side] if "podSelector" in peer]
                    assert all(peers), f"{name}: {direction} of nobody"
                    ways = {(peer, me, port["port"]) for peer in set().union(*peers) for me in own
                            for port in rule["ports"]}  # fmt: skip
                    if direction == "ingress":
                        opened |= ways
                    else:
                        wanted |= {(me, peer, port) for peer, me, port in ways}
    outside = {way for way in opened if way[0] == "client"}
    assert wanted - opened == set(), "the other side does not let it in"
    assert opened - wanted - outside == set(), "its own side does not let it out"
    assert all(port in ports(to) for _, to, port in opened), "nobody listens there"
    for _, pod in running.values():
        for container in pod["containers"]:
            probes = [container[key] for key in container if key.endswith("Probe")]
            named = {probe[how]["port"] for probe in probes for how in ("httpGet", "tcpSocket") if how in probe}
            assert named <= {port["name"] for port in container.get("ports", [])}


# Names that a deployment of the pool may have; Prefect's worker makes them the pods' app.kubernetes.io/name.
@pytest.mark.slow  # every policy against every pod
@pytest.mark.parametrize("deployment", ["l4-spot", "vllm", "postgres", "prefect-server", "prefect-worker", "mine"])
async def test_training_pods_reach_what_they_need_whatever_their_deployment_is_called(deployment: str) -> None:
    job = await render(deployment=deployment)
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/name"] == deployment, "the worker writes over what the template says"
    names = {policy["metadata"]["name"] for policy in policies_of(labels)}
    assert names == {"default-deny", "dns", "flows", "outside-endpoint", "metadata-server"}
    assert leads_to(labels) == {443, 8000}
    for service in (item for item in objects("gke") if item["kind"] == "Service"):
        selector = service["spec"]["selector"]
        assert not selector.items() <= labels.items(), f"{service['metadata']['name']} would lead to a training"
    assert find("gke", "ServiceAccount", job["spec"]["template"]["spec"]["serviceAccountName"])


def test_the_port_of_an_outside_endpoint_is_a_setting(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    settings = tmp_path / "k8s" / "base" / "settings.env"
    settings.write_text(settings.read_text().replace("8000", "30080"))
    made = yaml.safe_load_all(build(tmp_path / "k8s" / "overlays" / "local"))
    (policy,) = (item for item in made if item["metadata"]["name"] == "outside-endpoint")
    assert policy["spec"]["egress"][0]["ports"] == [{"port": 30080, "protocol": "TCP"}]


KUBECTL = """#!{python}
import base64, pathlib, subprocess, sys, yaml
folder, arguments = pathlib.Path("{folder}"), sys.argv[1:]
with (folder / "commands").open("a") as log:
    print(*arguments, file=log)
if arguments[0] == "apply":
    if arguments[-1] == "-":
        made = yaml.safe_load(sys.stdin)
        (folder / "secrets" / made["metadata"]["name"]).write_text(yaml.safe_dump(made))
elif arguments[2:3] == ["get"]:
    if (folder / "outage").exists():
        sys.exit("The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?")
    file, output = folder / "secrets" / arguments[4], arguments[-1]
    if not file.exists():
        if "--ignore-not-found" in arguments:
            sys.exit(0)
        sys.exit(f'Error from server (NotFound): secrets "{{arguments[4]}}" not found')
    data = yaml.safe_load(file.read_text()).get("data", {{}})
    if output.startswith("jsonpath="):
        print(data.get(output.removeprefix("jsonpath={{.data.").removesuffix("}}"), ""), end="")
    else:
        key = output.split('"')[1]
        if key not in data:  # on stdout, as kubectl does
            print(f'error: error executing template "{{output}}": at <base64decode>: wrong type for value')
            sys.exit(1)
        print(base64.b64decode(data[key]).decode(), end="")
else:
    sys.exit(subprocess.run(["{real}", *arguments]).returncode)
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that keeps Secrets in a folder and reads them as the real one does; the rest is the real one's."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "secrets").mkdir()
    script = tmp_path / "bin" / "kubectl"
    script.write_text(KUBECTL.format(python=sys.executable, folder=tmp_path, real=shutil.which("kubectl")))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    for name in ("OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run_secrets(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(K8S / "secrets.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def secrets_in(folder: Path) -> dict[str, dict[str, str]]:
    made = [yaml.safe_load(file.read_text()) for file in sorted((folder / "secrets").iterdir())]
    return {
        item["metadata"]["name"]: {key: b64decode(value).decode() for key, value in item.get("data", {}).items()}
        for item in made
    }


@pytest.mark.slow  # runs the script, which asks kubectl again and again
def test_the_script_makes_every_secret_that_is_referred_to_and_keeps_what_is_there(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_secrets().returncode == 0
    first = secrets_in(kubectl)
    assert first["preflow-flow"] == first["preflow-train"] == {}, "no key was given, and an error text is none"
    monkeypatch.setenv("OPENAI_API_KEY", "planted-judge-key")
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    done = run_secrets()
    assert done.returncode == 0, done.stderr
    keys = {"preflow-flow": {"OPENAI_API_KEY": "planted-judge-key"}, "preflow-train": {"HF_TOKEN": "planted-token"}}
    made = {**first, **keys}
    assert secrets_in(kubectl) == made
    for _, _, pod in workloads("gke"):
        for name, key, optional in secret_references(pod):
            assert optional or key in made[name], f"{name}: {key}"
    spoken = done.stdout + done.stderr + (kubectl / "commands").read_text()
    assert "planted" not in spoken, "a key is shown, or stands in a command line"
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert run_secrets().returncode == 0
    assert secrets_in(kubectl) == made
    (kubectl / "outage").touch()
    done = run_secrets()
    assert done.returncode != 0
    assert "was refused" in done.stderr
    assert secrets_in(kubectl) == made, "a password that cannot be read is not replaced"


DATABASE = """#!/bin/bash
# A cluster whose databases are files; what is asked of it is noted.
echo "$@" >>{folder}/commands
case "$*" in
    *pg_dump*) [ ! -e {folder}/broken ] || {{ echo half; exit 1; }}; cat {folder}/prefect ;;
    *createdb*) touch {folder}/restored ;;
    *pg_restore*) grep rows >{folder}/restored ;;
    *psql*) [ ! -e {folder}/broken ] || exit 1; mv {folder}/restored {folder}/prefect ;;
esac
"""


def run_database(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = folder / "bin" / "kubectl"
    script.write_text(DATABASE.format(folder=folder))
    return subprocess.run([str(K8S / "database.sh"), *arguments], capture_output=True, text=True, check=False)


def test_a_backup_is_whole_or_absent_and_a_restore_starts_everything_again(kubectl: Path) -> None:
    save, database = kubectl / "save", kubectl / "prefect"
    database.write_text("rows of today")
    assert run_database(kubectl, "backup", str(save)).returncode == 0
    database.write_text("rows of tomorrow")
    assert run_database(kubectl, "restore", str(save)).returncode == 0
    assert database.read_text() == "rows of today\n"
    (kubectl / "broken").touch()
    assert run_database(kubectl, "backup", str(kubectl / "other")).returncode != 0
    assert not list(kubectl.glob("other*")), "half a backup is none"
    assert run_database(kubectl, "restore", str(save)).returncode != 0
    scaled = re.findall(r"scale .* --replicas (\d)", (kubectl / "commands").read_text())
    assert scaled == ["0", "1", "0", "1"], "also after an exchange that failed"
    save.write_text("no backup")
    assert run_database(kubectl, "restore", str(save)).returncode != 0
    assert len(re.findall("replicas", (kubectl / "commands").read_text())) == 4, "nothing was stopped for it"


GCLOUD = """#!/bin/bash
# Secret Manager: a file a secret; an error is on stderr, and what gcloud printed before it on stdout.
folder={folder}/manager
case "$3" in
    access)
        [ ! -e {folder}/outage ] || {{ echo "ERROR: (gcloud.secrets) PERMISSION_DENIED" >&2; exit 1; }}
        [ -e "$folder/$8" ] || {{ echo "half an answer"; echo "ERROR: NOT_FOUND: no version" >&2; exit 1; }}
        cat "$folder/$8" ;;
    add) cat >"$folder/$4" ;;
    *) exit 2 ;;
esac
"""


@pytest.mark.slow  # runs the script, which asks kubectl again and again
def test_secret_manager_keeps_the_values_and_the_cluster_gets_a_copy(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kubectl / "manager").mkdir()
    script = kubectl / "bin" / "gcloud"
    script.write_text(GCLOUD.format(folder=kubectl))
    script.chmod(0o755)
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    done = run_secrets("project", "preflow")
    assert done.returncode == 0, done.stderr
    kept = {file.name: file.read_text() for file in (kubectl / "manager").iterdir()}
    assert set(kept) == {
        f"preflow-{name}" for name in ("prefect-auth", "postgres-password", "vllm-api-key", "hf-token")
    }
    made = secrets_in(kubectl)
    assert made["prefect-auth"]["auth-string"] == kept["preflow-prefect-auth"]
    assert made["preflow-train"] == {"HF_TOKEN": "planted-token"}
    assert made["preflow-flow"] == {}
    assert run_secrets("project", "preflow").returncode == 0
    assert secrets_in(kubectl) == made
    (kubectl / "outage").touch()
    assert run_secrets("project", "preflow").returncode != 0
    assert secrets_in(kubectl) == made
