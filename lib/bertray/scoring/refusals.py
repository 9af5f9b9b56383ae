"""Requests that are refused before anything is scored, because of what the output holds."""

from __future__ import annotations

from collections import defaultdict
from itertools import takewhile

import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import BundleInfo, read_info
from bertray.errors import RequestError
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA, ROW
from bertray.scoring.archive import Archive
from bertray.scoring.config import ScoreConfig
from bertray.scoring.listing import PREDICTIONS, predictions_name
from bertray.scoring.manifest import Plan
from bertray.storage.location import Location
from bertray.tasks.task import TASKS


def bundle_for(config: ScoreConfig) -> BundleInfo:
    """The content of bundle.json; refuse to keep a column twice, or one that has the name of one of predictions."""
    if len(set(config.keep_columns)) < len(config.keep_columns):
        raise RequestError(f"--keep-columns {','.join(config.keep_columns)} names a column twice")
    info = read_info(Location.of(config.bundle))
    of_this = TASKS[info.problem_type].schema(info, config.probabilities).names
    reserved = dict.fromkeys([ROW, *of_this, *MULTI_LABEL_PREDICTION_SCHEMA.names])
    if taken := sorted(reserved.keys() & set(config.keep_columns)):
        raise RequestError(
            f"--keep-columns {taken[0]}: predictions have a column of this name; reserved are {', '.join(reserved)}. "
            "Rename it in the archive, or leave it out"
        )
    return info


def refuse_mixture(archive: Archive, records: pa.Table, request_fingerprint: str) -> None:
    """Refuse to score a part of the archive otherwise than the rest."""
    if archive.is_whole:
        return
    is_other = pc.not_equal(records["fingerprint"], request_fingerprint)
    others = set(records["path"].filter(is_other).to_pylist()) - archive.paths()
    if others:
        raise RequestError(
            f"{len(others)} other shards of this archive, such as {min(others)}, have predictions of another bundle, "
            "engine, precision or other columns. Name the whole archive as --input, with --prune if they have left it, "
            "and mend those that fail; or choose another --output"
        )


def refuse_unasked(todo: Plan, differences: list[str], config: ScoreConfig) -> None:
    """Refuse to score otherwise because of an option that may have been forgotten; a new bundle is meant."""
    if differences and todo.pending and not config.rescore:
        raise RequestError(
            f"{'; '.join(differences)}: {config.output} was scored with other options, and {len(todo.pending):,} "
            f"shards ({todo.pending_bytes / 1e6:,.1f} MB) would now be scored with these, {len(todo.anew):,} of them "
            "again. Repeat the earlier options, choose another --output, or say --rescore"
        )


def refuse_obstacles(output: Location, paths: list[str], next_step: str) -> None:
    """Refuse to score, or to publish, where a file has become a folder in the archive, or a folder a file."""
    if not output.is_local:
        return
    root, paths_in = output / PREDICTIONS, defaultdict[Location, dict[str, str]](dict)
    for path in paths:
        target = root / predictions_name(path)
        paths_in[target.parent()][target.name] = path
    for folder, path_of in paths_in.items():  # each is asked once, for there may be a million shards
        above = takewhile(root.__ne__, (folder, *folder.ancestors()))
        found = [(place, "folder", min(path_of.values())) for place in above if place.is_file()]
        found += [(folder / name, "file", path_of[name]) for name in folder.folders() if name in path_of]
        for obstacle, needed, path in found:
            raise RequestError(
                f"{obstacle} is in the way of the predictions of {path}, for which there must be a {needed}. If its "
                f"shards have left the archive, {next_step}"
            )
