"""One module a job, which wires the rooms together, and the Ray workers that it places.

    prepare  train  tune  audit  evaluate  predict  score  demo    the jobs
    config         the options of evaluate, predict and demo
    cluster        which Ray, which devices
    actor_pool     units through a pool of Ray actors     scoring_actor     such an actor
    train_on_ray, tune_on_ray, score_plan                 parts of train, tune and score
    attempt        one attempt at a run of train or tune: what both share
    workers, cross_validation                             what runs in Ray's processes
    status_actors  where workers and driver meet

Imports every room. The only room that imports Ray; a driver itself loads torch as late as it can.
"""
