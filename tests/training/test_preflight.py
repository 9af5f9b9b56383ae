"""What stands at the output is not lost."""

from pathlib import Path
from typing import Any

import pytest

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.training.config import TrainConfig, TuneConfig
from bertray.training.preflight import check_output
from bertray.training.run_folder import TrainingRun


def check(output: Location, **options: Any) -> None:
    config = TrainConfig(data="dataset", output=str(output), encoder="minilm", **options)
    check_output(config, TrainingRun(output))


@pytest.mark.parametrize("config_class", [TrainConfig, TuneConfig])
def test_a_bundle_on_s3_is_not_replaced_and_a_free_place_is_named(
    s3_folder: str, config_class: type[TrainConfig]
) -> None:
    output = Location.of(f"{s3_folder}/bundle")
    for name in ("bundle", "bundle-2"):
        (Location.of(s3_folder) / name / "bundle.json").put(b"{}")
    for overwrite in (False, True):
        config = config_class(data="dataset", output=str(output), encoder="minilm", overwrite=overwrite)
        with pytest.raises(RequestError, match=rf"none is replaced on S3.* such as --output {output}-3$"):
            check_output(config, TrainingRun(output))
    check(Location.of(f"{output}-3"), overwrite=True)
    assert (output / "bundle.json").exists()


def test_a_first_upload_that_was_cut_short_can_be_finished(s3_folder: str, tmp_path: Path) -> None:
    output = Location.of(f"{s3_folder}/bundle")
    TrainingRun(output).begin_bundle()
    (output / "model.safetensors").put(b"half")
    check(output)
    (tmp_path / "bundle.json").write_text("{}")
    output.put_folder(tmp_path, last="bundle.json")
    assert [file.path for file in output.files()] == ["bundle.json"]
    with pytest.raises(RequestError, match="is a bundle"):  # whole now, so no longer the run's own to replace
        check(output)


def test_what_is_no_bundle_of_the_run_stays_on_s3(s3_folder: str) -> None:
    output = Location.of(f"{s3_folder}/bundle")
    (output / "precious").put(b"x")
    with pytest.raises(RequestError, match=r"is no bundle .*it is not replaced"):
        check(output, overwrite=True)


def test_a_bundle_on_a_disk_is_replaced(tmp_path: Path) -> None:
    output = Location.of(str(tmp_path / "bundle"))
    (output / "bundle.json").put(b"{}")
    check(output, overwrite=True)
    with pytest.raises(RequestError, match="--overwrite"):
        check(output)
