"""What a recorded run says of other runs on such a cluster: `fit` reads the record, `predict` simulates, `advise` ranks methods."""

from .advise import Advice, advise
from .fit import Fit, fit
from .model import KINDS, Prediction, calibrated, cluster_of, predict

__all__ = ["KINDS", "Advice", "Fit", "Prediction", "advise", "calibrated", "cluster_of", "fit", "predict"]
