"""`bertray score --plan`: which shards would be scored and why, and an estimate of the time.

The first texts of some pending shards give tokens per row there. Times the rows of these shards, scaled by bytes to all
pending shards, this is the number of tokens. The hours follow from the rate of the last long run on the same output.
"""

from __future__ import annotations

import logging
import random
from typing import Any

from bertray.bundle.info import opened as opened_bundle
from bertray.bundle.info import read_info
from bertray.errors import ShardError
from bertray.scoring.archive import list_shards, probe, resolved
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest, fingerprint
from bertray.scoring.plan import plan
from bertray.scoring.runs import Runs
from bertray.scoring.shard_reader import check_columns, opened, steps
from bertray.storage.location import FileInfo, Location
from bertray.tokenization.tokenizer import ColumnTokenizer

_log = logging.getLogger(__name__)

_NUM_SAMPLED_SHARDS = 16
_SAMPLED_BYTES = 1 << 18  # of text, from each


def preview(config: ScoreConfig) -> dict[str, Any]:
    """The shards that `score.score` would score, and an estimate of the time; writes nothing.

    Raises:
        RequestError: bundle, input, output or columns do not fit.
    """
    config, source, output = resolved(config)
    info = read_info(Location.of(config.bundle))
    archive = list_shards(source, output, has_moved=config.input_moved)
    probe(archive, config)
    todo = plan(archive.shards, Manifest(output).latest(), fingerprint(info, config), is_whole=archive.is_whole)
    facts: dict[str, Any] = {
        **todo.counts(),
        "num_shards_pending": len(todo.pending),
        "pending_bytes": todo.pending_bytes,
    }
    if not todo.pending:
        return facts
    from bertray.bundle.bundle import load_tokenizer  # imports torch

    with opened_bundle(config.bundle) as (folder, _):
        tokenizer = load_tokenizer(folder, info)
    facts |= _estimate(tokenizer, archive.root, todo.pending, config)
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


def _estimate(
    tokenizer: ColumnTokenizer, archive: Location, shards: list[FileInfo], config: ScoreConfig
) -> dict[str, Any]:
    sampled = random.Random(0).sample(shards, min(_NUM_SAMPLED_SHARDS, len(shards)))
    num_bytes = num_rows = num_unreadable = 0
    num_tokens = 0.0
    for shard in sampled:
        try:
            with opened(archive / shard.path) as file:
                check_columns(file.schema_arrow, config.text_column, [])
                for step in steps(file, config.text_column, [], _SAMPLED_BYTES):
                    num_tokens_read = tokenizer.encode(step[config.text_column]).num_tokens
                    num_tokens += num_tokens_read / len(step) * file.metadata.num_rows
                    num_rows += file.metadata.num_rows
                    break
            num_bytes += shard.size_bytes
        except ShardError as error:
            _log.warning("cannot be scored: %s: %s", shard.path, error)
            num_unreadable += 1
    share = sum(shard.size_bytes for shard in shards) / max(1, num_bytes)
    return {
        "num_shards_sampled": len(sampled),
        "num_shards_unreadable": num_unreadable,
        "num_rows_estimated": round(num_rows * share),
        "num_tokens_estimated": round(num_tokens * share),
    }
