"""Fine-tuning: token files and options in, checkpoints and a bundle out.

    config       what the jobs that train can be told     preflight    what is refused before any time is spent
    run_folder   the folder of a run                      token_files  a split as training reads it
    batches      which rows a step reads                  loss         what is minimised
    learner      a model set up for training              optimizer    all weights, and the schedule
    loop         steps, epochs, checkpoints               checkpoints  what a run goes on from
    ranks        what processes that train agree on       tracking     every step, for TensorBoard and MLflow
    trials       the trials of a search                   export       trained weights -> a bundle
    watcher      where the loop and its driver meet       mlflow_client, curves, dropout: parts of these

Imports the rooms up to bundle; does not know scoring. Needs torch, but for `config`, `preflight`, `trials`,
`run_folder`, `tracking`, `watcher`, `mlflow_client` and `curves`; no Ray.
"""
