"""Files that survive kills, full disks and damage.

Atomic writes, JSON in three degrees of trust (plain, checksummed, lenient), checksums of arrays, tables of cases, safe
file names and short hashes of content.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
