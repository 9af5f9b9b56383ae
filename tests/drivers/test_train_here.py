"""bertray train --num-workers 0: the loop in a thread of the driver, without Ray."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bertray import BertrayError, RequestError, TrainConfig, train
from bertray.bundle.info import read_info
from bertray.storage.location import Location
from tests.drivers.conftest import LONG_RUN, stop_and_kill
from tests.kills import job

pytestmark = pytest.mark.services

SETTINGS: dict[str, Any] = {"epochs": 3, "learning_rate": 3e-3, "max_length": 32, "precision": "fp32"}

# As many threads as a worker of the tests' cluster has CPUs: sums of floats depend on it.
AS_A_WORKER = """
import os, sys
os.sched_getaffinity = lambda _: range(4)
from bertray.__main__ import main
code = main(sys.argv[1:])
print(*sorted({"ray"} & set(sys.modules)))
sys.exit(code)
"""


def test_the_bundle_is_that_of_one_worker_of_ray(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    ours, rays = tmp_path / "ours", tmp_path / "rays"
    train(TrainConfig(data=dataset, output=str(rays), encoder=str(tiny_encoder), **SETTINGS))
    options = job("train", data=dataset, output=ours, encoder=tiny_encoder, **SETTINGS, num_workers=0)[3:]
    command = [sys.executable, "-c", AS_A_WORKER, "train", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""  # Ray was not loaded
    expected, actual = (load_file(folder / "model.safetensors") for folder in (rays, ours))
    assert expected.keys() == actual.keys()
    assert all((expected[name] == actual[name]).all() for name in expected)
    one, other = (read_info(Location.of(str(folder))) for folder in (rays, ours))
    assert one.fingerprint() == other.fingerprint()
    walls = [[epoch.pop("wall_s") for epoch in info.history] for info in (one, other)]
    assert len(walls[0]) == len(walls[1]) == 3
    assert one.history == other.history
    assert not list(tmp_path.glob(".*"))


def test_it_goes_on_after_sigterm_and_a_kill_bit_for_bit(
    dataset: str, tiny_encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"data": dataset, "encoder": str(tiny_encoder), **LONG_RUN, "epochs": 12}
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "stderr.log"
    command = job("train", output=broken, **options, num_workers=0)
    stop_and_kill(command, broken, log)

    config = TrainConfig(**options, output=str(broken), num_workers="0")
    caplog.set_level("INFO", "bertray")
    with pytest.raises(RequestError, match=r"with other options: learning_rate 0\.001 -> 0\.002.*--restart"):
        train(config.model_copy(update={"learning_rate": 2e-3}))
    rewritten = tmp_path / "data"
    shutil.copytree(dataset, rewritten)
    (rewritten / "train.parquet").write_bytes((rewritten / "validation.parquet").read_bytes())
    with pytest.raises(
        RequestError, match=r"with rows that .*data does not have any more\. Put the data set back.*--restart"
    ):
        train(config.model_copy(update={"data": str(rewritten)}))
    assert "continues from there" not in caplog.text
    assert train(config).resumed_from_step >= 40
    train(config.model_copy(update={"output": str(whole)}))
    expected, actual = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all((expected[name] == actual[name]).all() for name in expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing is left of the run


def test_a_loss_that_is_no_number_names_the_rows(dataset: str, diverging_encoder: str, tmp_path: Path) -> None:
    config = TrainConfig(
        data=dataset, output=str(tmp_path / "bundle"), encoder=diverging_encoder, **SETTINGS, num_workers="0"
    )
    with pytest.raises(
        BertrayError, match=r"the loss is nan at epoch 1, step 1.*That step read row \d+ of .*in\.jsonl, "
    ):
        train(config)
    assert list(tmp_path.iterdir()) == []
