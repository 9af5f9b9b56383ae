"""cluster.yaml, as far as that goes without an AWS account: Ray's schema, EC2's parameters, packages, sizes, token."""

import copy
import json
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray.autoscaler
import yaml
from botocore.exceptions import ParamValidationError
from botocore.session import get_session
from botocore.validate import validate_parameters
from moto import mock_aws
from packaging.requirements import Requirement
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

from tests.conftest import ROOT


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` sees it: defaults filled in, then checked."""
    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = prepared(config)["available_node_types"]
    return {name: node for name, node in types.items() if name != config["head_node_type"]}


def test_ray_accepts_it(config):
    assert set(prepared(config)["available_node_types"]) == {"head", "cpu-worker", "gpu-worker"}
    # Ray itself lets any key of `provider` pass.
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert set(config["provider"]) <= set(schema["properties"]["provider"]["properties"])


@pytest.mark.parametrize("place", [(), ("available_node_types", "gpu-worker")])
def test_ray_refuses_an_unknown_key(config, place):
    section = config
    for key in place:
        section = section[key]
    section["max_wokers"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        prepared(config)


def test_ec2_knows_every_launch_parameter(config):
    # Ray's schema leaves node_config to AWS; botocore's has every parameter of the call that starts a machine.
    launch = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in config["available_node_types"].values():
        parameters = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        validate_parameters(parameters, launch)
        with pytest.raises(ParamValidationError, match="InstanceTyp"):
            validate_parameters({**parameters, "InstanceTyp": "x"}, launch)


def test_its_machines_start(config, tmp_path, monkeypatch):
    """Through Ray's AWS provider to moto's EC2, in this process: groups, keys, profiles, one machine of each kind."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray puts the SSH key
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)  # another test's server
    region = config["provider"]["region"]
    with mock_aws():
        ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
        for profile in ("bertray-head", "bertray-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        started = AWSNodeProvider.bootstrap_config(prepared(config))
        provider = AWSNodeProvider(started["provider"], started["cluster_name"])
        for name, node in started["available_node_types"].items():
            (machine,) = provider.create_node(node["node_config"], {TAG_RAY_USER_NODE_TYPE: name}, 1).values()
            (info,) = ec2.describe_instance_types(InstanceTypes=[machine.instance_type])["InstanceTypes"]
            has = {"CPU": info["VCpuInfo"]["DefaultVCpus"]}
            if "GpuInfo" in info:
                has["GPU"] = sum(gpu["Count"] for gpu in info["GpuInfo"]["Gpus"])
            assert node["resources"] == ({"CPU": 0} if name == "head" else has), name
            assert (machine.instance_lifecycle == "spot") == (name == "gpu-worker"), name
            role = "bertray-head" if name == "head" else "bertray-worker"
            assert machine.iam_instance_profile["Arn"].endswith(f"/{role}"), name
        (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["bertray"]}])[
            "SecurityGroups"
        ]
        inside, ssh = group["IpPermissions"]
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]] and not inside["IpRanges"]
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)


def test_nothing_but_the_head_runs_idle_and_growth_is_bounded(config):
    types = workers(config)
    for name, node in types.items():
        assert node["min_workers"] == 0, name
        assert 1 <= node["max_workers"] <= config["max_workers"], name
    assert sum(node["max_workers"] for node in types.values()) == config["max_workers"] <= 10
    assert [name for name, node in types.items() if node["resources"].get("GPU")] == ["gpu-worker"]


def test_no_work_lands_on_the_head(config):
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in head_start(config)


def head_start(config: dict[str, Any]) -> list[str]:
    return shlex.split(config["head_start_ray_commands"][-1])


def test_it_installs_the_dependencies_of_the_project_and_no_more(config):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {canonical(text) for text in project["dependencies"]}
    expected = {text.replace("ray[data,train,tune]", "ray[data,default,train,tune]") for text in expected} | {
        "boto3>=1.36"
    }
    *_, everything = pip_installs(config)
    assert {canonical(text) for text in requirements(everything)} == expected


def test_every_installation_is_constrained(config):
    pinned = {Requirement(line).name.lower() for line in constraints()}
    assert config["file_mounts"]["/home/ubuntu/constraints.txt"] == "./constraints.txt"
    for command in pip_installs(config):
        assert command[command.index("--constraint") + 1] == "~/constraints.txt"
        assert {Requirement(text).name.lower() for text in requirements(command)} <= pinned


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pip_installs(config: dict[str, Any]) -> list[list[str]]:
    commands = [shlex.split(command) for command in config["setup_commands"]]
    return [command for command in commands if any(word.endswith("/pip") for word in command)]


def requirements(command: list[str]) -> list[str]:
    """What a `pip install` line installs, its options left out."""
    words = command[command.index("install") + 1 :]
    with_value = {"--constraint", "--index-url"}
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not word.startswith("-") and before not in with_value
    ]


def canonical(text: str) -> str:
    return str(Requirement(text.lower()))


def test_the_token_is_on_every_node_before_ray_starts(config):
    # File mounts and setup commands are common to head and workers.
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    for node in prepared(config)["available_node_types"].values():
        assert not {"worker_setup_commands", "initialization_commands"} & set(node)


def test_only_ssh_comes_in_from_outside(config):
    assert "--dashboard-host=127.0.0.1" in head_start(config)
    assert "IpPermissions" not in config["provider"]["security_group"]


def test_commands_are_shell(config):
    names = [name for name in config if name.endswith("_commands")]
    assert "setup_commands" in names
    for command in (command for name in names for command in config[name]):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert not checked.returncode, f"{command}: {checked.stderr}"
