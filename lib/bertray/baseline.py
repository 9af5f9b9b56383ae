"""TF-IDF with logistic regression, fitted on the same rows: is BERT worth it here?"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from bertray.schema import LABEL_ID, TEXT

NAME = "TF-IDF (1-2 words) + logistic regression"


def predict_baseline(train: pa.Table, rows: pa.Table) -> np.ndarray:
    """Fit on the rows of `train`, predict label ids of `rows` (int, one a row). Deterministic."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    model.fit(train[TEXT].to_pylist(), train[LABEL_ID].to_numpy())
    return np.asarray(model.predict(rows[TEXT].to_pylist()))
