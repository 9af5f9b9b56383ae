"""The names and Arrow schemas of everything that is written to storage. Read this first.

1. A *data set* (bertray prepare): train.parquet, validation.parquet, test.parquet and labels.json

       text="B.Sc. in Physics, 2014"  label="Education"  label_id=1  source="cv/a.csv"  source_row=7

   With --oos-label, a held-out row that fits no class has label_id -1:

       text="is it art or is it mud"  label="oos"  label_id=-1  source="test.parquet"  source_row=4511

   With --multi-label, a row has a list of labels, which may be empty:

       text="thanks, that is lovely"  labels=["gratitude", "love"]  label_ids=[15, 18]  source=…  source_row=…

   With --regression, a row has a number:

       text="The cell divides in two …"  value=3.5  source="pages.csv"  source_row=7

2. *Predictions* (bertray score): one file per shard of the archive, with the shard's rows in their order

       row=0  document_id="resume-000123"  label="Education"  score=0.97  review=False  num_tokens=9  …  error=None
       row=1  document_id="resume-000124"  label=None  score=None  review=True  num_tokens=0  …  error="text is null"

   A multi-label bundle adds the labels whose probability reaches their threshold, the likeliest first:

       row=0  label="joy"  score=0.81  labels=["joy", "love"]  review=False  num_tokens=12  truncated=False  error=None

   A bundle of numbers gives a value and the interval that holds the true one; with cuts also the class between two:

       row=0  value=3.41  low=2.6  high=4.2  label="3 or more"  review=True  num_tokens=12  truncated=False  error=None

   With --probabilities, all of them in the order of the bundle's labels, or the K likeliest labels:

       …  probabilities=[0.81, 0.02, 0.64]        …  top_labels=[{"label": "joy", "score": 0.81}, {"label": "love", …}]

3. The *manifest* (bertray score): one record for every published shard.

4. The *shard report* of a run (bertray score): one record for every shard, scored or failed.

5. *Suspects* (bertray audit): training rows whose label is probably wrong, the worst first

       row=17  text="where is my new card"  label="top_up"  suggested_label="card"  given_probability=0.04
       suggested_probability=0.91  quality=0.04  source="train.csv"  source_row=21
"""

import json
from collections.abc import Sequence

import pyarrow as pa

from bertray.types import ProblemType


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SPLITS = ("train", "validation", "test")

TEXT, LABEL, LABEL_ID = "text", "label", "label_id"
LABELS, LABEL_IDS = "labels", "label_ids"
SOURCE, SOURCE_ROW = "source", "source_row"

DATASET_SCHEMA = pa.schema(
    [
        _required(TEXT, pa.string()),
        _required(LABEL, pa.string()),
        _required(LABEL_ID, pa.int32()),  # position in labels.json, or NO_CLASS
        _required(SOURCE, pa.string()),  # the file that the row was read from
        _required(SOURCE_ROW, pa.int64()),  # its position there, from 0
    ]
)
# label_id of a held-out row whose label (--oos-label) no training row has: no model can predict it.
NO_CLASS = -1

# The two lists of a row are parallel, in ascending order of the ids, without repeats. They are empty only if the input
# had an empty list. Rows whose labels are null, an empty cell or a list of blanks are left out.
MULTI_LABEL_SCHEMA = pa.schema(
    [
        DATASET_SCHEMA.field(TEXT),
        _required(LABELS, pa.list_(_required("element", pa.string()))),
        _required(LABEL_IDS, pa.list_(_required("element", pa.int32()))),
        DATASET_SCHEMA.field(SOURCE),
        DATASET_SCHEMA.field(SOURCE_ROW),
    ]
)

VALUE = "value"
REGRESSION_SCHEMA = pa.schema(
    [
        DATASET_SCHEMA.field(TEXT),
        _required(VALUE, pa.float64()),
        DATASET_SCHEMA.field(SOURCE),
        DATASET_SCHEMA.field(SOURCE_ROW),
    ]
)

ROW, SCORE, REVIEW, NUM_TOKENS, TRUNCATED, ERROR = "row", "score", "review", "num_tokens", "truncated", "error"

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field(LABEL, pa.string()),  # the likeliest; null if there is an error
        pa.field(SCORE, pa.float32()),  # its probability; null if there is an error
        # There is an error, or the score is below the bundle's `review_below`, if it has one.
        _required(REVIEW, pa.bool_()),
        _required(NUM_TOKENS, pa.int32()),  # that the model read in all windows, special tokens included
        _required(TRUNCATED, pa.bool_()),  # the model did not read the end of the text
        pa.field(ERROR, pa.string()),  # why the row could not be scored
    ]
)
# `labels` are all labels whose probability reaches their threshold, the likeliest first; null if there is an error. If
# none reaches it, the list is empty, and `label` is still the likeliest.
MULTI_LABEL_PREDICTION_SCHEMA = PREDICTION_SCHEMA.insert(2, MULTI_LABEL_SCHEMA.field(LABELS).with_nullable(True))

# All three are null if there is an error. The interval is null, too, if there were too few validation rows for one.
# `label` is there only if the bundle has cuts; then a row is reviewed whose interval holds one.
LOW, HIGH = "low", "high"
REGRESSION_PREDICTION_SCHEMA = pa.schema(
    [*(pa.field(name, pa.float32()) for name in (VALUE, LOW, HIGH)), *PREDICTION_SCHEMA.remove(1)]
)

# Part of a scoring fingerprint: raise it when the meaning of an output column changes. The new column `review` did not
# raise it: that would score every old archive again, only to write `false`. Nor did rows with an error, which have been
# true with any bundle since then. A bundle with `review_below` has a fingerprint of its own.
PREDICTIONS_VERSION = 1

# In the metadata of a table of predictions: the fast tokenizer's ids differed from the reference for the first time.
OTHER_IDS = b"bertray.other_ids"


# By problem type: what a row of a data set is given, and the schema of predictions.
_BY_TYPE: dict[ProblemType, tuple[pa.Field, pa.Schema]] = {
    "single_label_classification": (DATASET_SCHEMA.field(LABEL), PREDICTION_SCHEMA),
    "multi_label_classification": (MULTI_LABEL_SCHEMA.field(LABELS), MULTI_LABEL_PREDICTION_SCHEMA),
    "regression": (REGRESSION_SCHEMA.field(VALUE), REGRESSION_PREDICTION_SCHEMA),
}


# An element of the last column of predictions with --probabilities top:K, the likeliest first.
_TOP_LABEL = pa.struct([_required(LABEL, pa.string()), _required(SCORE, pa.float32())])
# In the metadata of a file with such a column, or with one of all probabilities: the bundle's labels, as JSON.
LABELS_KEY = b"bertray.labels"


def prediction_schema(problem_type: ProblemType, listed: str | None = None, labels: Sequence[str] = ()) -> pa.Schema:
    """Schema of a model's predictions; with the column that `--probabilities` (listed) adds, and labels as metadata."""
    found = _BY_TYPE[problem_type][1]
    if listed is None:
        return found
    name, element = ("probabilities", pa.float32()) if listed == "all" else ("top_labels", _TOP_LABEL)
    # Null if there is an error. Large lists: a step may have more than 2**31 numbers.
    field = pa.field(name, pa.large_list(_required("element", element)))
    return found.append(field).with_metadata({LABELS_KEY: json.dumps(list(labels), ensure_ascii=False)})


def predictions_schema(kept: list[pa.Field], predicted: pa.Schema) -> pa.Schema:
    """Schema of a predictions file: `row`, the columns kept from the shard, then a `prediction_schema`."""
    return pa.schema([_required(ROW, pa.int64()), *kept, *predicted])


MANIFEST_SCHEMA = pa.schema(
    [
        _required("path", pa.string()),  # of the shard, relative to the input
        _required("size_bytes", pa.int64()),
        _required("version", pa.string()),  # the shard's etag (S3) or modification time (files)
        _required("fingerprint", pa.string()),  # of bundle, columns, engine and precision: see scoring.manifest
        *(_required(name, pa.int64()) for name in ("num_rows", "num_rows_error", "num_tokens")),
        _required("run_id", pa.string()),  # the run that scored the shard
        _required("committed_at", pa.timestamp("us", tz="UTC")),
    ]
)

# Bins of the histograms of scores and lengths: see `bertray.metrics.profile`.
NUM_SCORE_BINS, NUM_LENGTH_BINS = 20, 20

# A record as it is written: with the rest of the shard's profile, which is null in old records.
RECORD_SCHEMA = pa.schema(
    [
        *MANIFEST_SCHEMA,
        *(
            pa.field(name, pa.int64())
            for name in ("num_rows_truncated", "num_rows_review", "num_rows_unlabelled", "num_tokens_error")
        ),
        pa.field("labels", pa.map_(pa.string(), pa.int64())),
        pa.field("scores", pa.list_(pa.int32(), NUM_SCORE_BINS)),
        pa.field("lengths", pa.list_(pa.int32(), NUM_LENGTH_BINS)),
        *(pa.field(name, pa.float64()) for name in ("score_sum", "score_square_sum", "length_square_sum")),
        pa.field("precision", pa.string()),  # in which the model ran
    ]
)

_OF_RECORDS_ALONE = ("size_bytes", "version", "fingerprint", "run_id", "committed_at", "precision")
# Path, profile, and why the shard has no predictions; then all counts are 0. Old reports lack some counts.
SHARD_REPORT_SCHEMA = pa.schema(
    [*(field for field in RECORD_SCHEMA if field.name not in _OF_RECORDS_ALONE), pa.field("failure", pa.string())]
)

SUGGESTED = "suggested_"  # before the name of the column that holds what is given
GIVEN_PROBABILITY, SUGGESTED_PROBABILITY, QUALITY = "given_probability", "suggested_probability", "quality"


def suspect_schema(problem_type: ProblemType) -> pa.Schema:
    """Schema of suspects; lists of labels and of suggested labels are in label id order."""
    given, _ = _BY_TYPE[problem_type]
    # By a model that was not trained on this row. For multi-label data: over all doubted decisions. Numbers have none.
    names = () if given.name == VALUE else (GIVEN_PROBABILITY, SUGGESTED_PROBABILITY)
    return pa.schema(
        [
            _required(ROW, pa.int64()),  # position in train.parquet, from 0
            DATASET_SCHEMA.field(TEXT),
            given,
            given.with_name(f"{SUGGESTED}{given.name}"),
            *(_required(name, pa.float32()) for name in names),
            _required(QUALITY, pa.float32()),  # of the row's labels or number: from 0 (wrong) to 1
            DATASET_SCHEMA.field(SOURCE),
            DATASET_SCHEMA.field(SOURCE_ROW),
        ]
    )
