"""Test the container and the Kubernetes job: files, published schema, and the command that the job would run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training_runs import REPOSITORY

CLUSTER = REPOSITORY / "scripts" / "cluster"
DOCKERFILE, MANIFEST = CLUSTER / "Dockerfile", CLUSTER / "trainjob.yaml"


def test_dockerfile_copies_what_the_package_and_its_scripts_need() -> None:
    words = [line.split()[1:-1] for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ")]
    copied = {word for line in words for word in line}
    assert {"megatron", "tools", "scripts", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= copied
    assert all((REPOSITORY / name).exists() for name in copied)
    assert re.search(r"^FROM nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", DOCKERFILE.read_text(), re.MULTILINE)


def manifest() -> dict[str, Any]:
    return pytest.importorskip("yaml").safe_load(MANIFEST.read_text())


def test_manifest_has_the_published_schema() -> None:
    """The schema's models drop unknown fields, so an equal round trip shows that all fields are known."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    assert models.TrainerV1alpha1TrainJob.from_dict(manifest()).to_dict() == manifest()


def test_manifests_command_starts_one_node_of_the_training(data: Path) -> None:
    trainer = manifest()["spec"]["trainer"]
    (text,) = trainer["args"]
    text = text.replace("/opt/remoe", shlex.quote(str(REPOSITORY)))
    environment = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29400"}
    environment |= {"PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]), "DRY_RUN": "command", "PATH": "/usr/bin:/bin"}
    environment |= {entry["name"]: entry["value"] for entry in trainer["env"]}
    environment |= {"PYTHON": sys.executable, "DATA_PATH": str(data)}
    started = subprocess.run([*trainer["command"], text], capture_output=True, text=True, env=environment, cwd="/")
    assert started.returncode == 0, started.stderr
    words = shlex.split(started.stdout)
    expected = {"nnodes": "2", "node-rank": "1", "master-addr": "first", "master-port": "29400", "nproc-per-node": "8"}
    for flag, value in (expected | {"expert-model-parallel-size": "8"}).items():
        assert words[words.index(f"--{flag}") + 1] == value
    assert "/shared/runs/469m_remoe/checkpoints" in words
