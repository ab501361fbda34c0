from .device import check_device as check_device
from .device import check_memory as check_memory
from .run import Training as Training
from .run import examine as examine
