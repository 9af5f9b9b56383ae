"""Load and check an encoder to fine-tune, with a new head, or a finished classifier with its own; and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from bertray.errors import RequestError
from bertray.model.adapter import first_position, last_layer, redraw
from bertray.model.outputs import NO_HEAD, kind_of
from bertray.model.sources import WEIGHTS, encoder_folder
from bertray.tasks.task import TASKS
from bertray.tokenization.columns import one_line
from bertray.types import ProblemType

_log = logging.getLogger(__name__)

# Unless told, transformers asks on a terminal whether to run code that came with a model.
NO_CODE = {"local_files_only": True, "trust_remote_code": False}
# A tokenizer without a length of its own says 1e30.
_NO_LENGTH = 10**9


def load_tokenizer(
    encoder: str, max_length: int | None, stride: int | None = None, option: str = "--encoder"
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Tokenizer and configuration of the encoder that an option names, checked before any time is spent.

    The tokenizer's `model_max_length` is `max_length`, or, if that is None, as many tokens as the encoder can read.

    Raises:
        RequestError: the files cannot be read, there is no fast tokenizer or no sequence classifier of this
            architecture, the model has no embedding for a token or reads fewer than max_length tokens, no file says how
            many it reads, or the stride fills the window.
    """
    folder = encoder_folder(encoder, option)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # it checks little, so that broken files may raise anything
        raise RequestError(f"{option} {encoder}: transformers cannot read {folder}: {error}") from error
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise RequestError(f"{option} {encoder}: transformers has no sequence classifier for {config.model_type!r}")
    if not tokenizer.is_fast:
        raise RequestError(f"{option} {encoder}: it has no tokenizer.json (fast tokenizer), which bertray needs")
    if len(tokenizer) < config.vocab_size // 2:
        # Without the tokenizer's files transformers makes an empty one, to which every word is unknown.
        raise RequestError(
            f"{option} {encoder}: the model knows {config.vocab_size} tokens, its tokenizer {len(tokenizer)}: "
            f"copy the tokenizer's files (tokenizer.json, tokenizer_config.json) to {folder}"
        )
    if extra := [token for token, number in tokenizer.get_vocab().items() if number >= config.vocab_size]:
        raise RequestError(
            f"{option} {encoder}: its tokenizer knows {len(extra)} tokens ({', '.join(sorted(extra)[:5])}) that the "
            f"model has no embedding for, as it has {config.vocab_size}. Give the model some, and save it again: "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    window = min(tokenizer.model_max_length, _num_positions(config, max_length or _NO_LENGTH))
    if max_length is None and window >= _NO_LENGTH:
        raise RequestError(f"{option} {encoder}: no file says how many tokens it reads at once: give --max-length")
    max_length = max_length or int(window)
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
    num_positions = getattr(config, "max_position_embeddings", None) or -1  # XLNet's says -1
    if num_positions < 0 or wanted + (config.pad_token_id or 0) + 1 <= num_positions:
        return wanted if num_positions < 0 else int(num_positions)
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
    torch.manual_seed(seed)
    own, model, found = _loaded(encoder, labels, problem_type, "--encoder")
    head = last_layer(model)
    weight = next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
    shapes = {name: stored for name, stored, _ in found["mismatched_keys"]}
    if weight in shapes:
        return model, f"the head is new: that of {encoder} has {shapes[weight][0]} outputs, not {len(labels)}"
    if head is None or weight in found["missing_keys"]:
        return model, f"the head is new: {encoder} has none"
    return model, _match_head(head, own, labels, problem_type, encoder)


def load_finished(model: str, labels: Sequence[str], problem_type: ProblemType) -> Any:
    """A classifier with its own head, fp32, on the CPU; its outputs have these labels.

    Raises:
        RequestError: a weight is missing or of another shape; there are other outputs than labels.
    """
    _, loaded, found = _loaded(model, labels, problem_type, "--model")
    for name, stored, _ in sorted(found["mismatched_keys"]):
        raise RequestError(
            f"--model {model}: {name} is stored as {list(stored)}, which are not {len(labels)} outputs: name each with "
            "--labels, in the order of the outputs"
        )
    if missing := sorted(found["missing_keys"]):
        raise RequestError(f"--model {model}: {WEIGHTS} lacks {missing[0]}. {NO_HEAD.format(model)}")
    return loaded


@torch.no_grad()
def reorder(model: Any, labels: Sequence[str]) -> list[int]:
    """Put a classifier's outputs in the order of its labels here; returns where each was before."""
    names, head = [one_line(model.config.id2label[number]) for number in range(len(labels))], last_layer(model)
    order = [names.index(one_line(label)) for label in labels]
    for weights in head.parameters() if head else ():
        weights.copy_(weights[order])
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    return order


def _loaded(
    name: str, labels: Sequence[str], problem_type: ProblemType, option: str
) -> tuple[PreTrainedConfig, Any, dict[str, Any]]:
    """Its own configuration, the classifier for these labels, and which of its weights were found."""
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    folder = encoder_folder(name, option)
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
    except Exception as error:  # it checks little, so that broken files may raise anything
        raise RequestError(f"{option} {name}: transformers cannot load {folder}: {error}") from error
    prefix = f"{model.base_model_prefix}."
    for key, stored, expected in sorted(found["mismatched_keys"]):
        if key.startswith(prefix):
            raise RequestError(
                f"{option} {name}: {key} is stored as {list(stored)}, config.json asks for {list(expected)}: give the "
                "config.json that was saved with the weights"
            )
    # transformers would draw them at random. A pooler may be new: some encoders are trained without one.
    missing = sorted(key for key in found["missing_keys"] if key.startswith(prefix) and ".pooler." not in key)
    if missing:
        others = sorted(found["unexpected_keys"])
        there = f"; it has {others[0]}, which the model has no part for" if others else ""
        raise RequestError(
            f"{option} {name}: {WEIGHTS} lacks {len(missing)} weights that config.json asks for, such as {missing[0]}"
            f"{there}: give a model that was saved by transformers' save_pretrained(), with its config.json"
        )
    return own, model, found


@torch.no_grad()
def _match_head(
    head: torch.nn.Linear, own: PreTrainedConfig, labels: Sequence[str], problem_type: ProblemType, encoder: str
) -> str:
    """Put the rows of a loaded head in the order of the labels, or draw them anew where they are of others."""
    before = [one_line(str(own.id2label[number])) for number in sorted(own.id2label)]
    now = list(map(one_line, labels))
    if (kind := kind_of(own.problem_type, len(before))) != problem_type:
        why = f"{encoder} is for {kind}, the data set for {problem_type}"
    elif TASKS[problem_type].outputs:  # whatever they are called
        return f"{encoder} has a head for numbers, which is kept if its own are near those of the data set"
    elif sorted(before) != sorted(now) or len(set(now)) < len(now):
        other = min(set(before) - set(now), default="")  # LABEL_0, if the labels have no names
        why = f"{encoder} has other labels, such as {other!r}"
    else:
        order = [before.index(label) for label in now]
        for weights in head.parameters():
            weights.copy_(weights[order])
        return f"the head is kept: {encoder} has the same labels{', in another order' if before != now else ''}"
    redraw(head, own)
    return f"the head is new: {why}"
