"""The archive of a scoring request: its shards, and the cheap checks before anything is started.

An output belongs to one archive, named in output/archive.json by the first run, because the predictions of a shard are
named after its path in the archive. A folder or a single shard of the archive may be scored by itself.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace

from bertray.errors import LockedError, RequestError, ShardError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.listing import Listing, check_names, listed_shards, shards_of
from bertray.scoring.shard_reader import check_columns, divided, opened
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import FOLDER as LOCKS
from bertray.storage.outputs import readable, refuse_in_bundle

_log = logging.getLogger(__name__)

_NUM_PROBED_SHARDS = 5
_ARCHIVE_FILE = "archive.json"
_LATEST = "runs/latest.json"


@dataclass(frozen=True)
class Archive:
    """The shards to be scored, or some of them."""

    root: Location  # the folder that the shards' paths are relative to
    shards: list[FileInfo]  # sorted by path
    is_whole: bool  # these are all shards of the archive
    is_new: bool  # the output does not name this archive yet, or another place of it
    listing: Listing  # with what was left out

    def paths(self) -> set[str]:
        return {shard.path for shard in self.shards}


def resolved(config: ScoreConfig) -> tuple[ScoreConfig, Location, Location]:
    """The configuration with absolute places, as actors may run in other folders; input and output as locations."""
    names = [name for name in ("bundle", "input", "output", "shards") if getattr(config, name)]
    places = {name: str(Location.of(getattr(config, name))) for name in names}
    source, output = Location.of(places["input"]), Location.of(places["output"])
    if source.contains(output):
        raise RequestError(
            f"--output {output} lies in --input {source}: its predictions would be scored. Choose another"
        )
    if output.contains(source):
        raise RequestError(f"--input {source} lies in --output {output}: its shards might be replaced. Choose another")
    refuse_in_bundle(output)
    for folder in output.ancestors():
        if (folder / _LATEST).is_file():
            raise RequestError(f"--output {output} is inside another output, {folder}: choose another folder")
    return config.model_copy(update=places), source, output


def list_shards(source: Location, output: Location, *, shards: str | None = None, has_moved: bool = False) -> Archive:
    """List the shards at a place, named as in the output. `has_moved`: the output's archive has moved to this place.

    Args:
        shards: a text file that lists them; None: all that are there.

    Raises:
        RequestError: there are no shards, their names do not fit, or the output holds predictions of another archive.
    """
    is_one_shard = source.is_file()
    folder = source.parent() if is_one_shard else source
    file = output / _ARCHIVE_FILE
    with readable(file, "Remove it, and name the whole archive as --input once"):
        known = Location.of(json.loads(file.read_bytes())["archive"]) if file.exists() else None
    if is_one_shard and (has_moved or shards):
        option = "--input-moved" if has_moved else "--shards"
        raise RequestError(f"{option} needs the whole archive as --input, and {source} is one shard: name its folder")
    root = known if known and not has_moved else folder
    # One archive above the other: has it moved there, its old place is empty.
    is_nested = known and (folder.contains(known) or (has_moved and known.contains(folder)))
    if known and is_nested and known.path != folder.path and not known.is_empty():
        raise RequestError(
            f"--output {output} holds predictions of {known}, which is still there: with --input {source} its shards "
            f"would be scored again under other names. Name {known} or a part of it, without --input-moved, or choose "
            "another --output"
        )
    if not root.contains(folder):
        raise RequestError(
            f"--output {output} holds predictions of {root}, and --input {source} lies outside of it: shards of the "
            "same name would replace one another. Choose another --output, or if all of the archive has moved there, "
            "say --input-moved"
        )
    listing = listed_shards(source, Location.of(shards)) if shards else shards_of(source)
    way = folder.path.removeprefix(root.path).strip("/")
    found = [replace(shard, path=f"{way}/{shard.path}") for shard in listing.shards] if way else listing.shards
    check_names(found, output)
    return Archive(root, found, not way and not is_one_shard, known is None or has_moved, listing)


def remember(archive: Archive, output: Location, *, has_moved: bool = False) -> None:
    """Record in the output which archive it belongs to.

    Raises:
        LockedError: another run has just recorded another.
        RequestError: on a file system without cases, two shards would be one.
    """
    if output.is_local and (output / LOCKS).exists() and (output / LOCKS.upper()).exists():
        check_names(archive.shards, output, is_caseless=True)
    file = output / _ARCHIVE_FILE
    data = (json.dumps({"archive": archive.root.uri}, ensure_ascii=False) + "\n").encode()
    if archive.is_new and has_moved:
        file.put(data)
    elif archive.is_new and not file.create(data) and file.read_bytes() != data:
        raise LockedError(f"another run has just scored another archive to {output}: choose another --output")


def open_archive(config: ScoreConfig, source: Location, output: Location) -> Archive:
    """List the shards of a request, log what is left out, and `probe` them."""
    if not source.is_file() and not source.is_folder() and source.is_empty():
        raise RequestError(f"--input {source} does not exist: check the path")
    archive = list_shards(source, output, shards=config.shards, has_moved=config.input_moved)
    if left_out := archive.listing.left_out():
        _log.info("left out: %s", left_out)
    probe(archive, config)
    return archive


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
