"""The files for `ray up` and KubeRay, checked as far as possible without a cluster."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from asgd.__main__ import cli
from asgd.config.make import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
BASE_IMAGE = f"rayproject/ray:{version('ray')}-py311-cpu"

# Fields of the custom resources of KubeRay 1.5, from its API reference.
JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointResources",
    "jobId",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
}
HEAD_FIELDS = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
GROUP_FIELDS = {
    "groupName",
    "idleTimeoutSeconds",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "scaleStrategy",
    "template",
}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def parse(command: str, group: click.Group) -> dict[str, Any]:
    """Parse a command line as its program would; an unknown option is an error."""
    _, name, *arguments = shlex.split(command)
    with group.commands[name].make_context(name, arguments) as context:
        return context.params


def test_launcher_accepts_the_cluster() -> None:
    (config,) = documents("cluster.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    (node_type,) = prepared["available_node_types"].values()
    assert (
        node_type["min_workers"]
        == node_type["max_workers"]
        == len(prepared["provider"]["worker_ips"])
    )
    assert config["docker"]["image"] == BASE_IMAGE
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_launcher_refuses_a_key_it_does_not_know() -> None:
    (config,) = documents("cluster.yaml")
    with pytest.raises(Exception, match="'wrokers' was unexpected"):
        validate_config(prepare_config({**config, "wrokers": 2}))


def test_nodes_start_with_commands_that_ray_has() -> None:
    (config,) = documents("cluster.yaml")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, start = config[key]
        assert stop == "ray stop"
        options = parse(start, ray_cli)
        assert options["head"] == key.startswith("head")


def test_manifest_has_the_structure_of_a_ray_job() -> None:
    claim, job = documents("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    assert spec["shutdownAfterJobFinishes"]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER_FIELDS
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) <= HEAD_FIELDS
    for group in groups:
        assert set(group) <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (head, *groups):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"]["spec"], claim["metadata"]["name"])


def check_pod(pod: dict[str, Any], claim: str) -> None:
    """Assert that a pod has one container with the package, the claim and shared memory."""
    (container,) = pod["containers"]
    assert container["image"].split("/")[-1] == f"asgd:{version('asgd')}"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == claim
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_entry_point_is_a_run_of_a_configuration_in_the_image() -> None:
    _, job = documents("rayjob.yaml")
    options = parse(job["spec"]["entrypoint"], cli)
    assert options["address"] == "auto"
    assert options["out"].parts[:2] == ("/", "runs")
    load_config(ROOT / options["config"].relative_to("/home/ray/asgd"))


def test_image_has_our_version_of_ray_and_the_package() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == f"FROM {BASE_IMAGE}"
    copied = next(line for line in commands if line.startswith("COPY")).split()[-1]
    assert commands[-1].endswith(f"pip install --no-cache-dir {copied}")
