"""The options of bertray train, tune, audit and adopt; `bertray.config` says how they are read."""

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from bertray.config import (
    DEVICE_HELP,
    OVERWRITE_HELP,
    PAGE_TEXTS_HELP,
    PRECISION_HELP,
    Bounds,
    Columns,
    Cuts,
    JobConfig,
    Numbers,
    Place,
    Workers,
    bounds,
)
from bertray.types import ClassWeights, Device, Keep, LongDocuments, Precision

_TARGET_PRECISION_HELP = "such as 0.95: mark rows for review whose score is too low for it"
_COVERAGE_HELP = "of numbers: share of the true values that the intervals are to hold"
_CUTS_HELP = (
    "of numbers: where a class ends and the next begins, as 2.5 or 1,2,3; auto: between all neighbours of up to 10 "
    "different training values, else at their thirds"
)


class TrainingOptions(JobConfig):
    """Options that all jobs with a fine-tuning share."""

    data: Place = Field(description="data set folder that bertray prepare wrote")
    output: Place = Field(description="folder for the result")
    overwrite: bool = Field(default=False, description=OVERWRITE_HELP)
    encoder: Place = Field(
        default="bert-base-uncased",
        description="Hub id or NAME@REVISION, folder that every node can read, or minilm: the one of the extra 'demo'",
    )
    epochs: int = Field(default=3, ge=1, le=1000, description="passes over the training rows; for BERT 2 to 4")
    learning_rate: float = Field(default=5e-5, gt=0, lt=1, description="peak learning rate; for BERT 2e-5 to 5e-5")
    batch_size: int = Field(default=32, ge=1, description="texts (or windows) per step, over all workers")
    max_length: int = Field(default=128, ge=8, description="tokens that the model reads at once; longer is slower")
    long_documents: LongDocuments = Field(
        default="truncate",
        description="texts over --max-length: truncate reads the beginning; mean and max read all, in overlapping "
        "windows, and take each label's mean or largest logit; stored in the bundle",
    )
    stride: int | None = Field(
        default=None,
        ge=0,
        description="with mean and max: the least number of tokens that neighbouring windows share; default: a quarter "
        "of --max-length, so that most sentences are whole in one window",
    )
    weight_decay: float = Field(default=0.01, ge=0, lt=1, description="AdamW's; not applied to biases and norms")
    warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="share of steps with a rising learning rate")
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="each layer's learning rate, as a share of the layer's above it; 1: all the same",
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share of probability spread over all classes")
    class_weights: ClassWeights = Field(default="none", description="balanced: rare classes weigh more in the loss")
    huber: bool = Field(
        default=False,
        description="of numbers: errors beyond a standard deviation count by their size, not by its square, so that "
        "outliers govern training less",
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="run each step in parts of at most this many tokens per worker and add up their gradients: less "
        "memory, the same step except for dropout; default: 2048 on CPUs, 65536 on GPUs",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, a third slower"
    )
    device: Device = Field(default="auto", description=DEVICE_HELP)
    precision: Precision = Field(default="auto", description=PRECISION_HELP)
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of all that is random, as dropout and the order of rows"
    )

    @model_validator(mode="after")
    def _stride_belongs_to_windows(self) -> Self:
        if self.long_documents == "truncate" and self.stride is not None:
            raise ValueError(
                f"stride {self.stride} has no meaning with long_documents truncate: leave it out, or use mean or max"
            )
        return self

    @property
    def overlap(self) -> int | None:
        """The least number of tokens that neighbouring windows share; None: no windows."""
        if self.long_documents == "truncate":
            return None
        return self.max_length // 4 if self.stride is None else self.stride


class TrainConfig(TrainingOptions):
    """Fine-tune a BERT classifier on a prepared data set, data-parallel, and write the bundle.

        bertray train --data dataset --output bundle --encoder minilm
        bertray train --data dataset --output bundle --encoder minilm --max-length 256 --long-documents mean
        bertray train --data dataset --output bundle --encoder bert-base-uncased --epochs 3 --learning-rate 5e-5
        ray job submit --address http://127.0.0.1:8265 \\
            --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}}' -- \\
            bertray train --data s3://bucket/dataset --output s3://bucket/bundle --num-workers 4 --device cuda

    Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine. Keeps the epoch with the best
    macro-F1 on validation. The same command continues a run that was interrupted.
    """

    output: Place = Field(description="folder of the model bundle")
    keep: Keep = Field(
        default="best",
        description="of the epochs: the best by macro-F1 on validation, of numbers by Spearman's correlation; or the "
        "last",
    )
    target_precision: float | None = Field(default=None, gt=0, lt=1, description=_TARGET_PRECISION_HELP)
    coverage: float = Field(default=0.9, gt=0, lt=1, description=_COVERAGE_HELP)
    cuts: Cuts | None = Field(default=None, description=_CUTS_HELP)
    patience: int | None = Field(default=None, ge=1, description="stop after this many epochs without a better one")
    checkpoint_minutes: float = Field(default=10.0, gt=0, description="time between checkpoints, to continue from")
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="steps between checkpoints, instead of minutes"
    )
    restart: bool = Field(default=False, description="discard an unfinished run and start over")
    max_failures: int = Field(
        default=3, ge=0, description="restarts after a lost worker or node, counted while no new checkpoint is written"
    )
    num_workers: Workers = Field(
        default="1",
        description="data-parallel workers, such as 4; 2:8 is elastic: as many of 2 to 8 as the cluster has. One "
        "per GPU, on CPUs one per machine; 0: train in this process, without Ray",
    )
    mlflow_uri: Place | None = Field(
        default=None,
        description="MLflow server that gets parameters and metrics, as http://HOST:5000; needs the extra 'mlflow'",
    )
    mlflow_experiment: str = Field(default="bertray", min_length=1, description="MLflow experiment; created if missing")

    @model_validator(mode="after")
    def _mlflow_uri_holds_no_secret(self) -> Self:
        if self.mlflow_uri and "@" in urlsplit(self.mlflow_uri).netloc:
            # Not a check of the field alone, whose message would repeat the value.
            raise ValueError(
                "mlflow_uri holds a user or a password, and would be written into the bundle: leave them out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        lowest, _, highest = self.num_workers.partition(":")
        return int(lowest), int(highest or lowest)


class AuditConfig(TrainingOptions):
    """Find training rows whose labels are probably wrong, by models that were fine-tuned on the other rows.

        bertray audit --data dataset --output label_check --encoder minilm
        bertray audit --data dataset --output label_check --encoder minilm --folds 10 --epochs 5 --learning-rate 2e-4

    Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine, as long as --folds trainings.
    Writes suspects.parquet, the worst first, label_quality.json, and report.html, which shows both. The data set is not
    changed: look at the rows, correct the labelled files, and prepare them again.
    """

    output: Place = Field(description="folder for suspects.parquet and label_quality.json")
    folds: int = Field(
        default=5, ge=2, le=100, description="number of models; each judges the rows that it was not trained on"
    )
    num_workers: int | None = Field(
        default=None, ge=1, description="folds at a time; default: one per GPU, or without GPUs one per 4 CPUs"
    )
    max_failures: int = Field(default=3, ge=0, description="restarts of a fold after a lost worker or node")
    page_texts: int = Field(default=20, ge=0, description=PAGE_TEXTS_HELP)


class TuneConfig(TrainConfig):
    """Search for the training options that do best on validation, and write the bundle of the best trial.

        bertray tune --data dataset --output bundle --encoder minilm --num-trials 16
        bertray tune --data dataset --output bundle --encoder minilm --learning-rates 1e-4:1e-3 --layer-decays 1
        bertray tune --data dataset --output bundle --encoder minilm --num-trials 5 --only-seeds

    Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine. The first trial has the options
    of bertray train; ASHA stops trials that fall behind. The same command continues a search that was interrupted.
    """

    num_trials: int = Field(default=16, ge=1, description="trials, the first of which has the options of bertray train")
    num_concurrent: int | None = Field(
        default=None, ge=1, description="trials at a time; default: one per GPU, or without GPUs one per 4 CPUs"
    )
    learning_rates: Bounds = Field(default="2e-5:5e-4", description="range of the learning rate; drawn log-uniformly")
    batch_sizes: Numbers = Field(default="16,32,64", description="batch sizes to draw from")
    only_seeds: bool = Field(default=False, description="vary only the seed: --seed plus the trial's number")
    min_epochs: int = Field(default=2, ge=1, description="fewest epochs of a trial that is not pruned")
    max_epochs: int = Field(default=5, ge=1, description="most epochs of a trial")
    warmup_fractions: Bounds = Field(default="0:0.2", description="lowest and highest warm-up fraction")
    label_smoothings: Bounds = Field(default="0:0.1", description="lowest and highest label smoothing")
    layer_decays: Bounds = Field(default="0.8:1", description="lowest and highest layer decay")
    # Options of bertray train that have no meaning in a search; --help does not show them.
    num_workers: Workers = Field(default="1", description="must be 1", json_schema_extra={"hidden": True})
    mlflow_uri: Place | None = Field(default=None, description="must be left out", json_schema_extra={"hidden": True})
    mlflow_experiment: str = Field(default="bertray", description="not used", json_schema_extra={"hidden": True})

    @model_validator(mode="after")
    def _options_go_together(self) -> Self:
        if self.num_workers != "1":
            raise ValueError(
                f"num_workers {self.num_workers} has no meaning in a search, where a trial is one process: leave it "
                "out, and set num_concurrent, the number of trials at a time"
            )
        if self.mlflow_uri is not None:
            raise ValueError("mlflow_uri has no meaning in a search, whose trials are not sent to MLflow: leave it out")
        drawn = {*(f"{name}s" for name in self.searched_bounds), "batch_sizes", "min_epochs"}
        if self.only_seeds and (given := sorted(drawn & self.model_fields_set)):
            raise ValueError(
                f"{', '.join(given)} has no meaning with only_seeds, which varies only the seed: leave it out"
            )
        if self.min_epochs > self.max_epochs:
            raise ValueError(f"min_epochs {self.min_epochs} is above max_epochs {self.max_epochs}")
        if self.epochs > self.max_epochs:
            raise ValueError(
                f"epochs {self.epochs}, of the first trial, is above max_epochs {self.max_epochs}: raise --max-epochs, "
                f"or add --epochs {self.max_epochs}"
            )
        for name, text in self.searched_bounds.items():
            for bound in bounds(text):
                try:
                    TrainingOptions.model_validate({"data": "unused", "output": "unused", name: bound})
                except ValidationError as error:
                    raise ValueError(f"{name}s {text}: {bound:g} is not allowed. {error.errors()[0]['msg']}") from error
        return self

    @property
    def searched_bounds(self) -> dict[str, str]:
        """The `Bounds` of each option that is drawn from an interval of real numbers."""
        searched = ("learning_rate", "warmup_fraction", "label_smoothing", "layer_decay")
        return {name: getattr(self, f"{name}s") for name in searched}


class AdoptConfig(JobConfig):
    """Make a bundle of a classifier that others have fine-tuned.

        bertray adopt --model models/tickets --output bundle
        bertray adopt --model models/tickets --output bundle --data dataset --target-precision 0.95
        bertray adopt --model OWNER/NAME@REVISION --output bundle --max-length 256 --labels negative,neutral,positive

    The model is a sequence classifier with its tokenizer, as transformers saves it. With a data set of its labels it is
    calibrated and measured on the validation rows, as bertray train does it. Runs in this process, without Ray.
    """

    model: Place = Field(description="Hub id or NAME@REVISION, or a folder, of a sequence classifier of transformers")
    output: Place = Field(description="folder of the model bundle")
    data: Place | None = Field(
        default=None, description="data set folder that bertray prepare wrote, to calibrate and measure the model on"
    )
    max_length: int | None = Field(default=None, ge=8, description="tokens that it reads at once; default: all it can")
    labels: Columns = Field(
        default_factory=list,
        description="names of the model's outputs, in their order, as a line of CSV; default: id2label of its config",
    )
    target_precision: float | None = Field(
        default=None, gt=0, lt=1, description=f"{_TARGET_PRECISION_HELP}; needs --data"
    )
    coverage: float = Field(default=0.9, gt=0, lt=1, description=f"{_COVERAGE_HELP}; needs --data")
    cuts: Cuts | None = Field(default=None, description=f"{_CUTS_HELP}; needs --data")

    @model_validator(mode="after")
    def _a_precision_needs_rows(self) -> Self:
        given = {"target_precision", "coverage", "cuts"} & self.model_fields_set
        if self.data is None and (found := [name for name in sorted(given) if getattr(self, name) is not None]):
            raise ValueError(f"{', '.join(found)} needs rows to be found on: add --data DATASET")
        return self
