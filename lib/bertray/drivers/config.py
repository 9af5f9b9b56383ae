"""What jobs.evaluate, jobs.predict and jobs.demo can be told; how it is read, `bertray.config` says."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from bertray.config import ENGINE_HELP, INFERENCE_PRECISION_HELP, JobConfig, Place, Texts, check_engine
from bertray.types import Engine, InferencePrecision


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

    _engine_fits = model_validator(mode="after")(check_engine)


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

    _engine_fits = model_validator(mode="after")(check_engine)


class DemoConfig(JobConfig):
    """jobs.demo: a generated corpus through every job."""

    model_config = SettingsConfigDict(env_prefix="BERTRAY_DEMO_")

    output: Place = Field("demo", description="local folder; files of an earlier demo are replaced")
    num_labelled: int = Field(1839, ge=60, description="labelled chunks, as many as the reference tutorial has")
    num_archive: int = Field(4000, ge=80, description="unlabelled chunks in 8 shards")
    encoder: str = Field("minilm", description="as in jobs.train")
    epochs: int = Field(3, ge=1, description="as in jobs.train")
    learning_rate: float = Field(2e-4, gt=0, lt=1, description="above jobs.train's: a small encoder, few rows")
