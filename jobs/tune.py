"""Search for the options of fine-tuning that do best on validation, and write the bundle of the best trial.

    python -m jobs.tune --data dataset --output bundle --encoder minilm --num-trials 16
    python -m jobs.tune --data dataset --output bundle --encoder minilm --learning-rates 1e-4:1e-3 --layer-decays 1
    python -m jobs.tune --data dataset --output bundle --encoder minilm --num-trials 5 --only-seeds
    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.tune --data s3://bucket/dataset --output s3://bucket/bundle --num-concurrent 4 --device cuda

Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine. The first trial has the options of
jobs.train; ASHA ends trials that fall behind. After whatever ended it, the same command goes on.
"""

from collections.abc import Sequence

from bertray.cli import Outcome, leave, run_job
from bertray.training.config import TuneConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(TuneConfig, _run, argv, __doc__ or "")


def _run(config: TuneConfig) -> Outcome:
    from bertray.drivers.tune import search  # torch and Ray take seconds to import; --help and bad options must not

    return Outcome(search(config))


if __name__ == "__main__":
    leave(main())
