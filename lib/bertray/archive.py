"""What a scoring request names: the archive's shards, checked as far as that is cheap, before anything is started."""

from __future__ import annotations

from bertray.bundle_folder import refuse_in_bundle
from bertray.config import ScoreConfig
from bertray.errors import RequestError, ShardError
from bertray.shard_reader import read_schema
from bertray.storage import FileInfo, Location
from bertray.text import check_text_type

# How many shards are looked into, to refuse a request that cannot succeed.
_NUM_PROBED_SHARDS = 5


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


def list_shards(source: Location) -> tuple[Location, list[FileInfo]]:
    """The archive's root and its shards; one shard alone has its folder as root."""
    if source.is_file():
        return source.parent(), [source.info()]
    shards = source.files((".parquet",))
    if not shards:
        raise RequestError(f"no .parquet file at {source}. --input takes a folder of shards at any depth, or one shard")
    return source, shards


def probe(archive: Location, shards: list[FileInfo], config: ScoreConfig) -> None:
    """Refuse now what would fail on every shard.

    Raises:
        RequestError: none of the first shards has the columns asked for.
    """
    wanted = [config.text_column, *config.keep_columns]
    seen = ""
    for shard in shards[:_NUM_PROBED_SHARDS]:
        try:
            schema = read_schema(archive / shard.path)
        except ShardError:
            continue  # the run itself lists it as failed
        names = schema.names
        if all(name in names for name in wanted):
            try:
                check_text_type(schema.field(config.text_column).type)
            except ShardError as error:
                seen = seen or f"{shard.path}: {error}"
                continue
            return
        missing = next(name for name in wanted if name not in names)
        seen = seen or f"no column {missing!r} in {shard.path}; it has {', '.join(names)}"
    if seen:
        raise RequestError(f"{seen}. Choose with --text-column and --keep-columns")
