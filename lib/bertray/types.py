"""The choices that options and engine share. Imports no package."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16"]
# fp16 and int8 are for a finished model only; training needs bf16 or more.
TorchPrecision = Literal["auto", "fp32", "bf16", "fp16"]
RealPrecision = Literal["fp32", "bf16", "fp16"]
InferencePrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
Engine = Literal["auto", "torch", "openvino"]
Device = Literal["auto", "cpu", "cuda"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]  # transformers' names
UNNAMED_PROBLEM_TYPE: ProblemType = "single_label_classification"  # what is meant where a file names none
ClassWeights = Literal["none", "balanced"]
Keep = Literal["best", "last"]
LongDocuments = Literal["truncate", "mean", "max"]
