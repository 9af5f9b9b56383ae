"""The options of bertray prepare; `bertray.config` tells how they are read."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from bertray.config import OVERWRITE_HELP, JobConfig, LabelName, Paths, Place

_DEFAULT_LABEL_SEPARATOR = ";"


class PrepareConfig(JobConfig):
    """Clean labelled files, encode their labels and split them into train, validation and test.

        bertray prepare --input labelled.csv --output dataset
        bertray prepare --input 'chunks/*.jsonl.gz' --text-column body --label-column section --output dataset
        bertray prepare --input train.parquet --validation dev.parquet --test test.parquet --output s3://bucket/dataset
        bertray prepare --input emotions.csv --multi-label --label-separator '|' --output dataset
        bertray prepare --input pages.csv --label-column grade --regression --output dataset
        bertray prepare --input intents.csv --test with_others.csv --oos-label oos --output dataset

    Reads CSV and JSON (also .gz and .zst), Parquet, Arrow, and folders of save_to_disk. Writes train.parquet,
    validation.parquet, test.parquet, labels.json and report.json, which counts every row: read = kept + taken out, by
    reason.
    """

    input: Paths = Field(
        min_length=1,
        description="labelled files, folders or globs (CSV, TSV, JSON, these also .gz or .zst; Parquet, Arrow)",
    )
    encoding: str | None = Field(
        default=None,
        description="encoding of CSV, TSV and JSON files without a byte order mark, as cp1252, gb18030 or utf-16-le; "
        "default: UTF-8",
    )
    output: Place = Field(description="folder for the data set")
    overwrite: bool = Field(default=False, description=OVERWRITE_HELP)
    text_column: str = Field(default="text", description="column that holds the text")
    label_column: str = Field(default="label", description="column that holds the label")
    multi_label: bool = Field(
        default=False, description="a row may have several labels: a list of strings, or one string with separators"
    )
    label_separator: str | None = Field(
        default=None,
        min_length=1,
        description="with --multi-label: the separator of the labels, if they are one string; "
        f"default: {_DEFAULT_LABEL_SEPARATOR}",
    )
    regression: bool = Field(default=False, description="a row has a number instead of a label")
    max_spread: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="with --regression: rows of equal texts whose numbers differ by more are taken out; default: equal "
        "texts get the mean of their numbers",
    )
    oos_label: LabelName | None = Field(
        default=None,
        description="label of texts that fit no class (out of scope); --validation and --test may have such rows even "
        "if the training rows have none",
    )
    validation: Place | None = Field(default=None, description="your own validation split: a file, folder or glob")
    test: Place | None = Field(default=None, description="your own test split: a file, folder or glob")
    validation_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="share of the kept rows, if --validation is not given"
    )
    test_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of the kept rows, if --test is not given")
    group_column: str | None = Field(
        default=None, description="rows with the same value in this column stay in the same split"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="seed of the splits: the same seed and rows give the same splits"
    )

    @property
    def separator(self) -> str | None:
        """Separates the labels of a row; None: a row has one label."""
        return (self.label_separator or _DEFAULT_LABEL_SEPARATOR) if self.multi_label else None

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        try:
            "".encode(name or "utf-8")
        except LookupError as error:
            raise ValueError(
                f"{error}: give the name of an encoding that Python knows, as cp1252 or gb18030"
            ) from error
        return name

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.label_separator is not None and not self.multi_label:
            raise ValueError(
                f"label_separator {self.label_separator!r} has no meaning where a row has one label: "
                "add --multi-label, or leave it out"
            )
        if self.regression and (self.multi_label or self.oos_label is not None):
            raise ValueError(
                "regression has no meaning with multi_label or oos_label, which are about labels: leave one of them out"
            )
        if self.max_spread is not None and not self.regression:
            raise ValueError(f"max_spread {self.max_spread:g} has no meaning without regression: leave it out")
        if self.oos_label is not None and self.multi_label:
            raise ValueError(
                f"oos_label {self.oos_label!r} has no meaning with multi_label, where a text out of scope has an empty "
                "list of labels: leave one of the two out"
            )
        held_out = (0 if self.validation else self.validation_fraction) + (0 if self.test else self.test_fraction)
        if held_out >= 1:
            raise ValueError(
                f"validation_fraction + test_fraction is {held_out:g}, which leaves no row to train on; keep it below 1"
            )
        return self
