"""An archive becomes predictions: shards in, one predictions file a shard out, and a record of what is done.

    config     what bertray score can be told                archive       the shards, as the output names them
    manifest   which shards are done                      plan          what is to be done, and why
    units      shards -> units of work                    pool          units in, outcomes out
    shard_reader  a shard -> steps of text                score_unit    a unit, each shard failing by itself
    score_shard   a shard, or a part, -> one file         recorder      what becomes of shards, written down
    runs       what every run leaves behind               gate          does what is new look like what was before?

Imports the rooms up to bundle, but not model; does not know training. No torch, no Ray.
"""
