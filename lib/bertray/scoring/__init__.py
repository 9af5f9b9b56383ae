"""Score an archive: one predictions file for every shard, and a record of what is done.

    config        the options of bertray score            listing       which files of a place are shards
    archive       the shards, as the output names them
    manifest      which shards are done, what is to do    units         shards -> units of work
    shard_reader  a shard -> steps of text                score_shard   a shard, or a part -> one staged file
    score_unit    a unit -> outcomes                      pipeline      its shards side by side, one model
    pool          processes with the model                staging       what is not published yet
    refusals      requests that do not fit the output     gate          whether it may be published
    publish       staged files -> predictions/            verify        every published file against its record
    runs          the files of every run; outcomes -> records and figures

Imports the rooms up to bundle, but not model; does not know training. No torch, no Ray.
"""
