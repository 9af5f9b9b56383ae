"""What can be chosen, as the engine and the options of the jobs both name it. No package is needed to import it."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
# What a finished model can be run in by torch; nothing is trained in less than bf16.
TorchPrecision = Literal["auto", "fp32", "bf16", "fp16"]
InferencePrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Engine = Literal["auto", "torch", "openvino"]
Device = Literal["auto", "cpu", "cuda"]
ProblemType = Literal["single_label_classification", "multi_label_classification"]  # transformers' names
ClassWeights = Literal["none", "balanced"]
Sampling = Literal["natural", "balanced"]
Keep = Literal["best", "last"]
LongDocuments = Literal["truncate", "mean", "max"]
