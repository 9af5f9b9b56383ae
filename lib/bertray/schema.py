"""The names and Arrow schemas of everything that is written to storage. Read this first.

1. A *data set* (bertray prepare): train.parquet, validation.parquet, test.parquet and labels.json

       text="B.Sc. in Physics, 2014"  label="Education"  label_id=1  source="cv/a.csv"  source_row=7

   With --oos-label a held-out row of no class has label_id -1:

       text="is it art or is it mud"  label="oos"  label_id=-1  source="test.parquet"  source_row=4511

   With --multi-label a row has a list of labels, which may be empty:

       text="thanks, that is lovely"  labels=["gratitude", "love"]  label_ids=[15, 18]  source=…  source_row=…

2. *Predictions* (bertray score): one file per shard of the archive, the shard's rows in the shard's order

       row=0  document_id="resume-000123"  label="Education"  score=0.97  review=False  num_tokens=9  …  error=None
       row=1  document_id="resume-000124"  label=None  score=None  review=True  num_tokens=0  …  error="text is null"

   Of a bundle with several labels a row, each has all that it is sure enough of, the likeliest first:

       row=0  label="joy"  score=0.81  labels=["joy", "love"]  review=False  num_tokens=12  truncated=False  error=None

3. The *manifest* (bertray score): one record for every shard whose predictions are committed.

4. The *shard report* of a run (bertray score): what became of every shard, failures too.

5. *Suspects* (bertray audit): training rows whose label is probably wrong, the worst first

       row=17  text="where is my new card"  label="top_up"  suggested_label="card"  given_probability=0.04
       suggested_probability=0.91  quality=0.04  source="train.csv"  source_row=21

6. The *trials* of a search (bertray tune), beside the bundle of the best one.
"""

import pyarrow as pa

from bertray.types import ProblemType

SPLITS = ("train", "validation", "test")

TEXT, LABEL, LABEL_ID = "text", "label", "label_id"
LABELS, LABEL_IDS = "labels", "label_ids"
SOURCE, SOURCE_ROW = "source", "source_row"

DATASET_SCHEMA = pa.schema(
    [
        pa.field(TEXT, pa.string(), nullable=False),
        pa.field(LABEL, pa.string(), nullable=False),
        pa.field(LABEL_ID, pa.int32(), nullable=False),  # position in labels.json; NO_CLASS: out of scope
        pa.field(SOURCE, pa.string(), nullable=False),  # the file that the row was read from
        pa.field(SOURCE_ROW, pa.int64(), nullable=False),  # its position there, from 0
    ]
)
# label_id of a held-out row whose label (--oos-label) no training row has: no model can predict it.
NO_CLASS = -1

# The two lists of a row are parallel, in ascending order of the ids, without repeats. Both are empty where the row was
# given an empty list on purpose; a null, an empty cell and a list of blanks are no labels, and such rows are left out.
MULTI_LABEL_SCHEMA = pa.schema(
    [
        DATASET_SCHEMA.field(TEXT),
        pa.field(LABELS, pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
        pa.field(LABEL_IDS, pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        DATASET_SCHEMA.field(SOURCE),
        DATASET_SCHEMA.field(SOURCE_ROW),
    ]
)

ROW, SCORE, REVIEW, NUM_TOKENS, TRUNCATED, ERROR = "row", "score", "review", "num_tokens", "truncated", "error"

# What a model says of one text. `label` is the likeliest, `score` its probability; both are null where `error`
# is not.
PREDICTION_SCHEMA = pa.schema(
    [
        pa.field(LABEL, pa.string()),
        pa.field(SCORE, pa.float32()),
        # The score is below the bundle's `review_below`, or there is none. Without a `review_below`: never.
        pa.field(REVIEW, pa.bool_(), nullable=False),
        # Tokens that the model read, special ones too, in all windows.
        pa.field(NUM_TOKENS, pa.int32(), nullable=False),
        pa.field(TRUNCATED, pa.bool_(), nullable=False),  # the model did not read the text to its end
        pa.field(ERROR, pa.string()),  # why the row could not be scored
    ]
)
# With several labels a row also all those whose probability reaches their threshold, the likeliest first; maybe none.
# Where none does, `label` is still the likeliest. Null where `error` is not.
MULTI_LABEL_PREDICTION_SCHEMA = PREDICTION_SCHEMA.insert(2, MULTI_LABEL_SCHEMA.field(LABELS).with_nullable(True))

# Part of a scoring fingerprint: raise it when the meaning of an output column changes. `review`, a new column, did not
# raise it: a bundle that was there before reviews nothing, and an archive of hundreds of millions of rows would be
# scored again to write `false` into each. A bundle that does review has a fingerprint of its own.
PREDICTIONS_VERSION = 1

# In the metadata of a table of predictions: for the first time other token ids than the reference tokenizer's were met.
OTHER_IDS = b"bertray.other_ids"


def prediction_schema(problem_type: ProblemType) -> pa.Schema:
    """Schema of what a model of this kind says."""
    return MULTI_LABEL_PREDICTION_SCHEMA if problem_type == "multi_label_classification" else PREDICTION_SCHEMA


def predictions_schema(kept: list[pa.Field], predicted: pa.Schema) -> pa.Schema:
    """Schema of a predictions file: `row`, the columns kept from the shard, then a `prediction_schema`."""
    return pa.schema([pa.field(ROW, pa.int64(), nullable=False), *kept, *predicted])


# Columns of a predictions file that a kept column may not be named after.
RESERVED_COLUMNS = frozenset([ROW, *MULTI_LABEL_PREDICTION_SCHEMA.names])

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # of the shard, relative to the input
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),  # its etag (S3) or modification time (files)
        pa.field("fingerprint", pa.string(), nullable=False),  # of bundle, columns and policy: see scoring.manifest
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_rows_error", pa.int64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("committed_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

# Rows by score and by length are counted in so many bins: see `bertray.metrics.profile`.
NUM_SCORE_BINS, NUM_LENGTH_BINS = 20, 20

SHARD_REPORT_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # of the shard, relative to the input
        pa.field("failure", pa.string()),  # why it has no predictions; then nothing is counted
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_rows_error", pa.int64(), nullable=False),
        pa.field("num_rows_truncated", pa.int64(), nullable=False),
        pa.field("num_rows_review", pa.int64()),  # null in reports of before there were these two
        pa.field("num_rows_unlabelled", pa.int64()),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("labels", pa.map_(pa.string(), pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.int32(), NUM_SCORE_BINS), nullable=False),
        pa.field("lengths", pa.list_(pa.int32(), NUM_LENGTH_BINS), nullable=False),
        pa.field("score_sum", pa.float64(), nullable=False),
        pa.field("score_square_sum", pa.float64(), nullable=False),
        pa.field("length_square_sum", pa.float64(), nullable=False),
    ]
)

SUGGESTED_LABEL, SUGGESTED_LABELS = "suggested_label", "suggested_labels"
GIVEN_PROBABILITY, SUGGESTED_PROBABILITY, QUALITY = "given_probability", "suggested_probability", "quality"


def suspect_schema(problem_type: ProblemType) -> pa.Schema:
    """Schema of suspects; with several labels a row `labels` and `suggested_labels` are lists, in label id order."""
    is_multi_label = problem_type == "multi_label_classification"
    rows = MULTI_LABEL_SCHEMA if is_multi_label else DATASET_SCHEMA
    given = rows.field(LABELS if is_multi_label else LABEL)
    return pa.schema(
        [
            pa.field(ROW, pa.int64(), nullable=False),  # position in train.parquet, from 0
            rows.field(TEXT),
            given,
            given.with_name(SUGGESTED_LABELS if is_multi_label else SUGGESTED_LABEL),
            # By a model that was not trained on this row. With several labels: of all decisions that are doubted.
            pa.field(GIVEN_PROBABILITY, pa.float32(), nullable=False),
            pa.field(SUGGESTED_PROBABILITY, pa.float32(), nullable=False),
            pa.field(QUALITY, pa.float32(), nullable=False),  # of the row's label, or labels: from 0, wrong, to 1
            rows.field(SOURCE),
            rows.field(SOURCE_ROW),
        ]
    )


TRIAL_SCHEMA = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),  # 0 has the options of bertray train
        pa.field("learning_rate", pa.float64(), nullable=False),
        pa.field("batch_size", pa.int32(), nullable=False),
        pa.field("epochs", pa.int32(), nullable=False),
        pa.field("warmup_fraction", pa.float64(), nullable=False),
        pa.field("label_smoothing", pa.float64(), nullable=False),
        pa.field("layer_decay", pa.float64(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # done, pruned or failed
        pa.field("is_best", pa.bool_(), nullable=False),
        pa.field("num_epochs_run", pa.int32(), nullable=False),
        # Of the epoch whose weights were kept, on validation; null where none ended.
        pa.field("best_epoch", pa.int32()),
        pa.field("loss", pa.float64()),
        pa.field("accuracy", pa.float64()),
        pa.field("f1_macro", pa.float64()),
        pa.field("wall_s", pa.float64(), nullable=False),  # of all epochs, validation included
        pa.field("failure", pa.string()),
    ]
)
