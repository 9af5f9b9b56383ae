"""Fine-tune a BERT classifier on a prepared data set, data-parallel, and write the bundle.

    python -m jobs.train --data dataset --output bundle --encoder minilm
    python -m jobs.train --data dataset --output bundle --encoder minilm --max-length 256 --long-documents mean
    python -m jobs.train --data dataset --output bundle --encoder bert-base-uncased --epochs 3 --learning-rate 5e-5
    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.train --data s3://bucket/dataset --output s3://bucket/bundle --num-workers 4 --device cuda

Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine. The epoch with the best macro-F1
on validation is kept. The same command goes on with a run that was interrupted.
"""

from collections.abc import Sequence

from bertray.cli import Outcome, leave, run_job
from bertray.training.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(TrainConfig, _run, argv, __doc__ or "")


def _run(config: TrainConfig) -> Outcome:
    from bertray.drivers.train import train  # torch and Ray take seconds to import; --help and bad options must not

    return Outcome(train(config))


if __name__ == "__main__":
    leave(main())
