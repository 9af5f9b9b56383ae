"""Numbers about predictions: how good, how sure, how alike, which labels are probably wrong.

    classification  accuracy, F1 and the like             calibration   temperature, thresholds, review
    baseline        TF-IDF + logistic regression          label_issues  labels that are probably wrong
    profile         predictions in counts                 drift         have counts or means moved?

Imports the root alone. No torch, no Ray.
"""
