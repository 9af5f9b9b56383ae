"""What a scoring request names: the archive's shards, checked as far as that is cheap, before anything is started.

An output belongs to one archive, for a shard's predictions are named after its path there: output/archive.json says to
which. A part of it, a folder or a shard, may be scored by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from bertray.errors import LockedError, RequestError, ShardError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.shard_reader import check_columns, read_schema
from bertray.storage.location import FileInfo, Location
from bertray.storage.outputs import refuse_in_bundle

# How many shards are looked into, to refuse a request that cannot succeed.
_NUM_PROBED_SHARDS = 5
_ARCHIVE_FILE = "archive.json"


@dataclass(frozen=True)
class Archive:
    """What is to be scored.

    Attributes:
        root: what the shards' paths are relative to.
        shards: sorted by path.
        is_whole: these are all that the archive has, rather than a part of it.
        is_new: the output does not know this archive yet, or not at this place.
    """

    root: Location
    shards: list[FileInfo]
    is_whole: bool
    is_new: bool = False

    def paths(self) -> set[str]:
        return {shard.path for shard in self.shards}


def resolved(config: ScoreConfig) -> tuple[ScoreConfig, Location, Location]:
    """With absolute places, for actors may run in other folders; and input and output as locations."""
    places = {name: str(Location.of(getattr(config, name))) for name in ("bundle", "input", "output")}
    config = config.model_copy(update=places)
    source, output = Location.of(config.input), Location.of(config.output)
    if source.contains(output) or output.contains(source):
        raise RequestError(
            f"--input {source} and --output {output} lie in each other: predictions would be scored or shards replaced"
        )
    refuse_in_bundle(output)
    return config, source, output


def list_shards(source: Location, output: Location, *, has_moved: bool = False) -> Archive:
    """The shards at a place, as the output names them.

    Args:
        has_moved: the archive that the output knows lies there now.

    Raises:
        RequestError: there are none, or the output holds predictions of another archive.
    """
    is_one_shard = source.is_file()
    folder = source.parent() if is_one_shard else source
    file = output / _ARCHIVE_FILE
    root = Location.of(json.loads(file.read_bytes())["archive"]) if file.exists() and not has_moved else None
    if root is not None and not root.contains(folder):
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
    if root is None:
        return Archive(folder, shards, is_whole=not is_one_shard, is_new=not is_one_shard)
    if way := folder.path.removeprefix(root.path).strip("/"):
        shards = [replace(shard, path=f"{way}/{shard.path}") for shard in shards]
    return Archive(root, shards, is_whole=not way and not is_one_shard)


def remember(archive: Archive, output: Location, *, has_moved: bool = False) -> None:
    """Let the output know whose predictions it holds.

    Raises:
        LockedError: it has become another archive's since this one was listed.
    """
    if not archive.is_new:
        return
    file, content = output / _ARCHIVE_FILE, json.dumps({"archive": archive.root.uri}, ensure_ascii=False)
    data = f"{content}\n".encode()
    if has_moved:
        file.put(data)
    elif not file.create(data) and file.read_bytes() != data:
        raise LockedError(f"another run has just scored another archive to {output}: choose another --output")


def probe(archive: Archive, config: ScoreConfig) -> None:
    """Refuse now what would fail on every shard.

    Raises:
        RequestError: of some shards, from the first to the last, none has the columns asked for.
    """
    last, seen = len(archive.shards) - 1, ""
    places = {last * place // (_NUM_PROBED_SHARDS - 1) for place in range(_NUM_PROBED_SHARDS)}
    for shard in (archive.shards[place] for place in sorted(places)):
        try:
            schema = read_schema(archive.root / shard.path)
        except ShardError:
            continue  # the run itself lists it as failed
        try:
            check_columns(schema, config.text_column, config.keep_columns)
        except ShardError as error:
            seen = seen or f"{shard.path}: {error}"
            continue
        return
    if seen:
        raise RequestError(f"{seen}. Choose with --text-column and --keep-columns")
