"""Load and check an encoder to fine-tune: its tokenizer, its configuration, and its weights with a new head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from bertray.errors import RequestError
from bertray.model.adapter import first_position, last_layer
from bertray.model.sources import WEIGHTS, encoder_folder
from bertray.tokenization.columns import one_line
from bertray.types import UNNAMED_PROBLEM_TYPE, ProblemType

_log = logging.getLogger(__name__)

# Unless told, transformers asks on a terminal whether to run code that came with a model.
NO_CODE = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(
    encoder: str, max_length: int, stride: int | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The encoder's tokenizer and configuration, checked before any time is spent.

    Raises:
        RequestError: the files cannot be read, there is no fast tokenizer or no sequence classifier of this
            architecture, the model has no embedding for a token or reads fewer than max_length tokens, or the stride
            fills the window.
    """
    folder = encoder_folder(encoder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # it checks little, so that broken files may raise anything
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
    if extra := [token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size]:
        raise RequestError(
            f"--encoder {encoder}: its tokenizer knows {len(extra)} tokens ({', '.join(sorted(extra)[:5])}) that the "
            f"model has no embedding for, as it has {config.vocab_size}. Give the model some, and save it again: "
            "model.resize_token_embeddings(len(tokenizer))"
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
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return int(num_positions - first_position(model))


def num_special_ids(config: PreTrainedConfig) -> int:
    """The number of ids from 0 that includes all ids a model looks for: padding, begin and end of text."""
    special_ids = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")]
    return 1 + max([one for one in special_ids if isinstance(one, int)], default=0)


def load_classifier(encoder: str, labels: Sequence[str], problem_type: ProblemType, seed: int) -> Any:
    """The model of `classifier_and_head`."""
    return classifier_and_head(encoder, labels, problem_type, seed)[0]


def classifier_and_head(encoder: str, labels: Sequence[str], problem_type: ProblemType, seed: int) -> tuple[Any, str]:
    """An encoder with a classification head, fp32, on the CPU; and, for people, what became of its own head.

    A classifier of the same labels keeps its head, in the order of `labels`; otherwise the head is new and depends on
    the seed. From here on transformers logs only errors, because it would report that the encoder has no such head.

    Raises:
        RequestError: weights of the encoder are missing, or their shapes are not those of its configuration.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    folder = encoder_folder(encoder)
    try:
        own = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            **NO_CODE,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type=problem_type,
        )
    except Exception as error:  # as above
        raise RequestError(f"--encoder {encoder}: transformers cannot load {folder}: {error}") from error
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
    head = last_layer(model)
    weight = next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
    shapes = {name: stored for name, stored, _ in found["mismatched_keys"]}
    if weight in shapes:
        return model, f"the head is new: that of {encoder} is for {shapes[weight][0]} labels, not {len(labels)}"
    if head is None or weight in found["missing_keys"]:
        return model, f"the head is new: {encoder} has none"
    return model, _match_head(head, own, labels, problem_type, encoder)


@torch.no_grad()
def _match_head(
    head: torch.nn.Linear, own: PreTrainedConfig, labels: Sequence[str], problem_type: ProblemType, encoder: str
) -> str:
    """Put the rows of a loaded head in the order of the labels, or draw them anew where they are of others."""
    before = [one_line(str(own.id2label[number])) for number in sorted(own.id2label)]
    now = list(map(one_line, labels))
    if sorted(before) != sorted(now) or len(set(now)) < len(now):
        other = min(set(before) - set(now), default="")  # LABEL_0, if the labels have no names
        why = f"{encoder} has other labels, such as {other!r}"
    elif (kind := own.problem_type or UNNAMED_PROBLEM_TYPE) != problem_type:
        why = f"{encoder} is for {kind}, the data set for {problem_type}"
    else:
        order = [before.index(label) for label in now]
        for weights in head.parameters():
            weights.copy_(weights[order])
        return f"the head is kept: {encoder} has the same labels{', in another order' if before != now else ''}"
    head.weight.normal_(std=getattr(own, "initializer_range", None) or 0.02)
    if head.bias is not None:
        head.bias.zero_()
    return f"the head is new: {why}"
