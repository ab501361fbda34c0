from .hook import offer_chromaps as offer_chromaps
from .predictor import ChromapPredictor as ChromapPredictor
from .predictor import WithChromaps as WithChromaps
from .session import ChromapRequest as ChromapRequest
from .spaces import fit_after_training as fit_after_training
from .spaces import weights_digest as weights_digest
