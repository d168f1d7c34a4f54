"""The one logger of the package; the command line gives it a handler."""

import logging

log = logging.getLogger("align")
