from .statistics import Draws as Draws
from .statistics import PatientSums as PatientSums
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import draw_resamples as draw_resamples
from .statistics import draw_sign_flips as draw_sign_flips
from .statistics import patient_sums as patient_sums
from .statistics import sign_flip_p_value as sign_flip_p_value
