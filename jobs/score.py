"""Score an archive of Parquet shards with a bundle: one predictions file a shard, under the same relative path.

    python -m jobs.score --bundle bundle --input archive --output scored
    python -m jobs.score --bundle s3://b/bundle --input s3://b/archive --output s3://b/scored --keep-columns document_id
    python -m jobs.score --bundle bundle --input archive --output scored --plan --price-per-hour 2.5
    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python -m jobs.score --bundle s3://b/bundle --input s3://b/archive --output s3://b/scored --device cuda

Run it every night: only new and changed shards are scored. Run it again after a crash: that is the whole recovery.
Runs on the cluster in RAY_ADDRESS (`ray job submit` sets it), else on this machine.
"""

from collections.abc import Sequence

from bertray.cli import EXIT_HELD, EXIT_OK, EXIT_SHARDS_FAILED, Outcome, leave, run_job
from bertray.reports.terminal import print_scoring, print_verdict
from bertray.scoring.config import ScoreConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ScoreConfig, _run, argv, __doc__ or "")


def _run(config: ScoreConfig) -> Outcome:
    if config.plan:
        from bertray.drivers.score_plan import preview

        plan = preview(config)
        print_scoring(plan, [], title="plan: nothing was scored")
        return Outcome(plan)
    from bertray.drivers.score import score

    scored = score(config)
    print_scoring(scored.summary, scored.failures)
    if scored.verdict and scored.verdict.reasons:
        print_verdict(scored.verdict, scored.shards_with_errors)
    if scored.verdict and scored.verdict.is_held:
        return Outcome(scored.summary, EXIT_HELD)
    return Outcome(scored.summary, EXIT_SHARDS_FAILED if scored.failures else EXIT_OK)


if __name__ == "__main__":
    leave(main())
