"""How pending shards are cut into units."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from bertray.drivers import actor_pool, cluster
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_unit import Request
from bertray.scoring.units import Counts, Outcome, Unit, Work, divide, part_rows, staged_key, staged_path
from bertray.storage.location import FileInfo


def shards_of(*sizes_bytes: int) -> list[FileInfo]:
    return [FileInfo(f"{index}", size_bytes, "v") for index, size_bytes in enumerate(sizes_bytes)]


def cut(shards: list[FileInfo], num_actors: int = 1, staged: set[str] | None = None) -> Work:
    return divide(shards, 100, num_actors, "request", staged or set())


def sizes(work: Work) -> list[list[int]]:
    return [[shard.size_bytes for shard in unit.shards] for unit in work.units]


def test_small_shards_share_a_task() -> None:
    tiny = divide(shards_of(*[1000] * 1_000_000), 2 << 20, 8, "request", set()).units
    assert len(tiny) == 3907  # of 256 each
    assert [shard.path for unit in tiny[:2] for shard in unit.shards] == [str(index) for index in range(512)]
    mixed = [30, 30, 50, 200, 10, 10] * 20
    found = sizes(cut(shards_of(*mixed)))
    assert found[:3] == [[30, 30], [50], [200]]
    assert [size for unit in found for size in unit] == mixed


def test_few_shards_are_spread_over_the_actors() -> None:
    assert sizes(cut(shards_of(*[1] * 20), 4)) == [[1]] * 20
    assert sizes(cut(shards_of(*[1] * 128), 4)) == [[1, 1]] * 64
    assert cut([]) == Work()


def test_large_shards_are_cut_and_staged_parts_are_taken_up() -> None:
    small, large = shards_of(200, 390)
    work = cut([small, large])
    assert work.units == [Unit(shards=(large,), part=part, num_parts=4) for part in range(4)] + [Unit(shards=(small,))]
    names = [staged_path(large, "request", part, 4) for part in range(4)]
    work = cut([small, large], staged={names[0], names[2]})
    assert [unit.part for unit in work.units[:-1]] == [1, 3]
    assert work.missing_parts == {large: {1, 3}}
    work = cut([large], staged=set(names))
    assert (work.units, work.num_parts, work.missing_parts) == ([], {large: 4}, {large: set()})


def test_what_has_other_columns_is_not_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    large = FileInfo("large.parquet", 1000, "v")
    now = staged_path(large, "request", 0, 4)
    monkeypatch.setattr("bertray.scoring.units.MULTI_LABEL_PREDICTION_SCHEMA", MULTI_LABEL_PREDICTION_SCHEMA.remove(3))
    assert staged_path(large, "request", 0, 4) != now


def test_parts_of_something_else_are_no_parts_of_this() -> None:
    large, whole = shards_of(390, 100)
    useful = {staged_path(large, "request", part, 4) for part in (0, 2)}
    useless = {
        staged_path(large, "another request", 1, 4),
        staged_path(large, "request", 1, 5),
        staged_path(FileInfo(large.path, large.size_bytes, "v2"), "request", 1, 4),
    }
    work = cut([large, whole], staged=useful | useless)
    assert work.missing_parts == {large: {1, 3}}
    assert {staged_key(path) for path in useful} == {staged_key(staged_path(large, "request"))}


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 30))
def test_every_row_is_in_one_part(group_sizes: list[int], num_parts: int) -> None:
    edges = [sum(group_sizes[:index]) for index in range(len(group_sizes) + 1)]
    parts = [part_rows(edges, part, num_parts) for part in range(num_parts)]
    assert [row for part in parts for row in part] == list(range(edges[-1]))
    assert all(len(part) <= 2 * edges[-1] / num_parts + 2 for part in parts)


def test_parts_meet_where_row_groups_do() -> None:
    edges = [0, 90, 210, 300, 400]
    assert [part_rows(edges, part, 4) for part in range(4)] == [
        range(90),
        range(90, 210),
        range(210, 300),
        range(300, 400),
    ]
    assert part_rows([0, 400], 1, 4) == range(100, 200)


def test_an_outcome_survives_its_way_to_the_driver() -> None:
    outcome = Outcome(shard=shards_of(7)[0], part=3, counts=Counts(num_rows_repeated=2), precision="fp32")
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome
    unit = Unit(shards=tuple(shards_of(1, 2)), part=1, num_parts=3)
    assert Unit.model_validate_json(unit.model_dump_json()) == unit


def test_a_large_shard_is_work_for_many_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "place", lambda *_, **__: cluster.Placement(8, True, 1))
    request = Request(ScoreConfig(bundle="b", input="i", output="o"), "i", "request", "bundle", lock_number=1)
    large, small = FileInfo("large", 500 << 30, "1"), FileInfo("small", 1 << 20, "1")
    assert actor_pool.ActorPool(request, [large]).num_processes == 8
    assert actor_pool.ActorPool(request, [small, small]).num_processes == 2
