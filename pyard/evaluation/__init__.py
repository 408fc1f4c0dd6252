"""How good a student is: against real data, against its teacher, and in time."""

from pyard.evaluation.evaluate_students import evaluate
from pyard.evaluation.features import Classifier, FeatureNetwork, digits_classifier
from pyard.evaluation.frechet import GaussianStatistics, frechet_distance, frechet_infinity
from pyard.evaluation.inception_score import inception_score
from pyard.evaluation.measure import Candidate, measure
from pyard.evaluation.neighbours import precision_recall
from pyard.evaluation.report import Evaluation, Quality

__all__ = [
    "Candidate",
    "Classifier",
    "Evaluation",
    "FeatureNetwork",
    "GaussianStatistics",
    "Quality",
    "digits_classifier",
    "evaluate",
    "frechet_distance",
    "frechet_infinity",
    "inception_score",
    "measure",
    "precision_recall",
]
