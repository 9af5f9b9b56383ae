"""Fine-tuning: token files and options in, checkpoints and a bundle out.

    config       options of the jobs that train             preflight    refuses bad requests before any time is spent
    run_folder   the folder of a run                        token_files  a split as training reads it
    batches      which rows a step reads                    loss         the loss, and validation metrics
    learner      a model set up for training                optimizer    the weights, and the learning rate's schedule
    loop         steps, epochs, checkpoints                 checkpoints  what a run resumes from
    tracking     what is told of steps and epochs           trials       the trials of a search
    watcher      how the loop and its driver talk           export       weights -> a bundle
    mlflow_client  a run on a server of MLflow

Imports the rooms up to bundle, but not scoring. Needs torch, except in `config`, `preflight`, `trials`, `run_folder`,
`tracking`, `watcher` and `mlflow_client`; no Ray.
"""
