"""bertray: fine-tune a BERT classifier and apply it to very large document archives.

    from bertray import Bundle, ScoreConfig, score

    Bundle.load("bundle").predict(["B.Sc. in Physics, 2014", "Python, SQL, Spark"])
    score(ScoreConfig(bundle="bundle", input="archive", output="scored"))

The names in `__all__` are the public interface; everything else may change. A configuration holds what its
constructor is given, and defaults: YAML files and the environment belong to the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bertray.errors import (
    BertrayError,
    BundleError,
    DivergedError,
    LockedError,
    RequestError,
    ShardChangedError,
    ShardError,
    UnavailableError,
)

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle, Prediction
    from bertray.data.config import PrepareConfig
    from bertray.data.prepare import PrepareResult, prepare
    from bertray.drivers.config import EvaluateConfig
    from bertray.drivers.evaluate import EvaluateResult, evaluate
    from bertray.drivers.score import ScoreResult, score
    from bertray.drivers.train import TrainResult, train
    from bertray.scoring.config import ScoreConfig
    from bertray.training.config import TrainConfig

__version__ = "0.1.0"
__all__ = [
    "BertrayError",
    "Bundle",
    "BundleError",
    "DivergedError",
    "EvaluateConfig",
    "EvaluateResult",
    "LockedError",
    "Prediction",
    "PrepareConfig",
    "PrepareResult",
    "RequestError",
    "ScoreConfig",
    "ScoreResult",
    "ShardChangedError",
    "ShardError",
    "TrainConfig",
    "TrainResult",
    "UnavailableError",
    "evaluate",
    "prepare",
    "score",
    "train",
]

# Importing torch takes seconds; `import bertray` must not.
_PLACES = {
    "Bundle": "bertray.bundle.bundle",
    "EvaluateConfig": "bertray.drivers.config",
    "EvaluateResult": "bertray.drivers.evaluate",
    "Prediction": "bertray.bundle.bundle",
    "PrepareConfig": "bertray.data.config",
    "PrepareResult": "bertray.data.prepare",
    "ScoreConfig": "bertray.scoring.config",
    "ScoreResult": "bertray.drivers.score",
    "TrainConfig": "bertray.training.config",
    "TrainResult": "bertray.drivers.train",
    "evaluate": "bertray.drivers.evaluate",
    "prepare": "bertray.data.prepare",
    "score": "bertray.drivers.score",
    "train": "bertray.drivers.train",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'bertray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]
