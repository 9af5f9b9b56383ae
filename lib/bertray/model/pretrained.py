"""Load and check an encoder to fine-tune: its tokenizer, its configuration, and its weights with a new head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from bertray.errors import RequestError
from bertray.model.adapter import first_position
from bertray.model.sources import WEIGHTS, encoder_folder
from bertray.types import ProblemType


def load_tokenizer(
    encoder: str, max_length: int, stride: int | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The encoder's tokenizer and configuration, checked before any time is spent.

    Raises:
        RequestError: the files cannot be read, there is no fast tokenizer or no sequence classifier of this
            architecture, the model reads fewer than max_length tokens, or the stride fills the window.
    """
    folder = encoder_folder(encoder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"--encoder {encoder}: transformers cannot read {folder}: {error}") from error
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RequestError(f"--encoder {encoder}: transformers has no sequence classifier for {config.model_type!r}")
    if not tokenizer.is_fast:
        raise RequestError(f"--encoder {encoder}: it has no tokenizer.json (fast tokenizer), which bertray needs")
    if len(tokenizer) < config.vocab_size // 2:
        # Without the tokenizer's files transformers makes an empty one, to which every word is unknown.
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
            f"--stride {stride}: a window of --max-length {max_length} holds {held} tokens of a text and the special "
            f"tokens, and windows must overlap by fewer. Use --stride {max_length // 4}, or raise --max-length"
        )
    tokenizer.model_max_length = max_length
    return tokenizer, config


def _num_positions(config: PreTrainedConfig, wanted: int) -> int:
    """The number of tokens that the model has positions for; exact only if it is below `wanted`."""
    num_positions = getattr(config, "max_position_embeddings", None)
    if num_positions is None or wanted + (config.pad_token_id or 0) + 1 <= num_positions:
        return wanted if num_positions is None else int(num_positions)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return int(num_positions - first_position(model))


def num_special_ids(config: PreTrainedConfig) -> int:
    """The number of ids from 0 that includes all ids a model looks for: padding, begin and end of text."""
    special_ids = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")]
    return 1 + max([one for one in special_ids if isinstance(one, int)], default=0)


def load_classifier(encoder: str, labels: Sequence[str], problem_type: ProblemType, seed: int) -> Any:
    """An encoder with a classification head, fp32, on the CPU.

    A classifier with the same number of labels keeps its head; otherwise the head is new and depends on the seed.
    From here on transformers logs only errors, because it would report that the encoder has no such head.

    Raises:
        RequestError: weights of the encoder are missing, or their shapes are not those of its configuration.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
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
    prefix = f"{model.base_model_prefix}."
    for name, stored, expected in sorted(found["mismatched_keys"]):
        if name.startswith(prefix):
            raise RequestError(
                f"--encoder {encoder}: {name} is stored as {list(stored)}, config.json asks for {list(expected)}: give "
                "the config.json that was saved with the weights"
            )
    # transformers would draw them at random. A pooler may be new: some encoders are trained without one.
    missing = sorted(name for name in found["missing_keys"] if name.startswith(prefix) and ".pooler." not in name)
    if missing:
        others = sorted(found["unexpected_keys"])
        there = f"; it has {others[0]}, which the model has no part for" if others else ""
        raise RequestError(
            f"--encoder {encoder}: {WEIGHTS} lacks {len(missing)} weights that config.json asks for, such as "
            f"{missing[0]}{there}: give a model that was saved by transformers' save_pretrained(), with its config.json"
        )
    return model
