# SPDX-License-Identifier: Apache-2.0
"""configs/kubernetes against the schemas and parsers of those who will read it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from knapspec_vllm.bench.checkpoints import random_checkpoint
from tests.helpers_serve import check_selected, merged, parse_serve

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "configs" / "kubernetes"
CORE = {"v1", "apps/v1", "policy/v1", "autoscaling/v2"}
OVERLAYS = sorted((KUBERNETES / "overlays").iterdir())


def documents(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    return [
        (path, document)
        for path in sorted(folder.rglob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
        if "apiVersion" in document
    ]


def overlay_deployment(overlay: Path) -> dict[str, Any]:
    base = yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text())
    return merged(base, yaml.safe_load((overlay / "deployment.yaml").read_text()))


@pytest.mark.parametrize(
    ("path", "document"),
    [pytest.param(p, d, id=p.name) for p, d in documents(KUBERNETES)
     if d["apiVersion"] in CORE and "overlays" not in p.parts],
)  # fmt: skip
def test_manifests_are_what_kubernetes_takes(path: Path, document: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_a_misspelt_manifest_would_be_found() -> None:
    import kubernetes_validate

    document = yaml.safe_load((KUBERNETES / "base" / "deployment.yaml").read_text())
    document["spec"]["template"]["spec"]["containers"][0]["startupprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlays(overlay: Path) -> None:
    """The patched deployment is valid, its command line parses, its references exist."""
    import kubernetes_validate

    kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    base = overlay / kustomization["resources"][0]
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(
        path.name for path in base.glob("*.yaml") if path.name != "kustomization.yaml"
    )
    deployment = overlay_deployment(overlay)
    kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == kustomization["images"][0]["name"]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert variables["MODEL"] != "set-by-overlay"
    (generated,) = kustomization["configMapGenerator"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    assert volumes["config"]["configMap"]["name"] == generated["name"]
    (config,) = generated["files"]
    arguments = [re.sub(r"\$\((\w+)\)", lambda m: variables[m[1]], a) for a in container["args"]]
    place = arguments.index("--config") + 1
    assert arguments[place] == f"/etc/knapspec/{config}"
    arguments[place] = str(overlay / config)
    parsed = parse_serve(arguments)
    assert parsed.model_tag == variables["MODEL"]
    check_selected(parsed.speculative_config, parsed.additional_config)
    ports = [port["containerPort"] for port in container["ports"]]
    assert parsed.port in ports


def _by_name(value: Any) -> Any:
    """Lists of named things in the order of their names: kustomize puts a patch's first."""
    if isinstance(value, dict):
        return {key: _by_name(part) for key, part in value.items()}
    if isinstance(value, list):
        value = [_by_name(part) for part in value]
        if all(isinstance(part, dict) and "name" in part for part in value):
            return sorted(value, key=lambda part: part["name"])
    return value


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")
@pytest.mark.parametrize("scaled", [False, True], ids=["one", "autoscaling"])
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_builds_what_is_tested_here(overlay: Path, scaled: bool, tmp_path: Path) -> None:
    """And every document of it is one that Kubernetes takes, with the autoscaling component too."""
    import kubernetes_validate

    tree = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, tree)
    folder = tree / "overlays" / overlay.name
    if scaled:
        with (folder / "kustomization.yaml").open("a") as file:
            file.write("components:\n  - ../../components/autoscaling\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    built = {d["kind"]: d for d in yaml.safe_load_all(done.stdout)}
    for document in built.values():
        if document["apiVersion"] in CORE:
            version = kubernetes_validate.latest_version()
            kubernetes_validate.validate(document, version, strict=True)
    name = built["ConfigMap"]["metadata"]["name"]
    assert built["ConfigMap"]["data"]["serve.yaml"] == (overlay / "serve.yaml").read_text()
    expected = overlay_deployment(overlay)
    pod = expected["spec"]["template"]["spec"]
    (image,) = yaml.safe_load((overlay / "kustomization.yaml").read_text())["images"]
    pod["containers"][0]["image"] = f"{image['newName']}:{image['newTag']}"
    (volume,) = [v for v in pod["volumes"] if v["name"] == "config"]
    volume["configMap"]["name"] = name
    assert _by_name(built["Deployment"]) == _by_name(expected)
    modes = built["PersistentVolumeClaim"]["spec"]["accessModes"]
    assert modes == (["ReadWriteMany"] if scaled else ["ReadWriteOnce"])
    assert ("HorizontalPodAutoscaler" in built) == scaled


def test_adapter_has_the_metric_that_replicas_are_scaled_on() -> None:
    component = KUBERNETES / "components" / "autoscaling"
    scaler = yaml.safe_load((component / "autoscaler.yaml").read_text())
    (metric,) = scaler["spec"]["metrics"]
    values = yaml.safe_load((component / "prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])


def test_probes_leave_time_for_the_first_start() -> None:
    """Twenty minutes: loading, compiling, capturing, calibrating."""
    container = overlay_deployment(OVERLAYS[0])["spec"]["template"]["spec"]["containers"][0]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1200
    values = yaml.safe_load((KUBERNETES / "production-stack" / "values.yaml").read_text())
    probe = values["servingEngineSpec"]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1200


def test_service_and_monitor_find_the_pods() -> None:
    base = {d["kind"]: d for _, d in documents(KUBERNETES / "base")}
    labels = base["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert base["Service"]["spec"]["selector"] == labels
    assert base["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    monitor = base["ServiceMonitor"]["spec"]
    assert (
        monitor["selector"]["matchLabels"].items() <= base["Service"]["metadata"]["labels"].items()
    )
    assert monitor["endpoints"][0]["port"] in [p["name"] for p in base["Service"]["spec"]["ports"]]
    claim = base["PersistentVolumeClaim"]["metadata"]["name"]
    volumes = base["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert claim in [
        v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v
    ]
    component = {d["kind"]: d for _, d in documents(KUBERNETES / "components")}
    assert component["PersistentVolumeClaim"]["metadata"]["name"] == claim
    scaled = component["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
    assert scaled == base["Deployment"]["metadata"]["name"]


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm, which has the CRDs' schemas")
@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule", "PodMonitor"])
def test_custom_resources_of_the_prometheus_operator(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "prometheus-operator"
    if not folder.exists():
        fresh = tmp_path_factory.mktemp("npm")
        done = subprocess.run(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(fresh),
             "@kubernetes-models/prometheus-operator@6"],
            check=False, timeout=300, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            pytest.skip("npm cannot fetch the schemas here")
        fresh.rename(folder)
    (document,) = [d for _, d in documents(KUBERNETES) if d["kind"] == kind]
    script = (
        "import * as v1 from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1';"
        f"new v1.{kind}(JSON.parse(process.argv[1])).validate();"
    )
    environment = {"cwd": folder, "capture_output": True, "text": True}
    command = ["node", "--input-type=module", "-e", script]
    good = subprocess.run([*command, json.dumps(document)], check=False, **environment)
    assert good.returncode == 0, good.stderr
    wrong = copy.deepcopy(document)
    lists = {"ServiceMonitor": "endpoints", "PodMonitor": "podMetricsEndpoints"}
    wrong["spec"] = {lists.get(kind, "groups"): "none"}
    assert subprocess.run([*command, json.dumps(wrong)], check=False, **environment).returncode


def test_ray_service() -> None:
    """Pods against Kubernetes' schema, the application against Ray's and vLLM's."""
    import kubernetes_validate

    schema = pytest.importorskip("ray.serve.schema")
    llm = pytest.importorskip("ray.serve.llm")
    of = {d["kind"]: d for _, d in documents(KUBERNETES / "kuberay")}
    claim, service = of["PersistentVolumeClaim"], of["RayService"]
    mounted = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    claims = [v.get("persistentVolumeClaim") for v in mounted["volumes"]]
    assert {"claimName": claim["metadata"]["name"]} in claims
    spec = service["spec"]
    cluster = spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        template = {
            "apiVersion": "v1", "kind": "PodTemplate",
            "metadata": {"name": "x"}, "template": group["template"],
        }  # fmt: skip
        version = kubernetes_validate.latest_version()
        kubernetes_validate.validate(template, version, strict=True)
    (scraped,) = of["PodMonitor"]["spec"]["podMetricsEndpoints"]
    for group in groups:
        ports = group["template"]["spec"]["containers"][0]["ports"]
        assert scraped["port"] in [port["name"] for port in ports]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    assert len(images) == 1, "vLLM loads the plugin on every node"
    assert cluster["rayVersion"] in images.pop()
    deployed = schema.ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = deployed.applications
    module, _, function = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[function]), function)
    (config,) = llm.LLMServingArgs.model_validate(application.args).llm_configs
    check_engine_kwargs(config.engine_kwargs)


def check_engine_kwargs(given: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(
        model=str(random_checkpoint("LlamaForCausalLM")), **given
    )  # refuses names it does not know
    check_selected(given["speculative_config"], given.get("additional_config"))


def test_production_stack_values() -> None:
    values = yaml.safe_load((KUBERNETES / "production-stack" / "values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    # The chart's own options, then extraArgs.
    arguments = [
        model["modelURL"], "--max-model-len", str(config["maxModelLen"]),
        "--dtype", config["dtype"], *config["extraArgs"],
    ]  # fmt: skip
    parsed = parse_serve(arguments)
    check_selected(parsed.speculative_config, parsed.additional_config)
