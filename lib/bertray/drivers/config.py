"""The options of bertray evaluate, predict and demo; how they are read, `bertray.config` says."""

from typing import Literal

from pydantic import Field, model_validator

from bertray.config import ENGINE_HELP, INFERENCE_PRECISION_HELP, JobConfig, Place, Texts, check_engine
from bertray.types import Engine, InferencePrecision

# Of a million rows TF-IDF takes minutes and gigabytes, and the answer is the same.
MAX_BASELINE_ROWS = 50_000


class EvaluateConfig(JobConfig):
    """Measure a bundle on a split of a data set, beside TF-IDF + logistic regression on the same rows.

        bertray evaluate --bundle bundle --data dataset --output evaluation
        bertray evaluate --bundle s3://bucket/bundle --data s3://bucket/dataset --split validation --output eval
        bertray evaluate --bundle bundle --data dataset --output evaluation --oos-threshold 0.5

    Writes metrics.json and predictions.parquet.
    """

    bundle: Place = Field(description="model bundle that bertray train wrote")
    data: Place = Field(description="data set folder that bertray prepare wrote")
    split: Literal["train", "validation", "test"] = Field(default="test", description="rows to evaluate on")
    output: Place = Field(description="folder for metrics.json and predictions.parquet")
    oos_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="score below which a text counts as out of scope, with a data set of --oos-label that has no such "
        "training rows; default: the bundle's review_below",
    )
    baseline: bool = Field(
        default=True,
        description="compare with TF-IDF and logistic regression, fitted on at most "
        f"{MAX_BASELINE_ROWS:,} training rows",
    )
    engine: Engine = Field(default="auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field(default="auto", description=INFERENCE_PRECISION_HELP)

    _engine_fits = model_validator(mode="after")(check_engine)


class PredictConfig(JobConfig):
    """Classify a few texts with a bundle: one JSON object a text on stdout.

        bertray predict --bundle bundle "B.Sc. in Physics, 2014" "Python, SQL, Spark"
        bertray predict --bundle bundle < texts.txt | jq -r .label

    Without texts it reads standard input, one text a line. Each text is a row of the predictions that bertray score
    writes.
    """

    bundle: Place = Field(description="model bundle that bertray train wrote")
    texts: Texts = Field(
        default_factory=list,
        description="texts; without any, one text a line from standard input",
        json_schema_extra={"positional": True},
    )
    engine: Engine = Field(default="auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field(default="auto", description=INFERENCE_PRECISION_HELP)

    _engine_fits = model_validator(mode="after")(check_engine)


class DemoConfig(JobConfig):
    """See the whole of it work: a generated résumé corpus through prepare, train, evaluate and score.

        bertray demo
        bertray demo --output /tmp/demo --num-labelled 400 --num-archive 400 --epochs 1

    The corpus is synthetic: its accuracy says nothing about your data. Every step is a command that you can type
    yourself; it is printed before it runs.
    """

    output: Place = Field(default="demo", description="local folder; files of an earlier demo are replaced")
    num_labelled: int = Field(default=1839, ge=60, description="labelled chunks, as many as the reference tutorial has")
    num_archive: int = Field(default=4000, ge=80, description="unlabelled chunks in 8 shards")
    encoder: str = Field(default="minilm", description="as in bertray train")
    epochs: int = Field(default=3, ge=1, description="as in bertray train")
    learning_rate: float = Field(
        default=2e-4, gt=0, lt=1, description="above bertray train's: a small encoder, few rows"
    )
