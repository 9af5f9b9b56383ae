"""Numbers about predictions: how good and how sure they are, which labels are probably wrong.

    classification  accuracy, F1 and the like             calibration   temperature, thresholds, review
    regression      errors of numbers, intervals          label_issues  labels that are probably wrong
    baseline        TF-IDF + a linear model               profile       counts over predictions, how far they moved

Imports the root alone. No torch, no Ray.
"""
