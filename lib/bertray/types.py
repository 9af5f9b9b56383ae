"""What can be chosen, as the engine and the options of the jobs both name it. No package is needed to import it."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
# What a finished model can be run in; nothing is trained in int8.
InferencePrecision = Literal["auto", "fp32", "bf16", "int8"]
Engine = Literal["auto", "torch", "openvino"]
Device = Literal["auto", "cpu", "cuda"]
ProblemType = Literal["single_label_classification", "multi_label_classification"]  # transformers' names
ClassWeights = Literal["none", "balanced"]
Sampling = Literal["natural", "balanced"]
Keep = Literal["best", "last"]
LongDocuments = Literal["truncate", "mean", "max"]
