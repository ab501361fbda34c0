from .metrics import METRICS as METRICS
from .metrics import LabelMetrics as LabelMetrics
from .metrics import case_metrics as case_metrics
from .report import Evaluation as Evaluation
from .run import evaluate as evaluate
from .summary import Difference as Difference
from .summary import Gap as Gap
from .summary import Summary as Summary
