"""Numbers about predictions: how good and how sure they are, which labels are probably wrong.

    classification  accuracy, F1 and the like             calibration   temperature, thresholds, review
    baseline        TF-IDF + logistic regression          label_issues  labels that are probably wrong
    profile         counts over predictions, how far they moved

Imports the root alone. No torch, no Ray.
"""
