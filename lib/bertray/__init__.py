"""bertray: fine-tune a BERT classifier and score very large document archives with it.

    from bertray import Bundle, ScoreConfig, score

    Bundle.load("bundle").predict(["B.Sc. in Physics, 2014", "Python, SQL, Spark"])
    score(ScoreConfig(bundle="bundle", input="archive", output="scored"))

The names in `__all__` are the public interface; everything else may change. A configuration takes its values from its
constructor and its defaults. Only the command line reads YAML files and the environment.
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
    ShardRefusedError,
    UnavailableError,
)

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle, Prediction
    from bertray.data.config import PrepareConfig
    from bertray.data.prepare import PrepareResult, prepare
    from bertray.drivers.audit import AuditResult, audit
    from bertray.drivers.config import EvaluateConfig
    from bertray.drivers.evaluate import EvaluateResult, evaluate
    from bertray.drivers.score import ScoreResult, score
    from bertray.drivers.train import TrainResult, train
    from bertray.scoring.config import ScoreConfig
    from bertray.training.config import AuditConfig, TrainConfig

__version__ = "0.1.0"
__all__ = [
    "AuditConfig",
    "AuditResult",
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
    "ShardRefusedError",
    "TrainConfig",
    "TrainResult",
    "UnavailableError",
    "audit",
    "evaluate",
    "prepare",
    "score",
    "train",
]

# Imported on first use: torch takes seconds to import, and `import bertray` must not.
_LAZY = {
    "bertray.bundle.bundle": ("Bundle", "Prediction"),
    "bertray.data.config": ("PrepareConfig",),
    "bertray.data.prepare": ("PrepareResult", "prepare"),
    "bertray.drivers.audit": ("AuditResult", "audit"),
    "bertray.drivers.config": ("EvaluateConfig",),
    "bertray.drivers.evaluate": ("EvaluateResult", "evaluate"),
    "bertray.drivers.score": ("ScoreResult", "score"),
    "bertray.drivers.train": ("TrainResult", "train"),
    "bertray.scoring.config": ("ScoreConfig",),
    "bertray.training.config": ("AuditConfig", "TrainConfig"),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'bertray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
