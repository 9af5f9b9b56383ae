"""The options of bertray evaluate, predict, verify, report and demo; `bertray.config` says how they are read."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bertray.config import (
    ENGINE_HELP,
    INFERENCE_PRECISION_HELP,
    OVERWRITE_HELP,
    PAGE_TEXTS_HELP,
    JobConfig,
    Paths,
    Place,
    Texts,
    check_engine,
)
from bertray.types import Engine, InferencePrecision

# On a million rows TF-IDF takes minutes and gigabytes, and the result is the same.
MAX_BASELINE_ROWS = 50_000


class EvaluateConfig(JobConfig):
    """Measure a bundle on a split of a data set, beside TF-IDF + logistic regression on the same rows.

        bertray evaluate --bundle bundle --data dataset --output evaluation
        bertray evaluate --bundle s3://bucket/bundle --data s3://bucket/dataset --split validation --output eval
        bertray evaluate --bundle bundle --data dataset --output evaluation --oos-threshold 0.5

    Writes metrics.json, predictions.parquet, and report.html, which shows both.
    """

    bundle: Place = Field(description="model bundle that bertray train wrote")
    data: Place = Field(description="data set folder that bertray prepare wrote")
    split: Literal["train", "validation", "test"] = Field(default="test", description="rows to evaluate on")
    output: Place = Field(description="folder for metrics.json and predictions.parquet")
    overwrite: bool = Field(default=False, description=OVERWRITE_HELP)
    oos_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="score below which a text counts as out of scope, for a data set prepared with --oos-label that "
        "has no such training rows; default: the bundle's review_below",
    )
    baseline: bool = Field(
        default=True, description=f"compare with TF-IDF + logistic regression on up to {MAX_BASELINE_ROWS:,} rows"
    )
    engine: Engine = Field(default="auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field(default="auto", description=INFERENCE_PRECISION_HELP)
    page_texts: int = Field(default=20, ge=0, description=PAGE_TEXTS_HELP)

    _engine_fits = model_validator(mode="after")(check_engine)


class PredictConfig(JobConfig):
    """Classify a few texts with a bundle: one JSON object per text on stdout.

        bertray predict --bundle bundle "B.Sc. in Physics, 2014" "Python, SQL, Spark"
        bertray predict --bundle bundle < texts.txt | jq -r .label

    Without texts it reads standard input, one text per line. Each object is a row of predictions as bertray score
    writes them.
    """

    bundle: Place = Field(description="model bundle that bertray train wrote")
    texts: Texts = Field(
        default_factory=list,
        description="texts; without any, standard input is read, one text per line",
        json_schema_extra={"positional": True},
    )
    engine: Engine = Field(default="auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field(default="auto", description=INFERENCE_PRECISION_HELP)

    _engine_fits = model_validator(mode="after")(check_engine)


class VerifyConfig(JobConfig):
    """Check that every published file is what its record and runs/latest.json say.

        bertray verify --output scored
        bertray verify --output s3://bucket/scored --sample 1000
        bertray verify --output scored --repair

    Reads the footer, rows, labels and errors of every file under predictions/. Ends with 1 if something does not hold,
    also if that was repaired.
    """

    output: Place = Field(description="folder that bertray score wrote")
    sample: int | None = Field(default=None, ge=1, description="read so many files, drawn at random, instead of all")
    repair: bool = Field(
        default=False, description="drop the records of files that do not hold: bertray score then scores these again"
    )


class ReportConfig(JobConfig):
    """Make the page of an output that jobs have written: one HTML file beside its files.

        bertray report evaluation
        bertray report bundle evaluation label_check scored scored/runs/20260105T031500.123456Z
        bertray report evaluation --page-texts 0

    PATH is a folder that bertray train, tune, evaluate, audit or score wrote, or one of its runs/. The jobs make their
    pages themselves; this makes those of old outputs, or others.
    """

    paths: Paths = Field(default_factory=list, description="folders of outputs", json_schema_extra={"positional": True})
    page_texts: int = Field(default=20, ge=0, description=PAGE_TEXTS_HELP)

    @model_validator(mode="after")
    def _there_is_one(self) -> Self:
        if not self.paths:
            raise ValueError("name an output, as in: bertray report evaluation")
        return self


class DemoConfig(JobConfig):
    """Try everything on passages of docstrings: prepare, train, evaluate and score.

        bertray demo
        bertray demo --output /tmp/demo --num-labelled 400 --num-archive 400 --epochs 1

    The task: which section of a docstring does a passage come from? Every step is a command that you can type
    yourself; the demo prints it before it runs it.
    """

    output: Place = Field(default="demo", description="local folder; files of an earlier demo are replaced")
    num_labelled: int = Field(default=3000, ge=60, le=3000, description="labelled passages")
    num_archive: int = Field(default=4000, ge=80, le=4000, description="unlabelled passages in 8 shards")
    encoder: str = Field(default="minilm", description="as in bertray train")
    epochs: int = Field(default=3, ge=1, description="as in bertray train")
    learning_rate: float = Field(
        default=2e-4, gt=0, lt=1, description="higher than in bertray train: the encoder is small, the rows are few"
    )
