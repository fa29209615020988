"""The parts of KubeRay's RayJob (ray.io/v1) and of Kubernetes' own objects that our example uses, as strict models.

Fields and kinds as the operator's published types have them; a field that is not listed here is refused, so a misspelt
one is found. The API server of a cluster remains the last judge.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Strict):
    name: Name


class EnvironmentVariable(Strict):
    name: str
    value: str


class Port(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,15}$")]
    container_port: Annotated[int, Field(ge=1, le=65535)]


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity] = {}


class Capabilities(Strict):
    drop: list[str]


class SecurityContext(Strict):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Mount(Strict):
    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class Container(Strict):
    name: Name
    image: str
    env: list[EnvironmentVariable] = []
    ports: list[Port] = []
    resources: Resources
    security_context: SecurityContext
    volume_mounts: list[Mount]


class Claim(Strict):
    claim_name: Name
    read_only: bool = False


class EmptyDir(Strict):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity | None = None


class Volume(Strict):
    name: Name
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class PodSpec(Strict):
    automount_service_account_token: bool = True
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    ray_start_params: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    group_name: Name
    replicas: Count
    min_replicas: Count
    max_replicas: Count
    ray_start_params: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class RayCluster(Strict):
    ray_version: str
    auth_options: AuthOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayJobSpec(Strict):
    entrypoint: str
    backoff_limit: Count
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Count
    ray_cluster_spec: RayCluster


class RayJob(Strict):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class ClaimSpec(Strict):
    access_modes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]]
    resources: Resources


class PersistentVolumeClaim(Strict):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class Expression(Strict):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]


class Selector(Strict):
    match_expressions: list[Expression] = []
    match_labels: dict[str, str] = {}


class Peer(Strict):
    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None


class IngressRule(Strict):
    from_: Annotated[list[Peer], Field(alias="from")]


class NetworkPolicySpec(Strict):
    pod_selector: Selector
    policy_types: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule]


class NetworkPolicy(Strict):
    api_version: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


KINDS: dict[str, type[Strict]] = {model.__name__: model for model in (RayJob, PersistentVolumeClaim, NetworkPolicy)}
