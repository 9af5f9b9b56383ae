"""The options of bertray score. `bertray.config` says how they are read."""

from pydantic import Field, model_validator

from bertray.config import DEVICE_HELP, ENGINE_HELP, INFERENCE_PRECISION_HELP, Columns, JobConfig, Place, check_engine
from bertray.types import Device, Engine, InferencePrecision


class ScoreConfig(JobConfig):
    """Score an archive of Parquet shards with a bundle: one predictions file a shard, under the same path.

        bertray score --bundle bundle --input archive --output scored
        bertray score --bundle s3://b/bundle --input s3://b/archive --output s3://b/scored --keep-columns document_id
        bertray score --bundle bundle --input archive --output scored --plan --price-per-hour 2.5
        ray job submit --address http://127.0.0.1:8265 \\
            --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}}' -- \\
            bertray score --bundle s3://b/bundle --input s3://b/archive --output s3://b/scored --device cuda

    Run it every night: only new and changed shards are scored. Run it again after a crash: that is the whole recovery.
    Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine.
    """

    bundle: Place = Field(description="model bundle that bertray train wrote; every node must be able to read it")
    input: Place = Field(description="archive: a folder of Parquet shards at any depth, or one shard")
    shards: Place | None = Field(
        default=None, description="text file with a path a line: score these files of --input, the live ones of a table"
    )
    output: Place = Field(description="folder for predictions/, manifest/ and runs/; not inside the input")
    text_column: str = Field(default="text", description="column that holds the text")
    keep_columns: Columns = Field(default_factory=list, description="columns to copy, as a line of CSV: date,author")
    probabilities: str | None = Field(
        default=None,
        pattern="^(all|top:[1-9][0-9]*)$",
        description="all adds a column with the probability of every label, in the bundle's order; top:3 one with the "
        "three likeliest labels and their probabilities",
    )
    num_actors: int | None = Field(
        default=None,
        ge=0,
        description="model actors; default: one per GPU, else one per 4 CPUs; 0: one child process, no Ray",
    )
    actors_per_gpu: int = Field(
        default=1, ge=1, description="model actors that share a GPU, for a model that is too small to fill one"
    )
    device: Device = Field(default="auto", description=DEVICE_HELP)
    engine: Engine = Field(default="auto", description=ENGINE_HELP)
    precision: InferencePrecision = Field(
        default="auto", description=f"{INFERENCE_PRECISION_HELP}; auto is decided once for --output"
    )

    unit_timeout: float = Field(
        default=600, gt=0, description="seconds without progress after which a process that scores is ended, as hung"
    )

    plan: bool = Field(default=False, description="print what would be scored, why, and for how long; score nothing")
    price_per_hour: float | None = Field(
        default=None,
        ge=0,
        description="price of one actor per hour; --plan then prints the estimated cost, its page the real one",
    )
    rescore: bool = Field(
        default=False, description="score all again because columns, engine or precision differ from the last run"
    )
    prune: bool = Field(default=False, description="remove the predictions of shards that are no longer in the archive")
    prune_many: bool = Field(
        default=False,
        description="as --prune, also where more than 20 % of the predictions, and more than 10, would go",
    )
    input_moved: bool = Field(default=False, description="the archive that --output belongs to has moved to --input")

    max_error_fraction: float = Field(
        default=0.5, ge=0, le=1, description="hold the run if a larger share of rows has an error, or of shards failed"
    )
    max_distance: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="hold the run if labels, scores, lengths or truncation have a larger Jensen-Shannon distance from "
        "the bundle's validation rows, or from the last announced run",
    )
    max_mean_change: float = Field(
        default=0.5,
        ge=0,
        le=2,
        description="hold the run if the mean score or length, or the deviation of numbers, moved by more standard "
        "deviations",
    )
    accept: bool = Field(default=False, description="publish the run even if one of these three limits is exceeded")

    _engine_fits = model_validator(mode="after")(check_engine)
