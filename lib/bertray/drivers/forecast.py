"""What bertray score --plan prints: what there is to score, and an estimate of the time. Writes nothing."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

from bertray.bundle.info import opened
from bertray.errors import ShardError
from bertray.scoring.archive import open_archive, resolved
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest, fingerprint, plan, precision_before
from bertray.scoring.refusals import bundle_for
from bertray.scoring.runs import Runs
from bertray.scoring.shard_reader import check_columns, steps
from bertray.scoring.shard_reader import opened as opened_shard
from bertray.scoring.staging import Staging
from bertray.storage.location import FileInfo, Location

_log = logging.getLogger(__name__)

_NUM_SAMPLED_SHARDS = 16
_SAMPLED_BYTES = 1 << 18  # of text, from each


def preview(config: ScoreConfig) -> dict[str, Any]:
    """The shards that `score` would score, by reason, and an estimate of the time; writes nothing.

    The hours follow from the rate of the last long run on the same output.

    Raises:
        RequestError: bundle, input, output or columns do not fit.
    """
    config, source, output = resolved(config)
    info = bundle_for(config)
    archive = open_archive(config, source, output)
    published, staged = Manifest(output).latest(), Staging(output).records()
    todo = plan(archive.shards, published, staged, fingerprint(info, config), is_whole=archive.is_whole)
    facts: dict[str, Any] = {
        **todo.counts(),
        **archive.listing.counts(),
        "num_shards_pending": len(todo.pending),
        "pending_bytes": todo.pending_bytes,
    }
    if not todo.pending:
        return facts
    if decision := precision_before(output, info, config):
        facts |= {"precision": decision.precision, "engine_note": decision.reason}
    facts |= _estimate(todo.pending, archive.root, config)
    announced = Runs(output).latest()
    if announced is None or announced.rate is None:
        _log.info("no run on %s has measured a rate yet: the hours are unknown", output)
        return facts
    rate = announced.rate
    num_actors = rate.num_actors if config.num_actors is None else max(1, config.num_actors)
    tokens_per_s_an_actor = rate.tokens_per_s / rate.num_actors
    hours = facts["num_tokens_estimated"] / (tokens_per_s_an_actor * num_actors) / 3600
    facts |= {
        "rate_of_run": rate.run_id,
        "tokens_per_s_an_actor": round(tokens_per_s_an_actor, 1),
        "num_actors": num_actors,
        "hours_estimated": round(hours, 3),
    }
    if config.price_per_hour is not None:
        facts["cost_estimated"] = round(hours * num_actors * config.price_per_hour, 2)
    return facts


def _estimate(shards: list[FileInfo], archive: Location, config: ScoreConfig) -> dict[str, Any]:
    """Rows and tokens a byte of some shards, times all bytes. A shard is drawn as often as it has bytes."""
    from bertray.bundle.bundle import load_tokenizer  # imports torch

    with opened(config.bundle) as (folder, info):
        tokenizer = load_tokenizer(folder, info)
    sampled = shards
    if len(shards) > _NUM_SAMPLED_SHARDS:
        weights = [max(1, shard.size_bytes) for shard in shards]
        sampled = random.Random(0).choices(shards, weights, k=_NUM_SAMPLED_SHARDS)
    total_bytes, num_unreadable = sum(shard.size_bytes for shard in shards), 0
    rates: list[tuple[float, float, float]] = []  # of each readable draw: rows and tokens a byte, and its weight
    for shard, num_draws in Counter(sampled).items():
        try:
            with opened_shard(archive / shard.path) as file:
                check_columns(file.schema_arrow, config.text_column, [])
                num_rows, tokens_per_row = file.metadata.num_rows, 0.0
                for step in steps(file, config.text_column, [], _SAMPLED_BYTES):
                    tokens_per_row = tokenizer.encode(step[config.text_column]).num_tokens / len(step)
                    break
        except ShardError as error:
            _log.warning("cannot be scored: %s: %s", shard.path, error)
            num_unreadable += 1
            continue
        weight = shard.size_bytes if sampled is shards else num_draws
        rates.append((num_rows / shard.size_bytes, num_rows * tokens_per_row / shard.size_bytes, weight))
    rows_a_byte, tokens_a_byte = (
        sum(rate[place] * rate[2] for rate in rates) / max(1, sum(rate[2] for rate in rates)) for place in (0, 1)
    )
    return {
        "num_shards_sampled": len(set(sampled)),
        "num_shards_unreadable": num_unreadable,
        "num_rows_estimated": round(rows_a_byte * total_bytes),
        "num_tokens_estimated": round(tokens_a_byte * total_bytes),
    }
