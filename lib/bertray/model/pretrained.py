"""An encoder to fine-tune, loaded and checked: its tokenizer, its configuration, and its weights with a new head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from bertray.errors import RequestError
from bertray.model.adapter import first_position
from bertray.model.sources import WEIGHTS, encoder_folder
from bertray.types import ProblemType

_log = logging.getLogger(__name__)


def load_tokenizer(
    encoder: str, max_length: int, stride: int | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The encoder's tokenizer and configuration, checked before any time is spent.

    Raises:
        RequestError: unreadable files, no fast tokenizer, no sequence classifier of this architecture, a window
            below max_length, or a stride that leaves no step from window to window.
    """
    folder = encoder_folder(encoder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"--encoder {encoder}: transformers cannot read {folder}: {error}") from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RequestError(f"--encoder {encoder}: transformers has no sequence classifier for {config.model_type!r}")
    if not tokenizer.is_fast:
        raise RequestError(f"--encoder {encoder}: it has no tokenizer.json (fast tokenizer), which bertray needs")
    if len(tokenizer) < config.vocab_size // 2:
        # Without its files transformers makes an empty tokenizer, to which every word is unknown.
        raise RequestError(
            f"--encoder {encoder}: the model knows {config.vocab_size} tokens, its tokenizer {len(tokenizer)}: "
            f"copy the tokenizer's files (tokenizer.json, tokenizer_config.json) to {folder}"
        )
    window = min(tokenizer.model_max_length, _num_positions(config, max_length))
    if max_length > window:
        raise RequestError(f"--max-length {max_length}: {encoder} reads at most {window} tokens")
    held = max_length - tokenizer.num_special_tokens_to_add()
    if stride is not None and stride >= held:
        raise RequestError(
            f"--stride {stride}: windows of --max-length {max_length} hold {held} tokens of a text beside the special "
            f"ones, and share less than that. Say --stride {max_length // 4}, or raise --max-length"
        )
    tokenizer.model_max_length = max_length
    return tokenizer, config


def _num_positions(config: PreTrainedConfig, wanted: int) -> int:
    """Tokens that the model has positions for, at least where these are fewer than wanted."""
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is None or wanted + (config.pad_token_id or 0) + 1 <= num_positions:
        return wanted if num_positions is None else int(num_positions)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return int(num_positions - first_position(model))


def num_special_ids(config: PreTrainedConfig) -> int:
    """So many ids from 0 hold all those that models look at themselves: padding, begin and end of text."""
    special_ids = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")]
    return 1 + max([one for one in special_ids if isinstance(one, int)], default=0)


def load_classifier(encoder: str, labels: Sequence[str], problem_type: ProblemType, seed: int) -> Any:
    """An encoder with a new head, fp32, on the CPU; the same seed gives the same head.

    A classifier of as many labels keeps the head that it has; one of another number gets a new one.

    From here on transformers tells of errors alone: it would report that the encoder has no such head.

    Raises:
        RequestError: weights of the encoder are missing, or of other shapes than its configuration says.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.manual_seed(seed)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder(encoder),
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem_type,
    )
    for name, stored, expected in sorted(found["mismatched_keys"]):
        if name.startswith(f"{model.base_model_prefix}."):
            raise RequestError(
                f"--encoder {encoder}: {name} is stored as {list(stored)}, config.json asks for {list(expected)}: give "
                "the config.json that was saved with the weights"
            )
    # transformers would draw them at random. A pooler is new where the encoder was trained without one, as BERT's are.
    missing = sorted(
        name
        for name in found["missing_keys"]
        if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name
    )
    if missing:
        others = sorted(found["unexpected_keys"])
        there = f"; {others[0]}, which no part of the model is called, is there" if others else ""
        raise RequestError(
            f"--encoder {encoder}: {WEIGHTS} lacks {len(missing)} weights that config.json asks for, as {missing[0]}"
            f"{there}: give a model that was saved by transformers' save_pretrained(), with its config.json"
        )
    return model
