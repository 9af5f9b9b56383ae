"""A process that scores: it holds the model and takes one unit of work at a time from `drivers.actor_pool`.

Whoever replaces one that died is told how many units that had in hand: the cause may be in them. These are read and
scored in processes of their own, and the model is not loaded here before.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from bertray.bundle.bundle import Bundle
from bertray.bundle.info import BundleInfo, was_replaced
from bertray.bundle.isolated import IsolatedBundle
from bertray.model.runtime import model_thread
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Unit

_log = logging.getLogger(__name__)


class Actor:
    """Scores units of a run.

    Args:
        request: of the run.
        num_threads: of the processor, for the model.
        num_suspect_units: of the first ones; see above.

    Raises:
        BundleError: the bundle is missing, altered, or another one by now.
    """

    def __init__(
        self,
        device: Literal["cpu", "cuda"],
        request: Request,
        num_threads: int,
        num_suspect_units: int,
    ) -> None:
        self._request = request
        # A GPU that has failed once fails every later shard: those are not at fault.
        self._scorer = UnitScorer(request, fatal=(torch.AcceleratorError,))
        self._spec = request.model_spec(device, num_threads)
        self._bundle: Bundle | None = None
        self._thread = model_thread()
        self._num_suspect_units = num_suspect_units
        if not num_suspect_units:
            self._thread.submit(self._load).result()

    def score(self, unit: Unit) -> list[Outcome]:
        """What has become of the unit's shards."""
        return self._thread.submit(self._score, unit).result()

    def _load(self) -> Bundle:
        if self._bundle is None:
            self._bundle = self._spec.load()
            self._check_bundle(self._bundle.info)
        return self._bundle

    def _check_bundle(self, info: BundleInfo) -> None:
        if info.fingerprint() != self._request.bundle_fingerprint:
            raise was_replaced(self._request.config.bundle)

    def _score(self, unit: Unit) -> list[Outcome]:
        if not self._num_suspect_units:
            return self._scorer.score(unit, self._load())
        self._num_suspect_units -= 1
        _log.warning(
            "an actor died over these %d shards: they are scored in a child process, which finds the text",
            len(unit.shards),
        )
        isolated = IsolatedBundle(self._spec)
        try:
            self._check_bundle(isolated.info)
            return self._scorer.score(unit, isolated, before_read=self._request.read_in_isolation)
        finally:
            isolated.close()
