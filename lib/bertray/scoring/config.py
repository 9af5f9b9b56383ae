"""What jobs.score can be told; how it is read, `bertray.config` says."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from bertray.config import DEVICE_HELP, ENGINE_HELP, INFERENCE_PRECISION_HELP, Columns, JobConfig, Place, check_engine
from bertray.schema import RESERVED_COLUMNS
from bertray.types import Device, Engine, InferencePrecision


class ScoreConfig(JobConfig):
    """jobs.score: a bundle and an archive of Parquet shards in, one predictions file a shard out."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_SCORE_")

    bundle: Place = Field(description="model bundle that jobs.train wrote; every node must be able to read it")
    input: Place = Field(description="archive: a folder of .parquet shards at any depth, or one shard")
    output: Place = Field(description="folder for predictions/, manifest/ and runs/; not inside the input")
    text_column: str = Field("text", description="column that holds the text")
    keep_columns: Columns = Field(default_factory=list, description="columns copied into the output, comma-separated")
    num_actors: int | None = Field(
        None, ge=1, description="model actors; default: one a GPU, without GPUs one for every 4 CPUs"
    )
    device: Device = Field("auto", description=DEVICE_HELP)
    engine: Engine = Field("auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field("auto", description=INFERENCE_PRECISION_HELP)

    plan: bool = Field(False, description="print what would be scored, why, and how long it would take; score nothing")
    price_per_hour: float | None = Field(None, ge=0, description="of one actor; with --plan, adds the estimated cost")
    prune: bool = Field(False, description="remove predictions of shards that the archive has no more")
    input_moved: bool = Field(
        False, description="all of the archive that --output holds predictions of lies at --input now"
    )

    max_error_fraction: float = Field(
        0.5, ge=0, le=1, description="of rows with an error, or of shards that failed; with more nothing is announced"
    )
    max_distance: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Jensen-Shannon distance of labels, scores, lengths and truncation, from the bundle's validation "
        "rows and from what was announced last; beyond it nothing is announced",
    )
    max_mean_change: float = Field(
        0.5,
        ge=0,
        le=2,
        description="of the mean score and length, in standard deviations; beyond it nothing is announced",
    )
    accept: bool = Field(False, description="announce what these three hold back")

    _engine_fits = model_validator(mode="after")(check_engine)

    @model_validator(mode="after")
    def _kept_columns_are_distinct(self) -> Self:
        for name in self.keep_columns:
            if name in RESERVED_COLUMNS:
                raise ValueError(
                    f"keep_columns: {name!r} is a column of the predictions themselves; "
                    f"reserved are {', '.join(sorted(RESERVED_COLUMNS))}"
                )
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise ValueError(f"keep_columns: {', '.join(self.keep_columns)} names a column twice")
        return self
