"""Telling libtpu that there is no TPU, so that it neither asks around nor complains.

With libtpu installed (to plan, or to compile kernels in tests) jax starts it in every process, and
on a machine without a TPU it then writes errors about a host it cannot identify. It is quiet once
somebody has told it a name; any valid one will do, for nothing runs.
"""

import glob
import os
import pathlib

from olmax import distributed

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # A lock file would let one process at a time load it, for the sake of a TPU that is not there.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_GOOGLE_PCI_VENDOR = "0x1ae0"


def attached() -> bool:
    """Whether this machine has TPU chips, by its device files or on its PCI bus (jax's rule)."""
    return distributed.tpu_attached() or any(
        pathlib.Path(file).read_text().strip() == _GOOGLE_PCI_VENDOR
        for file in glob.glob("/sys/bus/pci/devices/*.0/vendor")
    )


def announce() -> None:
    """Sets what the user has not set; call it before jax starts, where no TPU is `attached`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
