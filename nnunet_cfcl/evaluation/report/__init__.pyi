from .fold_folder import FoldFolder as FoldFolder
from .fold_folder import read_fold as read_fold
from .page import ReportOptions as ReportOptions
from .page import write_report as write_report
