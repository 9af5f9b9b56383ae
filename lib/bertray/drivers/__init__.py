"""The jobs, which connect the rooms, and the Ray workers that they start.

    train  tune  audit  evaluate  score                   one job each
    local_jobs     prepare, adopt, predict, verify and demo
    measure        what evaluate measures
    config         the options of evaluate, predict, verify and demo
    ray_address    which Ray, and does it answer?
    cluster        a session of Ray, which devices
    forecast       score --plan
    actor_pool     the Ray actors that score
    attempt        one attempt at a run of train or tune: what both share
    train_on_ray, tune_on_ray                             parts of train and tune
    workers, cross_validation                             what runs in Ray's processes
    status_actors  actors through which workers and driver communicate

Imports every room. The only room that imports Ray; drivers import torch only after they have checked the request.
"""
