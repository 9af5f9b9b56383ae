"""The archive of a scoring request: its shards, and the cheap checks before anything is started.

An output belongs to one archive, named in output/archive.json, because the predictions of a shard are named after its
path in the archive. A folder or a single shard of the archive may be scored by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from bertray.errors import LockedError, RequestError, ShardError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.shard_reader import check_columns, divided, opened
from bertray.storage.location import FileInfo, Location
from bertray.storage.outputs import refuse_in_bundle

_NUM_PROBED_SHARDS = 5
_ARCHIVE_FILE = "archive.json"


@dataclass(frozen=True)
class Archive:
    """The shards to be scored, or some of them."""

    root: Location  # the folder that the shards' paths are relative to
    shards: list[FileInfo]  # sorted by path
    is_whole: bool  # these are all shards of the archive
    is_new: bool = False  # the output does not name this archive yet, or another place of it

    def paths(self) -> set[str]:
        return {shard.path for shard in self.shards}


def resolved(config: ScoreConfig) -> tuple[ScoreConfig, Location, Location]:
    """The configuration with absolute places, as actors may run in other folders; input and output as locations."""
    places = {name: str(Location.of(getattr(config, name))) for name in ("bundle", "input", "output")}
    source, output = Location.of(places["input"]), Location.of(places["output"])
    if source.contains(output) or output.contains(source):
        raise RequestError(
            f"--input {source} and --output {output} lie in each other: predictions would be scored or shards replaced"
        )
    refuse_in_bundle(output)
    return config.model_copy(update=places), source, output


def list_shards(source: Location, output: Location, *, has_moved: bool = False) -> Archive:
    """List the shards at a place, named as in the output. `has_moved`: the output's archive has moved to this place.

    Raises:
        RequestError: there are no shards, or the output holds predictions of another archive.
    """
    is_one_shard = source.is_file()
    folder = source.parent() if is_one_shard else source
    file = output / _ARCHIVE_FILE
    is_known = file.exists() and not has_moved
    root = Location.of(json.loads(file.read_bytes())["archive"]) if is_known else folder
    if not root.contains(folder):
        raise RequestError(
            f"--output {output} holds predictions of {root}, and --input {source} lies outside of it: shards of the "
            "same name would replace one another. Choose another --output, or if all of the archive has moved there, "
            "say --input-moved"
        )
    if has_moved and is_one_shard:
        raise RequestError(
            f"--input-moved needs the whole archive as --input, and {source} is one shard: name its folder"
        )
    shards = [source.info()] if is_one_shard else source.files((".parquet",))
    if not shards:
        raise RequestError(f"no .parquet file at {source}. --input takes a folder of shards at any depth, or one shard")
    if way := folder.path.removeprefix(root.path).strip("/"):
        shards = [replace(shard, path=f"{way}/{shard.path}") for shard in shards]
    return Archive(root, shards, is_whole=not way and not is_one_shard, is_new=not is_known and not is_one_shard)


def remember(archive: Archive, output: Location, *, has_moved: bool = False) -> None:
    """Record in the output which archive it belongs to, unless another run has just recorded another (LockedError)."""
    if not archive.is_new:
        return
    file = output / _ARCHIVE_FILE
    data = (json.dumps({"archive": archive.root.uri}, ensure_ascii=False) + "\n").encode()
    if has_moved:
        file.put(data)
    elif not file.create(data) and file.read_bytes() != data:
        raise LockedError(f"another run has just scored another archive to {output}: choose another --output")


def probe(archive: Archive, config: ScoreConfig) -> None:
    """Look into some shards, spread over the archive; RequestError if none that can be read has the columns."""
    last, seen = len(archive.shards) - 1, ""
    for place in sorted({last * number // (_NUM_PROBED_SHARDS - 1) for number in range(_NUM_PROBED_SHARDS)}):
        path = archive.shards[place].path
        try:
            with opened(archive.root / path) as file:
                schema = file.schema_arrow
        except ShardError:
            continue  # the run lists it as failed
        try:
            check_columns(schema, config.text_column, divided(config.keep_columns, schema, archive.root / path)[0])
            return
        except ShardError as error:
            seen = seen or f"{path}: {error}"
    if seen:
        raise RequestError(f"{seen}. Choose with --text-column and --keep-columns")
