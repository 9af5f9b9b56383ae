"""What each job can be told: one class a job, one field an option, its unit and the reason of its default beside it.

Values come from, later over earlier: the defaults here, a YAML file (`--config`), the environment
(`BERTRAY_TRAIN_LEARNING_RATE=3e-5`), flags (`--learning-rate 3e-5`). `bertray.cli` does the reading.
The jobs that train have theirs in `bertray.training_config`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from bertray.choices import (
    Device,
    Engine,
    InferencePrecision,
)
from bertray.option_types import Columns, LabelName, Paths, Place, Texts
from bertray.schema import RESERVED_COLUMNS

DEVICE_HELP = (
    "what workers run on; auto is cuda where the cluster has a GPU now; say cuda where GPU nodes start on demand"
)
PRECISION_HELP = "arithmetic of the model; auto is bf16 where the processor or GPU has it, else fp32"
INFERENCE_PRECISION_HELP = (
    f"{PRECISION_HELP}; with --engine openvino auto, like int8, is int8 if that costs at most 0.3 points of accuracy"
)
# auto: a result must not change because a package was installed.
ENGINE_HELP = "what runs the model; auto is torch; openvino (extra 'openvino') is faster on CPUs"

# Between the labels of one row, where they are written as one string.
DEFAULT_LABEL_SEPARATOR = ";"


def _check_engine(config: Any) -> Any:
    if config.precision == "int8" and config.engine != "openvino":
        raise ValueError(f"precision int8 needs engine openvino, and engine is {config.engine}: add --engine openvino")
    if config.engine == "openvino" and getattr(config, "device", "cpu") == "cuda":
        raise ValueError("engine openvino runs on CPUs, and device is cuda: leave one of the two out")
    return config


class JobConfig(BaseSettings):
    """What all jobs share: unknown keys are refused, and a configuration does not change after it was read."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)


class PrepareConfig(JobConfig):
    """jobs.prepare: labelled files in, a clean, encoded and split data set out."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_PREPARE_")

    input: Paths = Field(
        min_length=1, description="labelled files, folders or globs (CSV, JSON Lines, Parquet; .gz, .zst)"
    )
    output: Place = Field(description="folder of the data set; written whole, over an earlier data set")
    text_column: str = Field("text", description="column that holds the text")
    label_column: str = Field("label", description="column that holds the label")
    multi_label: bool = Field(
        False, description="a row may have several labels: a list of strings, or one string with separators"
    )
    label_separator: str | None = Field(
        None,
        min_length=1,
        description="with --multi-label: what stands between the labels of a row, where they are one string; "
        f"default: {DEFAULT_LABEL_SEPARATOR}",
    )
    oos_label: LabelName | None = Field(
        None,
        description="label of texts that fit no class (out of scope); --validation and --test may have such rows "
        "where training has none",
    )
    validation: Place | None = Field(None, description="file, folder or glob of a validation split of your own")
    test: Place | None = Field(None, description="file, folder or glob of a test split of your own")
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of the kept rows, where --validation is not given"
    )
    test_fraction: float = Field(0.1, gt=0, lt=1, description="share of the kept rows, where --test is not given")
    group_column: str | None = Field(None, description="rows that share its value stay on one side of every split")
    seed: int = Field(0, ge=0, lt=2**32, description="of the splits: the same seed and rows give the same splits")

    @property
    def separator(self) -> str | None:
        """What stands between the labels of a row: --label-separator or its default; None: a row has one label."""
        return (self.label_separator or DEFAULT_LABEL_SEPARATOR) if self.multi_label else None

    @model_validator(mode="after")
    def _options_of_several_labels(self) -> Self:
        if self.label_separator is not None and not self.multi_label:
            raise ValueError(
                f"label_separator {self.label_separator!r} has no meaning where a row has one label: "
                "add --multi-label, or leave it out"
            )
        if self.oos_label is not None and self.multi_label:
            raise ValueError(
                f"oos_label {self.oos_label!r} has no meaning with multi_label, where a text outside of every class "
                "is a row with an empty list of labels: leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _leave_rows_to_train_on(self) -> Self:
        held_out = (0 if self.validation else self.validation_fraction) + (0 if self.test else self.test_fraction)
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction is {held_out:g}, which leaves no row to train on; keep it below 1"
            )
        return self


class EvaluateConfig(JobConfig):
    """jobs.evaluate: a bundle and a split of a data set in, metrics and predictions out."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_EVALUATE_")

    bundle: Place = Field(description="model bundle that jobs.train wrote")
    data: Place = Field(description="data set folder that jobs.prepare wrote")
    split: Literal["train", "validation", "test"] = Field("test", description="rows to evaluate on")
    output: Place = Field(description="folder for metrics.json and predictions.parquet")
    oos_threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="score below which a text counts as out of scope, with a data set of --oos-label that has no such "
        "training rows; default: the bundle's review_below",
    )
    engine: Engine = Field("auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field("auto", description=INFERENCE_PRECISION_HELP)

    _engine_fits = model_validator(mode="after")(_check_engine)


class PredictConfig(JobConfig):
    """jobs.predict: texts in, one JSON object a text out."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_PREDICT_")

    bundle: Place = Field(description="model bundle that jobs.train wrote")
    texts: Texts = Field(
        default_factory=list,
        description="texts; without any, one text a line from standard input",
        json_schema_extra={"positional": True},
    )
    engine: Engine = Field("auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field("auto", description=INFERENCE_PRECISION_HELP)

    _engine_fits = model_validator(mode="after")(_check_engine)


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

    _engine_fits = model_validator(mode="after")(_check_engine)

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


class DemoConfig(JobConfig):
    """jobs.demo: a generated corpus through every job."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_DEMO_")

    output: Place = Field("demo", description="local folder; files of an earlier demo are replaced")
    num_labelled: int = Field(1839, ge=60, description="labelled chunks, as many as the reference tutorial has")
    num_archive: int = Field(4000, ge=80, description="unlabelled chunks in 8 shards")
    encoder: str = Field("minilm", description="as in jobs.train")
    epochs: int = Field(3, ge=1, description="as in jobs.train")
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="above jobs.train's: a small encoder, few rows")
