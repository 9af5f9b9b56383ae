"""Small real things that many tests share: a tiny encoder, bundles, a two-node Ray cluster, an S3 server, a demo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before anything imports Ray or Hugging Face: no token file in the home folder, quick polls, no network.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only, as bertray.cli does it
    "OMP_NUM_THREADS": "1",  # on a busy machine threads that wait for each other cost more than they bring
    "OMP_WAIT_POLICY": "PASSIVE",  # and those that a worker is given sleep meanwhile
    "TOKENIZERS_PARALLELISM": "false",
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there: the Hub cannot be reached from a test
}
# A shell that starts the tests in the background has them ignore Ctrl-C, and the jobs that they start with them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from bertray.bundle.bundle import seal
from bertray.model.sources import encoder_folder

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

# A busy machine makes an example late, not wrong.
settings.register_profile("bertray", deadline=None)
settings.load_profile("bertray")

needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no data sets at {SHARED_DATA}")

# Files whose tests take longest, begun first: of several processes none shall be left with one of them at the end.
_LONGEST = (
    "test_training_faults",
    "test_demo",
    "test_score",
    "test_isolated",
    "test_audit",
    "test_train",
    "test_tune",
)


# Fixtures that start Ray or a server; a test that does so by itself is marked.
_SERVICES = {"ray_nodes", "s3_server", "mlflow_server", "small_demo"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))
    for item in items:
        if _SERVICES & set(getattr(item, "fixturenames", ())):
            item.add_marker("services")


TINY_LABELS = ("a", "b", "c")


def tiny_config(**changes: float) -> BertConfig:
    labels = dict(enumerate(TINY_LABELS))
    return BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        **changes,
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
    )


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised BERT of 2 layers with MiniLM's tokenizer: trains in seconds."""
    folder = tmp_path_factory.mktemp("tiny-encoder")
    torch.manual_seed(0)
    BertModel(tiny_config(initializer_range=0.2)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder("minilm"))
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calm_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny encoder without dropout, so that runs can be compared."""
    folder = shutil.copytree(tiny_encoder, tmp_path_factory.mktemp("calm") / "encoder")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def diverging_encoder(calm_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The calm encoder with an infinite weight: the first loss is no number, and its worker logs why it pads."""
    folder = shutil.copytree(calm_encoder, tmp_path_factory.mktemp("diverging") / "encoder")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


WHAT_A_DIVERGING_WORKER_LOGS = "BertForSequenceClassification is run on padded batches (logits differ by nan)"


@pytest.fixture(scope="session")
def make_bundle(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a bundle of a randomly initialised classifier; same seed, same bundle."""

    def build(max_length: int = 64, seed: int = 0, **policy: object) -> Path:
        folder = tmp_path_factory.mktemp("bundle")
        torch.manual_seed(seed)
        # With the usual initial weights all texts get the same label; these spread them.
        model = BertForSequenceClassification(tiny_config(initializer_range=0.5))
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
        tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(folder)
        training = dict.fromkeys(
            ("learning_rate", "batch_size", "weight_decay", "warmup_fraction", "precision", "seed", "epochs", "data"), 0
        ) | {"keep": "best"}
        epoch = {"epoch": 1.0, "train_loss": 1.0, "loss": 1.0, "accuracy": 0.5, "f1_macro": 0.5, "wall_s": 1.0}
        seal(
            folder,
            labels=TINY_LABELS,
            max_length=max_length,
            **policy,
            encoder="tiny",
            data_fingerprint="0" * 64,
            training=training,
            metrics={"epoch": 1.0, "f1_macro": 0.5},
            history=[epoch],
        )
        return folder

    return build


@pytest.fixture(scope="session")
def tiny_bundle(make_bundle: Callable[..., Path]) -> Path:
    """A bundle with labels a, b, c and a window of 64 tokens. Read only: copy it to change it."""
    return make_bundle()


@pytest.fixture(scope="session")
def ray_nodes(s3_server: str) -> Iterator[Any]:
    """A two-node Ray cluster for this process and its children (RAY_ADDRESS); its nodes know the S3 server."""
    import ray
    from ray.cluster_utils import Cluster

    shared = {"object_store_memory": 150_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **shared})
    cluster.add_node(num_cpus=4, object_store_memory=150_000_000)
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    del os.environ["RAY_ADDRESS"]


@pytest.fixture(scope="session")
def ray_cluster(ray_nodes: Any) -> str:
    """The address of `ray_nodes`."""
    return str(ray_nodes.address)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """moto's HTTP S3 server on loopback, made the one of the AWS variables; yields its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test-secret-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    yield endpoint
    server.stop()


@pytest.fixture
def s3_folder(s3_server: str) -> str:
    """The URI of an empty bucket."""
    import s3fs

    bucket = f"bertray-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}/folder"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own tracking server on loopback, with SQLite: its URI. Starts in some 10 s."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [
        "--backend-store-uri",
        f"sqlite:///{folder}/runs.db",
        "--default-artifact-root",
        str(folder / "artifacts"),
    ]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, *places], cwd=folder, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5):
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        else:
            raise TimeoutError((folder / "log").read_text())
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it has a child
        server.wait()


@pytest.fixture(scope="session")
def small_demo(tiny_encoder: Path) -> Iterator[Path]:
    """`bertray demo` at a tenth of its size, on a Ray of its own, as a user runs it: the output folder."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="bertray-demo-") as folder:
        output = Path(folder) / "demo"
        size = ("--num-labelled", 180, "--num-archive", 160, "--epochs", 1)
        finished = run_job_process("demo", "--output", output, "--encoder", tiny_encoder, *size, env=environment)
        assert finished.returncode == 0, finished.stderr
        (output / "stdout.txt").write_text(finished.stdout)
        (output / "stderr.txt").write_text(finished.stderr)
        yield output


def assert_rows_add_up(summary: dict[str, Any]) -> None:
    """No row of a run is left out: it has an error, or an earlier row's label, or the model read it."""
    assert summary["num_rows"] == sum(summary[f"num_rows_{what}"] for what in ("error", "repeated", "model"))


def run_job_process(
    job: str, *arguments: object, env: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.JOB` as a process of its own, from the project's root."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def write_shard(path: Path, texts: list[str | None], **columns: list[object]) -> Path:
    """A Parquet shard with the columns document_id and text, and others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    identifiers = [f"{path.stem}-{row}" for row in range(len(texts))]
    pq.write_table(pa.table({"document_id": identifiers, "text": pa.array(texts, pa.string()), **columns}), path)
    return path
